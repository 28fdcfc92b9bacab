"""No file of somebody else's is ever removed or changed: each command that writes, where such files lie already."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

#: names that this program gives to files of its own, or nearly so, and names that people give to theirs
NAMES = (
    "2024-01.jpg",
    "config.yaml",
    "evaluation-test.md",
    "evaluation-mine.json",
    "errors-test.html",
    "results.csv",
    "best.yaml",
    "tsne.png",
    "pca.svg",
    "captions.csv",
    "images/2024.txt",
    "images/000001.h5",
    "captions/0.txt",
    "figures/pca.png",
    "tokenizer/mine.txt",
    "encoders/image/notes.txt",
    "activations/notes.h5",
    "s.h5.parts/image-1.h5",
    "s.h5.evaluation-test.md",
    "Flickr8k.token.txt",
)
EXTRACTION = ("--device", "cpu", "--set", "extract.text_layers=last", "--set", "extract.views=1")
FIT = ("--set", "training.num_epochs=1", "--set", "model.embedding_dim=8", "--set", "training.refit=false")


@pytest.fixture
def parts(drawn, store_file, run_dir, extract_config, tmp_path):
    """Arguments by name for the commands below."""
    np.save(tmp_path / "i.npy", np.ones((2, 3), np.float32) * [[1], [2]])
    np.save(tmp_path / "t.npy", np.ones((2, 3), np.float32) * [[3], [4]])
    (tmp_path / "table.csv").write_text("image,caption,split\na.jpg,one,train\nb.jpg,two,dev\n")
    other = shutil.copytree(run_dir, tmp_path / "other")
    encoders = {"image": extract_config.image_encoder, "text": extract_config.text_encoder}
    return {"data": drawn, "store": store_file, "run": run_dir, "other": other, "tmp": tmp_path, **encoders}


def command_of(name: str, target: Path, parts: dict) -> tuple:
    """A command line that writes to ``target`` or into it."""
    encoders = ("--image-encoder", parts["image"], "--text-encoder", parts["text"])
    features = ("--image-features", parts["tmp"] / "i.npy", "--text-features", parts["tmp"] / "t.npy")
    store, run = ("--store", parts["store"]), ("--run", parts["run"])
    grid = ("--grid", "model.temperature=0.05,0.1")
    return {
        "extract": ("extract", "--data", parts["data"], "--store", target / "s.h5", *encoders, *EXTRACTION),
        "import": ("import", *features, "--captions", parts["tmp"] / "table.csv", "--store", target / "s.h5"),
        "fit": ("fit", *store, "--run", target, *FIT),
        "fit --force": ("fit", *store, "--run", target, *FIT, "--force"),
        "sweep": ("sweep", *store, "--out", target, *grid, *FIT),
        "finetune": ("finetune", *run, "--data", parts["data"], *store, "--out", target, "--device", "cpu"),
        "finetune --force": ("finetune", *run, "--data", parts["data"], *store, "--out", target, "--force"),
        "ensemble": ("ensemble", parts["run"], parts["other"], "--out", target),
        "index": ("index", *run, "--index", target),
        "index --force": ("index", *run, "--index", target, "--force"),
        "plot": ("plot", *run, "--out", target),
        "plot --store": ("plot", *store, "--out", target / "figures"),
        "demo": ("demo", "--out", target),
        "download": ("download", "flickr8k", "--to", target),
        "search --out": ("search", *run, "--query", "a red circle", "--out", target / "tsne.png", "--device", "cpu"),
        "evaluate --json": ("evaluate", *run, "--json", target / "evaluation-mine.json"),
        "compare --json": ("compare", parts["run"], parts["other"], "--json", target / "evaluation-mine.json"),
    }[name]


COMMANDS = (
    *("extract", "import", "fit", "fit --force", "sweep", "finetune", "finetune --force", "ensemble", "index"),
    *("index --force", "plot", "plot --store", "demo", "download", "search --out", "evaluate --json", "compare --json"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_trap_strangers_files_are_left_as_they_are(run, parts, tmp_path, without_pdf, name):
    target = tmp_path / "mine"
    for file in NAMES:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_text(f"mine: {file}")
    code = 0 if name in ("import", "plot --store") else 1
    result = run(*command_of(name, target, parts), code=code)
    assert {file: (target / file).read_text() for file in NAMES} == {file: f"mine: {file}" for file in NAMES}
    if code:
        assert result.stderr.splitlines()[-1].startswith("error: "), result.stderr


def test_trap_an_evaluation_replaces_no_file_of_somebody_elses(run, fails, run_dir, store_file, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    (folder / "evaluation-test.md").write_text("mine")
    message = fails("evaluate", "--run", folder)
    assert message == (
        f"{folder / 'evaluation-test.md'} was not written by this program, and is left as it is; "
        "move it elsewhere and evaluate again"
    )
    (folder / "evaluation-test.md").unlink()
    run("evaluate", "--run", folder)
    run("evaluate", "--run", folder)
    (folder / "evaluation-test.md").write_text("changed")
    assert "was changed since it was written, and is left as it is" in fails("evaluate", "--run", folder)
    store = shutil.copy(store_file, tmp_path / "s.h5")
    beside = tmp_path / "s.h5.evaluation-test.csv"
    beside.write_text("mine")
    result = run("evaluate", "--store", store, code=1)
    assert f"{beside} was not written by this program" in result.stderr
    assert beside.read_text() == "mine"


@pytest.mark.parametrize("name", ["run.json", "evaluation-test.json", ".onceover.json", "config.yaml", "embeddings.h5"])
def test_a_result_in_json_replaces_no_other_file_of_a_run(run, run_dir, tmp_path, name):
    """Nor does it replace what this program wrote, unless that is such a result."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    run("evaluate", "--run", folder)
    before = (folder / name).read_bytes()
    refused = run("evaluate", "--run", folder, "--json", folder / name, code=1).stderr
    assert "is left as it is; name a new file" in refused
    assert (folder / name).read_bytes() == before
    for _ in range(2):  # its own result it replaces
        run("evaluate", "--run", folder, "--json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["format"] == "onceover result"
