"""The command line: exit code, output and what is on disk afterwards, exact error text included."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from onceover.base.files import read_record, write_record
from onceover.cli import cli, text_of
from onceover.extract.store import StoreError

ROOT = Path(__file__).resolve().parent.parent


def encoders(config):
    return ["--image-encoder", config.image_encoder, "--text-encoder", config.text_encoder, "--device", "cpu"]


def test_the_whole_way(run, drawn, tmp_path, extract_config, one_format):
    store, folder = tmp_path / "s.h5", tmp_path / "runs/a"
    made = run("extract", "--data", drawn, "--store", store, *encoders(extract_config))
    assert made.stdout == ""
    assert f"encoding 60 images with {extract_config.image_encoder}, 4 views on cpu" in made.stderr
    assert f"wrote {store}" in made.stderr
    assert f"next: onceover fit --store {store}" in made.stderr
    again = run("extract", "--data", drawn, "--store", store, *encoders(extract_config))
    assert f"{store} is up to date; nothing to encode" in again.stderr
    small = ["--set", "model.embedding_dim=16", "--set", "training.num_epochs=3", "--set", "training.batch_size=16"]
    fitted = run("fit", "--store", store, "--run", folder, "--device", "cpu", *small)
    assert "36 images, 180 captions, chosen on 12 (dev), to be reported on 12 (test)" in fitted.stderr
    table = run("evaluate", "--run", folder)
    assert table.stdout.splitlines()[0] == "image → caption: 12 queries, gallery of 60"
    assert max(map(len, table.stdout.splitlines())) <= 100
    assert {path.name for path in folder.glob("evaluation-*")} == {
        f"evaluation-test.{end}" for end in ("md", "csv", "json")
    }
    printed = json.loads(run("evaluate", "--run", folder, "--json").stdout)
    run("evaluate", "--run", folder, "--json", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == printed
    hits = run(
        "search",
        "--run",
        folder,
        "--query",
        "a red circle",
        "--top_k",
        3,
        "--out",
        tmp_path / "h.png",
        "--device",
        "cpu",
    )
    assert len([line for line in hits.stdout.splitlines() if "images/" in line]) == 3
    assert (tmp_path / "h.png").stat().st_size > 5000
    found = run(
        "search", "--run", folder, "--query", drawn / "query.jpg", "--mode", "image2text", "--json", "--device", "cpu"
    )
    assert {"rank", "score", "id", "path", "captions", "same"} == set(json.loads(found.stdout)["hits"][0])
    assert "wrote tsne.png" in run("plot", "--run", folder, "--out", tmp_path / "figures").stderr
    assert "wrote features.png" in run("plot", "--store", store, "--out", tmp_path / "figures").stderr
    about = run("info", store).stdout
    assert "60: 36 train, 12 dev, 12 test" in about
    assert "left out    0 records" in about
    assert "chosen on   dev, 12 images" in run("info", folder).stdout
    sound = run("verify", store, "--sample", 2, "--device", "cpu").stdout
    assert "image features (float32 by eager, stored as float32): 2 encoded again" in sound
    assert f"{store} is sound" in sound


def test_a_query_that_the_encoder_truncates_says_so(run, run_dir):
    result = run("search", "--run", run_dir, "--query", "red " * 500, "--device", "cpu")
    assert "longer than the text encoder takes, and cut: 'red red" in result.stderr


def test_a_query_is_embedded_like_the_caption_that_it_repeats(run, run_dir, store):
    result = run("search", "--run", run_dir, "--query", store.captions[12], "--top-k", 60, "--json", "--device", "cpu")
    hits = json.loads(result.stdout)["hits"]
    from onceover.retrieval.embeddings import read_embeddings

    embeddings = read_embeddings(run_dir / "embeddings.h5")
    scores = embeddings.images @ embeddings.texts[12]
    for hit in hits:
        assert hit["score"] == pytest.approx(scores[embeddings.ids.index(hit["id"])], abs=1e-4)


def test_a_picture_is_embedded_like_itself_in_the_store(run, run_dir, store, drawn):
    picture, options = drawn / store.image_paths[5], ("--mode", "image2text", "--json", "--device", "cpu")
    result = run("search", "--run", run_dir, "--query", picture, *options)
    from onceover.retrieval.embeddings import read_embeddings

    embeddings = read_embeddings(run_dir / "embeddings.h5")
    best = float((embeddings.texts @ embeddings.images[5]).max())
    assert json.loads(result.stdout)["hits"][0]["score"] == pytest.approx(best, abs=1e-4)


def test_mistakes_are_one_line_with_the_mend_and_nothing_half_written(
    fails, run_dir, store_file, drawn, tmp_path, extract_config
):
    store, out = tmp_path / "s.h5", tmp_path / "out"
    more = encoders(extract_config)
    assert fails("extract", "--data", tmp_path / "none", "--store", store) == (
        f"{tmp_path / 'none'} does not exist; name the dataset's folder or file"
    )
    assert "is a folder that holds something else than a feature store (captions.csv); name another store" in fails(
        "extract", "--data", drawn, "--store", drawn
    )
    assert fails("extract", "--data", drawn, "--store", store, "--set", "extract.vews=1", code=2).endswith(
        "has an unknown key extract.vews; did you mean extract.views?"
    )
    assert "extract.views is 99" in fails("extract", "--data", drawn, "--store", store, "--views", 99, code=2)
    assert "is no encoder specification" in fails(
        "extract", "--data", drawn, "--store", store, "--image-encoder", "resnet50"
    )
    copy = shutil.copy(store_file, tmp_path / "other.h5")
    assert "holds other image features" in fails(
        "extract", "--data", drawn, "--store", copy, *more, "--views", 1, "--batch-size", 8
    )
    assert "there is no feature store at" in fails("fit", "--store", store, "--run", out)
    assert "is a folder without manifest.h5, and so no feature store" in fails("fit", "--store", tmp_path, "--run", out)
    assert "cannot be read" in fails(
        "fit", "--store", store_file, "--run", out, "--config", tmp_path / "none.yaml", code=2
    )
    assert "is no run folder; make one" in fails("evaluate", "--run", tmp_path / "none")
    assert fails("evaluate", "--run", run_dir, "--split", "select") == (
        "the run has no images in the split 'select'; its splits: dev, test, train"
    )
    assert "is no file; image2text takes an image's path" in fails(
        "search", "--run", run_dir, "--query", "x.jpg", "--mode", "image2text"
    )
    (tmp_path / "letter.jpg").write_text("dear")
    message = fails(
        "search", "--run", run_dir, "--query", tmp_path / "letter.jpg", "--mode", "image2text", "--device", "cpu"
    )
    assert message == f"{tmp_path / 'letter.jpg'} is no usable image: not an image in a known format"
    assert "is no run folder" in fails("plot", "--run", tmp_path / "none", "--out", out)
    assert "but no store, run" in fails("info", tmp_path)
    assert "there is no feature store" in fails("info", tmp_path / "none")
    assert "is no HDF5 file" in fails("verify", tmp_path / "letter.jpg")
    assert "cannot be used" in fails("fit", "--store", store_file, "--run", out, "--device", "cuda:77")
    assert not store.exists()
    assert not out.exists()


def test_usage_errors_are_clicks_own(run):
    assert "name one of --run, --store and --sweep" in run("plot", "--out", "x", code=2).stderr
    for place in ("--run", "--sweep"):
        message = run("plot", place, "x", "--out", "x", "--memory", "2GiB", code=2).stderr
        assert "--memory goes with --store" in message
    contradiction = run("search", "--run", "x", "--query", "x", "--json", "--format", "csv", code=2)
    assert "--json and --format csv contradict each other; name one of them" in contradiction.stderr
    assert contradiction.stdout == ""
    assert "Invalid value for '--top-k'" in run("search", "--run", "x", "--query", "x", "--top-k", 0, code=2).stderr


def test_a_damaged_store_makes_verify_fail_with_what_is_wrong(run, store_file, tmp_path):
    import h5py

    path = shutil.copy(store_file, tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        file["text/features"][0, 0] = float("inf")
    result = run("verify", path, code=1)
    assert "wrong: /text/features holds 1 numbers that are not finite" in result.stdout


def test_info_describes_an_unfinished_extraction(run, drawn, tmp_path, extract_config, monkeypatch, interrupt_after):
    from onceover.extract import pipeline
    from onceover.extract.layouts import read_dataset

    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        pipeline.extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu")
    about = run("info", tmp_path / "s.h5").stdout
    assert "image       1 of 8 shards done (60 rows in all)" in about


def test_the_demo_command_runs_the_whole_chain(run, tmp_path, monkeypatch, extract_config, changed, one_format):
    """The chain with small parts in the place of the large ones; `make demo` runs the real one."""
    from onceover import cli as module
    from onceover.extract import synthetic

    small = {name: getattr(extract_config, name) for name in ("image_encoder", "text_encoder")}
    real, load = synthetic.draw_dataset, module.load_config
    monkeypatch.setattr(synthetic, "draw_dataset", lambda folder: real(folder, 36, 12, 12))
    monkeypatch.setattr(
        module, "load_config", lambda path: changed(load(path), extract=small)
    )  # fmt: skip
    result = run("demo", "--out", tmp_path / "demo", "--device", "cpu")
    assert result.stderr.startswith("The demo, offline, in ")
    assert "UNTRAINED" in result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("multimodal ")]  # of one table, with both directions
    assert lines[-1].startswith("chance")
    figures = {path.name for path in (tmp_path / "demo/figures").iterdir()}
    assert {"tsne.png", "ranks.png", "search-text2image.png", "search-image2text.png"} <= figures
    assert f"figures in {tmp_path / 'demo/figures'}" in result.stderr


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_and_option_has_help_and_stands_in_the_docs(name):
    command = cli.commands[name]
    assert command.help
    page = (ROOT / "docs/cli.md").read_text()
    assert f"## {name}\n" in page
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name}"
            assert parameter.opts[0] in page


def test_the_command_page_is_generated_from_the_help():
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs/make_cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/cli.md").read_text() == module.render(), "run: make docs"


def check_parses(line):
    """Parses a command line, a continued one or with a comment too, and runs nothing."""
    _, name, *arguments = shlex.split(line, comments=True)
    assert name in cli.commands, line
    cli.commands[name].make_context(name, arguments)


def examples(text):
    """The lines of a help text that follow ``Examples:``."""
    return [line.strip() for line in text.partition("Examples:")[2].splitlines() if line.strip()]


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_the_help_of_every_command_has_an_example_that_parses(name):
    lines = examples(cli.commands[name].help)
    assert lines
    for line in lines:
        assert line.startswith(f"onceover {name} ")
        check_parses(line)


def test_the_first_help_has_examples_that_parse():
    lines = examples(cli.help)
    assert lines
    for line in lines:
        check_parses(line)


PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(("docs/api", "docs/notes"))])
def test_the_command_lines_in_the_documents_parse(page):
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for start in re.findall(r"\bonceover [a-z].*", line.partition("# ")[0]):
            check_parses(start.partition("; done")[0].replace("=$seed", "=0"))


def test_a_run_works_from_another_folder_and_with_an_encoder_that_has_moved(
    run, tmp_path, drawn, tiny_bert, monkeypatch
):
    shutil.copytree(tiny_bert, tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    run("extract", "--data", drawn, "--store", "s.h5", "--image-encoder", "torchvision:shufflenet_v2_x0_5@random",
        "--text-encoder", "hf:bert", "--device", "cpu")  # fmt: skip
    run("fit", "--store", "s.h5", "--run", "r", "--device", "cpu", "--set", "training.num_epochs=1")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    query = ("search", "--run", tmp_path / "r", "--query", "a red circle", "--json", "--device", "cpu")
    before = run(*query).stdout
    (tmp_path / "bert").rename(tmp_path / "moved")
    run(*query, code=1)
    assert run(*query, "--text-encoder", f"hf:{tmp_path / 'moved'}").stdout == before
    (tmp_path / "s.h5").rename(tmp_path / "t.h5")
    gone = run("evaluate", "--run", tmp_path / "r", code=2).stderr
    assert "which is not there; name it: --store FILE.h5" in gone
    run("evaluate", "--run", tmp_path / "r", "--store", tmp_path / "t.h5")


def test_evaluate_with_everything_and_compare(run, fails, run_dir, store_file, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "r")
    done = run("evaluate", "--run", folder, "--rerank", "qbnorm", "--rerank", "csls", "--shuffled", "--errors", 2)
    assert list(json.loads((folder / "evaluation-test.json").read_text())["models"]) == [
        "multimodal", "multimodal_qbnorm", "multimodal_csls_transductive", "cca", "ridge", "text_knn", "image_knn",
        "image_only", "text_only", "shuffled", "chance",
    ]  # fmt: skip
    assert done.stdout.count("\nqbnorm") == 2  # below the rest of its name, for want of room
    assert "errors-test.html" in done.stderr
    assert (folder / "errors-test.html").read_text().count("<article>") == 4
    assert (folder / "shuffled/run.json").exists()
    again = run("evaluate", "--run", folder, "--shuffled")
    assert "is fitted with these settings on this store already" in again.stderr
    copy = shutil.copy(store_file, tmp_path / "alone.h5")
    alone = run("evaluate", "--store", copy)
    assert "multimodal" not in alone.stdout
    assert f"wrote {tmp_path}/alone.h5.evaluation-test.md" in alone.stderr
    assert json.loads((tmp_path / "alone.h5.evaluation-test.json").read_text())["models"]["cca"]["rsum"] > 0
    assert "name a --run" in run("evaluate", code=2).stderr
    assert "name a --run" in run("evaluate", "--store", copy, "--errors", 3, code=2).stderr
    table = run("compare", run_dir, folder).stdout
    assert table.count("not distinguishable") == 9
    compared = json.loads(run("compare", run_dir, folder, folder / "shuffled", "--split", "train", "--json").stdout)
    assert compared["reference"] == str(run_dir)
    assert compared["differences"][str(folder)]["rsum_ci"] == [0.0, 0.0]
    assert compared["differences"][str(folder / "shuffled")]["rsum_ci"][1] < 0
    assert "name at least two runs" in fails("compare", run_dir)


def test_info_shows_a_run_as_it_searches_and_counts_pictures_without_captions(run, run_dir, store, tmp_path):
    from onceover.analysis.describe import _describe_store

    folder = shutil.copytree(run_dir, tmp_path / "r")
    settings = (folder / "config.yaml").read_text()
    run("evaluate", "--run", folder, "--rerank", "qbnorm")
    for rerank, name in (("none", "multimodal"), ("qbnorm", "multimodal_qbnorm")):
        (folder / "config.yaml").write_text(settings.replace("rerank: none", f"rerank: {rerank}"))
        result = read_record(folder / "evaluation-test.json", "")
        for side in result["models"].values():
            side["text_to_image"]["R@1"] = 11.1
        result["models"][name]["text_to_image"]["R@1"] = 77.7
        write_record(folder / "evaluation-test.json", result)
        assert f"{name}, text to image: R@1/5/10 77.7 /" in run("info", folder).stdout
    assert "300, 5 an image" in _describe_store(store)
    store.image_index[store.image_index == 4] = 3
    assert "300, 0 to 10 an image" in _describe_store(store)


def test_runs_are_joined_evaluated_drawn_and_searched(run, run_dir, tmp_path, one_format):
    joined, run_dir = tmp_path / "both", shutil.copytree(run_dir, tmp_path / "one")
    made = run("ensemble", run_dir, run_dir, "--out", joined)
    assert "2 pairs of heads: rsum" in made.stderr
    alone, both = (json.loads(run("evaluate", "--run", folder, "--json").stdout) for folder in (run_dir, joined))
    assert both["models"]["multimodal"]["rsum"] == pytest.approx(alone["models"]["multimodal"]["rsum"])
    assert "ensemble    2 pairs of heads" in run("info", joined).stdout
    said = run("plot", "--run", joined, "--out", tmp_path / "f").stderr
    assert "not drawn: training: the members of an ensemble have curves of their own" in said
    assert not list((tmp_path / "f").glob("training.*"))
    query = ("--query", "a red circle", "--json", "--device", "cpu")
    ours, single = (json.loads(run("search", "--run", folder, *query).stdout)["hits"] for folder in (joined, run_dir))
    assert [hit["score"] for hit in ours] == pytest.approx([hit["score"] for hit in single], abs=1e-5)
    run("index", "--run", joined)
    indexed = json.loads(run("search", "--index", joined / "index", *query).stdout)["hits"]
    assert [hit["id"] for hit in indexed] == [hit["id"] for hit in ours]


@pytest.fixture
def pictures(drawn, tmp_path):
    """A stranger's folder: ten images, one of them twice, one in a folder below, one that is none, and a text."""
    folder = tmp_path / "mine"
    (folder / "below").mkdir(parents=True)
    names = sorted((drawn / "images").glob("*.jpg"))[:10]
    for path in names:
        shutil.copy(path, folder / path.name)
    shutil.copy(names[0], folder / "below/copy.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "notes.txt").write_text("a text")
    return folder


def test_a_strangers_folder_is_indexed_once_and_searched(run, fails, run_dir, pictures, tmp_path):
    index, cpu = tmp_path / "index", ("--device", "cpu")
    made = run("index", "--run", run_dir, "--images", pictures, "--index", index, *cpu)
    assert "encoding 12 images" in made.stderr
    assert "left out: 1 at stage image" in made.stderr
    assert "left alone: 1 .txt" in made.stderr
    assert "11 images: 11 added, 0 removed" in made.stderr
    assert "flat (exact search over 11 rows answers within milliseconds" in made.stderr
    assert "up to date" in run("index", "--run", run_dir, "--images", pictures, "--index", index, *cpu).stderr
    name = sorted(path.name for path in pictures.glob("*.jpg"))[3]
    (pictures / name).rename(pictures / f"renamed-{name}")
    shutil.copy(pictures / f"renamed-{name}", pictures / "new.jpg")
    again = run("index", "--run", run_dir, "--images", pictures, "--index", index, *cpu)
    assert "encoding" not in again.stderr  # the same bytes under other names
    assert "12 images: 2 added, 1 removed" in again.stderr
    hits = json.loads(run("search", "--index", index, "--query", "a red circle", "--top-k", 50, "--json", *cpu).stdout)[
        "hits"
    ]
    assert len(hits) == 10  # two images are there twice
    assert sum(len(hit["same"]) for hit in hits) == 2
    assert {name for hit in hits for name in [hit["id"], *hit["same"]]} >= {"below/copy.jpg", "new.jpg"}
    assert all(Path(hit["path"]) == pictures / hit["id"] for hit in hits)  # to be opened from anywhere
    assert "recall@10   1.000" in run("info", index).stdout
    assert "text        none" in run("info", index / "images.h5").stdout
    assert "is sound" in run("verify", index / "images.h5").stdout
    message = fails("index", "--run", run_dir, "--images", pictures / "below", "--index", index, *cpu)
    assert message.startswith(f"{index}/images indexes {pictures}, not {pictures}/below; name another --index")
    run("index", "--run", run_dir, "--index", index, "--remove", "new.jpg", "--remove", "below/copy.jpg")
    hits = json.loads(run("search", "--index", index, "--query", "a red circle", "--top-k", 50, "--json", *cpu).stdout)[
        "hits"
    ]
    assert {hit["id"] for hit in hits}.isdisjoint({"new.jpg", "below/copy.jpg"})
    assert (
        "holds no 'new.jpg'" in run("index", "--run", run_dir, "--index", index, "--remove", "new.jpg", code=1).stderr
    )
    assert f"{index}/images is sound: 10 rows" in run("verify", index).stdout
    compacted = run("index", "--index", index, "--compact").stderr
    assert "images: 10 rows; the room of 3 removed ones is free" in compacted  # the one that was renamed, too
    assert "segments    1: " in run("info", index).stdout


def test_two_folders_are_indexed_apart_and_searched_as_one(run, fails, run_dir, pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    names = sorted(path.name for path in pictures.glob("*.jpg"))
    shutil.copy(pictures / names[2], other / names[2])  # the same image
    shutil.copy(pictures / names[3], other / names[4])  # another one of the same name
    cpu = ("--device", "cpu")
    indexes = [tmp_path / "one.index", tmp_path / "two.index"]
    for folder, index in zip((pictures, other), indexes, strict=True):
        run("index", "--run", run_dir, "--images", folder, "--index", index, *cpu)
    both = ("--index", indexes[0], "--index", indexes[1])
    query = ("--query", "a red circle", "--top-k", 50, "--json", *cpu)
    hits = json.loads(run("search", *both, *query).stdout)["hits"]
    alone = json.loads(run("search", "--index", indexes[0], *query).stdout)["hits"]
    assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in alone], abs=1e-6)
    shown = {hit["id"]: hit["same"] for hit in hits}
    known = {name for name, same in shown.items()} | {name for same in shown.values() for name in same}
    assert {str(other / names[2]), str(other / names[4]), str(pictures / names[4])} <= known
    assert all(hit["id"] == hit["path"] for hit in hits)
    message = fails("search", "--index", indexes[0], "--index", indexes[0], *query)
    assert message.startswith("the same index is named twice; name each one once")


def test_workers_share_the_index_of_a_run(run, run_dir, tmp_path):
    index = tmp_path / "index"
    call = ("index", "--run", run_dir, "--index", index, "--type", "ivf16", "--min-recall", 0.5)
    for worker in ("2/2", "1/2"):
        assert (
            f"worker {worker} is done; when all are, run index without --worker"
            in run(*call, "--worker", worker).stderr
        )
    assert not (index / "captions" / "CURRENT").exists()
    assert (index / "captions.parts" / "part-000000.h5").is_file()
    assert "added" in run(*call).stderr
    assert sorted(path.name for path in index.glob("[!.]*")) == ["captions", "images"]
    refused = run(*call, "--worker", "1/2", "--force", code=2).stderr
    assert "--force and --prune cannot be combined with --worker" in refused


def test_sentences_are_indexed_and_found_by_a_picture(run, fails, run_dir, drawn, tmp_path):
    sentences = tmp_path / "s.txt"
    sentences.write_text("A red circle .\n\nA blue star .\nA red circle .\nEin grüner Ring .\n", encoding="utf-8")
    index, cpu = tmp_path / "index", ("--device", "cpu")
    made = run("index", "--run", run_dir, "--captions", sentences, "--index", index, "--rerank", "qbnorm", *cpu)
    assert "left out: 1 at stage dataset: empty caption (the first: line 2)" in made.stderr
    assert "4 captions: 4 added" in made.stderr
    found = run("search", "--index", index, "--query", drawn / "query.jpg", "--mode", "image2text", "--json", *cpu)
    hits = json.loads(found.stdout)["hits"]
    assert {hit["captions"][0] for hit in hits} == {"A red circle .", "A blue star .", "Ein grüner Ring ."}
    assert sorted(len(hit["same"]) for hit in hits) == [0, 0, 1]
    assert "corrected for hubs" in run("info", index).stdout
    again = run("index", "--run", run_dir, "--captions", sentences, "--index", index, *cpu)
    assert "up to date" in again.stderr  # the correction stays as it was asked for
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "holds no captions" in fails(
        "index", "--run", run_dir, "--captions", tmp_path / "empty.txt", "--index", tmp_path / "x"
    )
    refused = fails("search", "--index", index, "--query", "a red circle")
    assert f"{index} holds no images, only captions; search these with --mode image2text or text2text, or" in refused


def test_a_runs_own_index_answers_as_the_run_does(run, run_dir, tmp_path):
    index, cpu = tmp_path / "index", ("--device", "cpu")
    made = run("index", "--run", run_dir, "--index", index, "--type", "hnsw", "--rerank", "qbnorm")
    assert "60 images: 60 added" in made.stderr
    assert "300 captions: 300 added" in made.stderr
    query = ("--query", "a red circle", "--json", *cpu)
    ours = json.loads(run("search", "--index", index, *query).stdout)["hits"]
    exact = json.loads(run("search", "--run", run_dir, "--rerank", "qbnorm", *query).stdout)["hits"]
    assert [hit["id"] for hit in ours] == [hit["id"] for hit in exact]
    assert [hit["score"] for hit in ours] == pytest.approx([hit["score"] for hit in exact], abs=1e-5)
    moved = shutil.copytree(run_dir, tmp_path / "moved")
    run("index", "--run", moved, "--index", tmp_path / "of moved")
    shutil.rmtree(moved)
    gone = run("search", "--index", tmp_path / "of moved", *query, code=2).stderr
    assert f"was made with the run {moved}, which is not there; name it: --run DIR" in gone
    assert json.loads(run("search", "--index", tmp_path / "of moved", "--run", run_dir, *query).stdout)["hits"]
    split = run("index", "--run", run_dir, "--index", tmp_path / "test", "--split", "test")
    assert "12 images: 12 added" in split.stderr


@pytest.mark.parametrize(
    "idle",
    [
        ("--type", "flat"), ("--memory", "1GiB"), ("--min-recall", 0), ("--rerank", "none"), ("--force",),
        ("--image-encoder", "x"), ("--text-encoder", "x"), ("--device", "cpu"),
    ],
    ids=lambda idle: idle[0],
)  # fmt: skip
@pytest.mark.parametrize("change", [("--remove", "p1"), ("--compact",)], ids=lambda change: change[0])
def test_options_that_have_no_effect_on_a_change_of_an_index_are_refused(run, tmp_path, change, idle):
    message = run("index", "--index", tmp_path, *change, *idle, code=2).stderr
    assert f"{idle[0]} has no effect on --remove and --compact; leave it out, or index again" in message


def test_what_has_moved_is_to_be_named_with_its_option(run, run_dir, store_file, tmp_path):
    moved, index = shutil.copytree(run_dir, tmp_path / "moved"), tmp_path / "index"
    run("index", "--run", moved, "--index", index)
    shutil.rmtree(moved)
    for change in (("--remove", "000.jpg"), ("--compact",)):
        gone = run("index", "--index", index, *change, code=2).stderr
        assert gone == f"error: {index} was made with the run {moved}, which is not there; name it: --run DIR\n"
    orphan = shutil.copytree(run_dir, tmp_path / "orphan")
    made = read_record(orphan / "run.json", "")
    write_record(orphan / "run.json", made | {"store": str(tmp_path / "gone.h5")})
    gone = run("ensemble", orphan, run_dir, "--out", tmp_path / "e", code=2).stderr
    expected = f"error: {orphan} was fitted on {tmp_path / 'gone.h5'}, which is not there; name it: --store FILE.h5\n"
    assert gone == expected
    run("ensemble", orphan, run_dir, "--out", tmp_path / "e", "--store", store_file)


def test_the_next_command_works_where_a_path_has_blanks(run, run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "my run")
    following = run("evaluate", "--run", folder).stderr.splitlines()[-1]
    assert following == f"next: onceover search --run '{folder}' --query 'a dog playing in the park'"
    called = shlex.split(following.removeprefix("next: "))[1:]
    assert run(*called, "--device", "cpu").stderr.splitlines()[-1] == "5 hits"


def test_many_queries_in_every_format(run, fails, run_dir, drawn, tmp_path):
    queries, cpu = tmp_path / "q.txt", ("--device", "cpu")
    queries.write_text("a red circle\n\na blue star\n", encoding="utf-8")
    many = ("search", "--run", run_dir, "--queries", queries, "--top-k", 2, *cpu)
    done = run(*many)
    assert "empty lines left out: 1" in done.stderr
    assert [line for line in done.stdout.splitlines() if not line.startswith(" ")] == ["a red circle", "a blue star"]
    results = json.loads(run(*many, "--json").stdout)
    assert [result["query"] for result in results] == ["a red circle", "a blue star"]
    assert [json.loads(line) for line in run(*many, "--format", "jsonl").stdout.splitlines()] == results
    table = run(*many, "--format", "csv").stdout.splitlines()
    assert table[0] == "query,mode,rank,score,id,path,caption,same"
    assert len(table) == 5
    piped = CliRunner().invoke(
        cli, ["search", "--run", str(run_dir), "--queries", "-", "--top-k", "2", "--format", "jsonl", *cpu],
        input="a red circle\na blue star\n",
    )  # fmt: skip
    assert [json.loads(line) for line in piped.stdout.splitlines()] == results
    queries.write_text("a red circle\n" + str(drawn / "query.jpg"), encoding="utf-8")
    assert "add --mode image2text" in fails(*many)
    queries.write_text("\n\n")
    assert f"{queries} holds no queries; write one a line" in fails(*many)
    queries.write_bytes(b"caf\xe9")
    assert "is not UTF-8" in fails(*many)
    assert "name --query or --queries, one of the two" in run("search", "--run", run_dir, code=2).stderr
    assert "name a --run, or an --index" in run("search", "--query", "x", code=2).stderr


def test_a_picture_and_a_sentence_together_lie_between_the_two(run, run_dir, drawn, tmp_path):
    picture, cpu = drawn / "query.jpg", ("--top-k", 60, "--json", "--device", "cpu")

    def ranking(*arguments):
        hits = json.loads(run("search", "--run", run_dir, *arguments, *cpu).stdout)["hits"]
        return {hit["id"]: hit["score"] for hit in hits}

    sentence = ranking("--query", "a red circle")
    mixed = {
        weight: ranking("--query", "a red circle", "--with", picture, "--weight", weight) for weight in (1, 0.5, 0)
    }
    assert mixed[1] == pytest.approx(sentence, abs=1e-5)
    assert mixed[0] != pytest.approx(sentence, abs=1e-2)
    assert set(mixed[1]) == set(mixed[0.5]) == set(mixed[0])
    half = [mixed[0.5][name] / (mixed[1][name] + mixed[0][name]) for name in sentence]
    assert half == pytest.approx([half[0]] * len(half), rel=1e-3)  # the normalised sum, so one factor for all
    captions = ranking("--query", picture, "--mode", "image2text", "--with", "a red circle", "--weight", 0.3)
    assert len(captions) > 5
    drawing = tmp_path / "m.png"
    run("search", "--run", run_dir, "--query", "a red circle", "--with", picture, "--out", drawing, "--device", "cpu")
    assert drawing.stat().st_size > 5000


def test_sizes_are_read_as_people_write_them(run, run_dir, tmp_path):
    from onceover.cli import Size

    for text, size in (("2GiB", 2**31), ("500 MB", 500 * 2**20), ("1.5k", 1536), ("4096", 4096)):
        assert Size().convert(text, None, None) == size
    result = run("index", "--run", run_dir, "--index", tmp_path / "i", "--memory", "much", code=2)
    assert "'much' is no size; write for example 500MiB or 2GiB" in result.stderr
    assert (
        "do not fit the budget"
        in run("index", "--run", run_dir, "--index", tmp_path / "i", "--memory", 10, code=1).stderr
    )


def test_the_example_of_the_search_module_runs(run_dir, monkeypatch, capsys, drawn):
    """The docstring's example, with this run's folder and a drawn image in the place of its names."""
    from onceover.retrieval import search

    code = "\n".join(re.findall(r"^    (.+|)$", search.__doc__, re.MULTILINE))
    code = code.replace("runs/first", str(run_dir)).replace("dog.jpg", str(drawn / "query.jpg"))
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out.count("images/") == 5


def test_an_index_refuses_another_encoder_before_it_encodes_and_other_heads_before_it_changes(
    run, fails, run_dir, pictures, tmp_path, store_file, fit_config, changed
):
    from onceover.extract.store import FeatureStore
    from onceover.heads.training import fit

    index, cpu = tmp_path / "index", ("--device", "cpu")
    picture = next(pictures.glob("0*.jpg")).name
    (pictures.parent / "drawn.csv").write_text(f"image,caption\nmine/{picture},A red circle .\n")
    wrong = ("--image-encoder", "torchvision:shufflenet_v2_x1_0@random")
    refused = run("index", "--run", run_dir, "--images", pictures, "--index", index, *wrong, *cpu, code=1).stderr
    assert "the image encoder is not the one that" in refused
    assert "encoding" not in refused
    assert not (index / "images.h5.parts").exists()
    run("index", "--run", run_dir, "--images", pictures, "--index", index, *cpu)
    with FeatureStore(store_file) as store:
        fit(store, tmp_path / "other", changed(fit_config, training={"seed": 7}))
    assert "was made by other heads than" in fails("index", "--run", tmp_path / "other", "--index", index, "--compact")
    query = ("--query", "a red circle", *cpu)
    assert "made by other heads or encoders" in fails("search", "--run", tmp_path / "other", "--index", index, *query)
    again = ("index", "--run", tmp_path / "other", "--images", pictures, "--index", index, *cpu)
    assert f"was made with the run {run_dir}; name that one, another --index, or --force" in fails(*again)
    anew = run(*again, "--force").stderr
    assert "building it anew: space changed" in anew
    assert "encoding" not in anew
    run("search", "--run", tmp_path / "other", "--index", index, *query)
    damaged = next((index / "images").glob("*.h5"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    for command in ("verify", "info"):
        assert "does not match its SHA-256" in fails(command, index)
    assert "there is no index at" in fails("search", "--index", tmp_path / "nowhere", "--query", "x")
    assert "there is no file 'x.jpg'; give an" in fails("search", "--run", run_dir, "--query", "red", "--with", "x.jpg")
    assert "there is no file 'x.jpg'; text2image takes a text; to search by an image, add --mode image2text" in fails(
        "search", "--run", run_dir, "--query", "x.jpg"
    )
    wrong = ("--image-encoder", "hf:/nope", "--text-encoder", "hf:distilbert-base-uncased@random")
    mistyped = run("extract", "--data", tmp_path / "drawn.csv", "--store", tmp_path / "n.h5", *wrong, code=1).stderr
    assert "error: hf:/nope: there is no such folder, and no model can have that name" in mistyped
    message = run("search", "--run", run_dir, "--query", "x", "--weight", 0.3, code=2).stderr
    assert "--weight is the weight of --query against --with" in message


def test_an_interrupted_command_says_how_to_go_on(drawn, tmp_path, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("onceover.extract.pipeline.extract", interrupted)
    found = CliRunner().invoke(cli, ["extract", "--data", str(drawn), "--store", str(tmp_path / "s.h5")])
    assert found.exit_code == 130
    assert found.stderr.endswith("interrupted; run the same command again: what was finished is kept\n")


@pytest.fixture
def heeded_interrupts():
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which ignores it for them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", (AttributeError("no attribute 'flush'"), StoreError("s.h5 is damaged")))
def test_what_a_library_makes_of_an_interruption_is_one(drawn, tmp_path, monkeypatch, error, heeded_interrupts):
    def interrupted(*_args, **_kwargs):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # as HDF5 does, in a callback
            raise error from None

    monkeypatch.setattr("onceover.extract.pipeline.extract", interrupted)
    before = signal.getsignal(signal.SIGINT)
    found = CliRunner().invoke(cli, ["extract", "--data", str(drawn), "--store", str(tmp_path / "s.h5")])
    assert found.exit_code == 130
    assert found.stderr.endswith("\ninterrupted; run the same command again: what was finished is kept\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_interruption_stays_ignored(drawn, tmp_path, monkeypatch):
    def failing(*_args, **_kwargs):
        signal.raise_signal(signal.SIGINT)
        raise StoreError("s.h5 is damaged")

    monkeypatch.setattr("onceover.extract.pipeline.extract", failing)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = CliRunner().invoke(cli, ["extract", "--data", str(drawn), "--store", str(tmp_path / "s.h5")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.exit_code == 1
    assert found.stderr.endswith("\nerror: s.h5 is damaged\n")


def test_evaluating_and_drawing_a_run_does_without_torch_and_its_memory(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    script = (
        "import sys\nfrom onceover.analysis import drawing\nfrom onceover.cli import cli\n"
        "drawing.SUFFIXES = ('.png',)\n"
        "cli(['evaluate', '--run', 'run', '--errors', '2'], standalone_mode=False)\n"
        "cli(['plot', '--run', 'run', '--out', 'figures'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "False"
    assert list((tmp_path / "figures").glob("*.png"))


def flipped(data, seed):
    generator = np.random.default_rng(seed)
    changed = bytearray(data)
    changed[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
    return bytes(changed)


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "evaluation-test.json"])
def test_trap_info_of_a_damaged_run_describes_it_or_says_one_line(run_dir, store, tmp_path, name):
    from onceover.analysis.describe import describe
    from onceover.base.errors import OnceoverError
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.evaluation import evaluate

    folder = shutil.copytree(run_dir, tmp_path / "run")
    result = evaluate(read_embeddings(folder / "embeddings.h5"), store)
    (folder / "evaluation-test.json").write_text(json.dumps(result))
    whole = (folder / name).read_bytes()
    for seed in range(60):
        (folder / name).write_bytes(flipped(whole, seed))
        try:
            describe(folder)
        except OnceoverError as error:
            assert len(str(error).splitlines()) == 1
    for data in (b"", b"[" * 100_000, b"\xff\xfe", b"3", b"[]", b"null", whole[: len(whole) // 2]):
        (folder / name).write_bytes(data)
        try:
            describe(folder)
        except OnceoverError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("store", 3), ("train_pictures", "36"), ("seconds", "x"), ("selection", []), ("members", 3), ("epochs", [])],
    ids=str,
)
def test_info_of_a_run_with_a_value_of_another_type_names_the_run(fails, run_dir, tmp_path, key, value):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    made = read_record(folder / "run.json", "")
    write_record(folder / "run.json", made | {key: value})
    assert fails("info", folder).startswith(f"{folder} is damaged, or of another format (")


def test_info_describes_what_is_unfinished(run, fails, tmp_path):
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit/resume.pt").write_bytes(b"")
    described = run("info", tmp_path / "fit").stdout
    assert described == f"unfinished fit {tmp_path}/fit\n  run the same fit command again to go on\n"
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/finetune.json").write_text(json.dumps({"encoders": {"image": "hf:a", "text": "hf:b"}}))
    described = run("info", tmp_path / "tuned").stdout
    assert described.startswith(f"unfinished fine-tuning {tmp_path}/tuned\n  encoders    hf:a, hf:b: trained\n")
    assert "run the same finetune command again with --re-extract" in described
    (tmp_path / "sweep/trials").mkdir(parents=True)
    (tmp_path / "sweep/trials/a.json").write_text("{}")
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"store": "s.h5"}))
    described = run("info", tmp_path / "sweep").stdout
    assert described.startswith(f"unfinished sweep {tmp_path}/sweep\n  store       s.h5\n  trials      1 ended\n")
    (tmp_path / "sweep/results.csv").write_text("")
    assert run("info", tmp_path / "sweep").stdout.startswith(f"sweep {tmp_path}/sweep\n")
    (tmp_path / "index/images.h5.parts").mkdir(parents=True)
    assert run("info", tmp_path / "index").stdout.startswith(
        f"unfinished index {tmp_path}/index\nunfinished extraction"
    )
    (tmp_path / "empty").mkdir()
    assert "empty is a folder, but no store, run, sweep or index; name" in fails("info", tmp_path / "empty")
    os.mkfifo(tmp_path / "fifo.h5")
    assert fails("info", tmp_path / "fifo.h5") == f"{tmp_path}/fifo.h5 is a FIFO; a regular file is needed"
    assert fails("info", "/dev/null") == "/dev/null is a device; a regular file is needed"
    (tmp_path / "fit/run.json").write_text("{}")
    assert "is damaged, or of another format (ConfigError: the config" in fails("info", tmp_path / "fit")


def test_trap_index_leaves_a_strangers_folder_alone(fails, run_dir, pictures, tmp_path):
    folder, cpu = tmp_path / "holiday", ("--device", "cpu")
    for name in ("images/2024-01.jpg", "captions/0.txt"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    index = ("index", "--run", run_dir, "--index", folder, "--force")
    for what in ((), ("--images", pictures, *cpu), ("--images", folder / "images", *cpu)):
        message = fails(*index, *what)
        assert message == f"{folder}/images is not empty and no index; name another folder for the index"
    shutil.move(folder / "images", tmp_path / "elsewhere")
    sentences = tmp_path / "s.txt"
    sentences.write_text("a red circle\n")
    message = fails(*index, "--captions", sentences, *cpu)
    assert message == f"{folder}/captions is not empty and no index; name another folder for the index"
    shutil.move(folder / "captions", folder / "texts")
    message = fails(*index, "--captions", sentences, *cpu)
    assert message == (f"{folder} is not empty, and was not made by this program; name another folder for the index")
    after = {path.read_bytes() for path in [*folder.rglob("*"), *(tmp_path / "elsewhere").iterdir()] if path.is_file()}
    assert after == set(before.values())


def test_trap_a_disk_that_is_not_mounted_empties_no_index(run, fails, run_dir, pictures, tmp_path):
    index, cpu = tmp_path / "index", ("--device", "cpu")
    again = ("index", "--run", run_dir, "--images", pictures, "--index", index, *cpu)
    run(*again)
    shutil.move(pictures / "below", tmp_path / "unmounted")
    message = fails(*again)
    assert message == (
        f"1 of 11 indexed images are no longer in {pictures} (no image of below/ is there); is a disk not mounted? "
        "--prune drops them, --force goes on without them and keeps their features"
    )
    assert "11 rows" in run("verify", index).stdout
    names = sorted(path.name for path in pictures.glob("0*.jpg"))
    for name in names[:6]:
        shutil.move(pictures / name, tmp_path / name)
    (pictures / "below").mkdir()
    shutil.copy(tmp_path / "unmounted/copy.jpg", pictures / "below")
    assert fails(*again).startswith(f"6 of 11 indexed images are no longer in {pictures}; is a disk not mounted?")
    assert "5 images" in run(*again, "--force").stderr.replace("pictures", "images")
    for name in names[:6]:
        shutil.move(tmp_path / name, pictures / name)
    told = run(*again).stderr
    assert "11 images, 0 captions; rows encoded: 0 image" in told
    assert "11 rows" in run("verify", index).stdout
    for name in names[:6]:
        (pictures / name).unlink()
    run(*again, "--prune")
    assert "5 rows" in run("verify", index).stdout
    stale = [path.name for path in (index / "images").iterdir() if names[0].encode() in path.read_bytes()]
    assert stale == []
    message = run("index", "--run", run_dir, "--prune", code=2).stderr
    assert "--prune and --retry-failures go with --images or --captions" in message


def test_excluded_images_leave_the_index_without_being_taken_for_vanished(run, fails, run_dir, pictures, tmp_path):
    index, cpu = tmp_path / "index", ("--device", "cpu")
    again = ("index", "--run", run_dir, "--images", pictures, "--index", index, *cpu)
    run(*again)
    names = sorted(path.name for path in pictures.glob("0*.jpg"))
    most = [option for name in names[:6] for option in ("--exclude", name)]
    told = run(*again, "--exclude", "below", *most, "--exclude", "*.gif").stderr
    assert ": 0 added, 7 removed" in told
    assert f"excluded images in {pictures}, left alone: 7" in told
    assert f"nothing in {pictures} matches the pattern '*.gif' to exclude" in told
    assert "4 rows" in run("verify", index).stdout
    assert "encoding" not in run(*again).stderr  # they come back with their features
    assert "11 rows" in run("verify", index).stdout
    (pictures / names[9]).unlink()
    shutil.rmtree(pictures / "below")
    assert "(no image of below/ is there)" in fails(*again, "--exclude", names[0])
    message = run("index", "--run", run_dir, "--exclude", "*.gif", code=2).stderr
    assert "--exclude goes with --images; name the folder whose images to index" in message


def test_an_image_whose_decoder_is_missing_is_encoded_once_it_is_there(run, run_dir, pictures, tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), "red")).save(pictures / "phone.heic", quality=90)
    index, cpu = tmp_path / "index", ("--device", "cpu")
    again = ("index", "--run", run_dir, "--images", pictures, "--index", index, *cpu)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        run(*again)
        assert "up to date" in run(*again).stderr
        ledger = run("info", index / "images.h5").stdout
    assert "needs pillow-heif: pip install 'onceover-retrieval[heif]'" in ledger
    assert ": 1 added, 0 removed" in run(*again).stderr
    assert "12 rows" in run("verify", index).stdout


def test_features_of_a_vanished_image_are_kept_until_they_are_pruned(run, run_dir, pictures, tmp_path):
    index, cpu = tmp_path / "index", ("--device", "cpu")
    again = ("index", "--run", run_dir, "--images", pictures, "--index", index, *cpu)
    run(*again)
    name = sorted(path.name for path in pictures.glob("0*.jpg"))[4]
    shutil.move(pictures / name, tmp_path / name)
    assert ": 0 added, 1 removed" in run(*again).stderr
    query = ("search", "--index", index, "--query", "a red circle", "--top-k", 50, "--json", *cpu)
    assert name not in run(*query).stdout
    shutil.move(tmp_path / name, pictures / name)
    back = run(*again).stderr
    assert ": 1 added, 0 removed" in back
    assert "encoding" not in back
    (pictures / name).unlink()
    run(*again, "--prune")
    assert not [path for path in index.rglob("*") if path.is_file() and name.encode() in path.read_bytes()]


def test_captions_that_vanish_are_asked_about(run, fails, run_dir, tmp_path):
    sentences, index, cpu = tmp_path / "s.txt", tmp_path / "index", ("--device", "cpu")
    again = ("index", "--run", run_dir, "--captions", sentences, "--index", index, *cpu)
    shapes = ("circle", "square", "ring")
    kept = [f"a {colour} {shape}\n" for colour in ("red", "black", "yellow") for shape in shapes]
    gone = [f"a {colour} {shape}\n" for colour in ("blue", "green", "purple", "orange") for shape in (*shapes, "star")]
    sentences.write_text("".join(kept + gone))
    run(*again)
    sentences.write_text("".join(kept))
    assert fails(*again).startswith(f"16 of 25 indexed captions are no longer in {sentences}; is a disk not mounted?")
    assert "9 captions: 0 added, 16 removed" in run(*again, "--prune").stderr
    assert not [path for path in (index / "captions").iterdir() if b"blue star" in path.read_bytes()]


def test_queries_are_refused_in_one_line_and_never_read_without_end(fails, run_dir, tmp_path):
    search = ("search", "--run", run_dir, "--device", "cpu")
    queries = tmp_path / "q.txt"
    assert fails(*search, "--queries", "/dev/zero") == "/dev/zero is a device; a regular file is needed"
    os.mkfifo(tmp_path / "fifo")
    assert fails(*search, "--queries", tmp_path / "fifo") == f"{tmp_path}/fifo is a FIFO; a regular file is needed"
    assert fails(*search, "--queries", tmp_path / "none") == f"{tmp_path}/none: No such file or directory"
    queries.write_text("a red circle\n" + "x" * 10_001 + "\n")
    assert fails(*search, "--queries", queries) == (
        f"{queries}, line 2 has more than 10,000 characters; write one query a line"
    )
    message = fails(*search, "--query", "\udcff")
    assert message == ("the query '\\udcff' holds bytes that are no UTF-8; write it in UTF-8, or use another terminal")
    result = CliRunner().invoke(cli, [*map(str, search), "--queries", "-"], input=b"a circle\ncaf\xe9\n")
    assert (result.exit_code, result.stderr) == (
        1, "error: stdin is not UTF-8; convert it, for example with iconv\n"
    )  # fmt: skip


def test_a_long_list_of_queries_is_printed_in_order_and_as_one_document(run, run_dir, tmp_path):
    queries, cpu = tmp_path / "q.txt", ("--top-k", 2, "--device", "cpu")
    asked = [f"a red circle {number}\u2028" for number in range(600)]
    queries.write_text("\ufeff" + "\r\n".join(f"{query}x" for query in asked), encoding="utf-8")
    many = ("search", "--run", run_dir, "--queries", queries, *cpu)
    text = run(*many, "--json").stdout
    results = json.loads(text)
    assert [result["query"] for result in results] == [f"{query}x" for query in asked]
    assert text == json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    lines = run(*many, "--format", "jsonl").stdout
    assert lines == "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    one = run("search", "--run", run_dir, "--query", "a red circle", *cpu, "--json").stdout
    assert one == json.dumps(json.loads(one), indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(("encoding", "styles"), [("cp1252", ["jsonl"]), ("ascii", ["text"])])
def test_trap_a_terminal_that_is_not_utf8_shows_what_it_can(run_dir, tmp_path, encoding, styles):
    queries = tmp_path / "q.txt"
    queries.write_text("Ein Hund springt \u2192 \u72d7 \U0001f415\n", encoding="utf-8")
    for style in styles:
        call = ["search", "--run", str(run_dir), "--queries", str(queries), "--format", style, "--device", "cpu"]
        done = CliRunner(charset=encoding).invoke(cli, call)  # test_search has a process with such a terminal
        assert done.exit_code == 0, done.stderr
        assert b"Ein Hund springt" in done.stdout_bytes
        assert b"Traceback" not in done.stderr_bytes
        if style == "jsonl":
            assert json.loads(done.stdout_bytes)["query"] == queries.read_text(encoding="utf-8").strip()


def test_thumbnails_are_read_for_a_drawing_alone(run, run_dir, tmp_path, monkeypatch):
    from onceover.extract.store import Column

    monkeypatch.setattr(Column, "__getitem__", lambda self, row: pytest.fail("a thumbnail was read"))
    run("search", "--run", run_dir, "--query", "a red circle", "--device", "cpu")


def from_shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """What a shell makes of a command line in which {} stands for this program."""
    program = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'cli.py'))}"
    variables = os.environ | environment
    return subprocess.run(
        ["bash", "-c", line.replace("{}", program)], capture_output=True, cwd=folder, env=variables, timeout=120
    )


@pytest.mark.parametrize(
    ("line", "code", "expected"),
    [
        ("{} --help > /dev/full", 1, "error: the output cannot be printed: No space left on device"),
        ("{} --help >&-", 1, "error: the output cannot be printed: Bad file descriptor"),
        ("{} fit --store none.h5 --run r 2>&-", 1, ""),
        ("{} search --run r --queries - <&-", 1, "error: stdin holds no queries; write one a line"),
        ("{} plot --store s.h5 --out ''", 2, "Invalid value for '--out': an empty path; name a file or a folder"),
        (
            "{} fit --store $'\\xff.h5' --run r",
            2,
            "is not UTF-8, and names are written into files as UTF-8; rename it",
        ),
        (
            "ln -s loop loop; {} index --run r --images loop",
            2,
            "Error: Invalid value for '--images': 'loop' is a link that leads back to itself",
        ),
        (
            "ln -s none dangling; {} fit --store s.h5 --run dangling",
            2,
            "Error: Invalid value for '--run': 'dangling' is a link that leads nowhere",
        ),
        ("{} search --run r --query x --with y --weight nan", 2, "'nan' is no number from 0 to 1"),
        ("{} sweep --store s.h5 --out s --grid model.temperature=1 --seeds 1000000000", 2, "1<=x<=1000"),
    ],
)
def test_trap_closed_streams_and_odd_paths_end_in_a_line(line, code, expected, tmp_path):
    made = from_shell(line, tmp_path)
    stderr = made.stderr.decode(errors="replace")
    assert made.returncode == code, stderr
    assert expected in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "r").exists()


def test_a_query_is_utf8_where_python_takes_it_for_something_else():
    assert text_of("h\udcc3\udca9") == "h\u00e9"
    assert text_of("h\u00e9") == "h\u00e9"
    assert text_of("\udcff") == "\udcff"


def test_run_folders_by_the_names_of_folders(store_file, tmp_path, monkeypatch, run):
    """``.`` is the folder itself, and leaves no lock with a strange name."""
    (tmp_path / "r").mkdir()
    monkeypatch.chdir(tmp_path / "r")
    short = ("--set", "training.num_epochs=1", "--set", "training.refit=false", "--set", "model.embedding_dim=8")
    run("fit", "--store", store_file, "--run", ".", *short)
    assert (tmp_path / "r/run.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == ".") == [".r.lock"]


def test_a_strangers_file_for_the_result_of_compare_is_refused_before_anything_is_read(fails, tmp_path):
    (tmp_path / "mine.json").write_text("[]")
    message = fails("compare", tmp_path / "a", tmp_path / "b", "--json", tmp_path / "mine.json")
    assert message.endswith("was not written by this program, and is left as it is; name a new file")


@pytest.mark.parametrize("name", ["best", "best.yaml", "configs/best.yaml"])
def test_settings_that_come_with_the_program_are_found_by_name(run, fails, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "there is no feature store at s.h5" in fails("fit", "--store", "s.h5", "--run", "r", "--config", name)
    missing = fails("fit", "--store", "s.h5", "--run", "r", "--config", "elsewhere/best.yaml", code=2)
    assert "elsewhere/best.yaml" in missing


def test_the_command_after_a_preview_repeats_how_to_read_the_dataset(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a b.jpg").write_bytes(b"x")
    (tmp_path / "t.csv").write_text("one,two,three,part\na b.jpg,A dog runs .,A dog .,train\n")
    options = ["--image-column", "one", "--caption-column", "two", "--caption-column", "three"]
    options += ["--split-column", "part", "--images-root", str(tmp_path / "pictures")]
    options += ["--caption-template", "a photo of a {}", "--exclude", "c*.jpg", "--exclude", "d.jpg"]
    shown = run("info", "--data", tmp_path / "t.csv", *options)
    following = shown.stderr.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(following) == [
        *("onceover", "extract", "--data", str(tmp_path / "t.csv")),
        *(*options, "--store", "store.h5"),
    ]
