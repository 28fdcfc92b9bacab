"""Figures: drawn from stored files alone, complete, labelled with gallery sizes, and refused with a reason."""

import dataclasses
import itertools
import json
import logging
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from onceover.analysis import drawing
from onceover.analysis.drawing import STYLE, draw_all, label_of, places_of, save_figure, spaced, wrapped_key
from onceover.analysis.figures import drawings_of, embedding_map, features, heat_map, plot_run, plot_store
from onceover.analysis.figures.curves import draw_curves
from onceover.analysis.figures.embedding_map import draw_map
from onceover.analysis.figures.features import draw_features
from onceover.analysis.figures.heat_map import draw_heat_map
from onceover.analysis.figures.parallel import draw_parallel
from onceover.analysis.figures.ranks import draw_ranks
from onceover.analysis.figures.similarity import MAX_IMAGES, draw_similarity
from onceover.analysis.figures.similarity_ordered import draw_ordered_similarity, telling_words
from onceover.analysis.figures.training import draw_training
from onceover.analysis.hits import draw_hits, plot_hits
from onceover.analysis.sources import (
    PlotError,
    RunFiles,
    check_evaluation,
    read_evaluation,
    read_run,
    read_sweep,
)
from onceover.base.errors import OnceoverError
from onceover.base.outputs import OutputError
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.evaluation import evaluate
from onceover.retrieval.ranks import rank
from onceover.retrieval.search import Query, Searcher, Term

ROOT = Path(__file__).resolve().parent.parent
TSNE = embedding_map.tsne
pytestmark = pytest.mark.usefixtures("low_resolution")

RED = Query((Term(text="a red circle"),))


def search(embeddings, kind, top_k):
    """Hits of the fourth caption's own embedding."""
    embedder = types.SimpleNamespace(space=embeddings.space, embed_texts=lambda queries: embeddings.texts[[3]])
    return Searcher(embeddings.gallery(kind), embedder).search("a red circle", top_k)


@pytest.fixture
def embeddings(run_dir):
    return read_embeddings(run_dir / "embeddings.h5")


@pytest.fixture
def files(run_dir, embeddings):
    """A run's files, with a split to be drawn."""
    return lambda split, of=embeddings: RunFiles(run_dir, of, split)


def texts(figure):
    return " ".join(axes.get_title() + axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)


def test_a_run_gives_six_figures_as_png_svg_and_pdf(run_dir, tmp_path, told):
    written = plot_run(run_dir, tmp_path / "figures")
    steps = ["tsne", "pca", "similarity", "similarity-ordered", "training", "ranks"]
    assert told[:-1] == [f"drawing {name}" for name in steps]
    assert told[-1] == f"not drawn: models: {run_dir} has no evaluation-test.json; evaluate --split test makes it"
    assert sorted(path.name for path in written) == sorted(
        f"{step}{suffix}" for step in steps for suffix in (".png", ".svg", ".pdf")
    )
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 150
                assert np.asarray(picture.convert("L")).std() > 5  # not an empty page
        elif path.suffix == ".svg":
            assert path.read_text().startswith("<?xml")
            assert "mathdefault" not in path.read_text()  # tick labels are numbers, not markup


def test_the_coordinates_of_the_map_are_kept_with_the_run_and_used_again(run_dir, tmp_path, monkeypatch, told):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    first = draw_map(read_run(folder), "t-SNE")
    file = folder / "map-test-12.npz"
    content = file.read_bytes()
    computed = []
    monkeypatch.setattr(embedding_map, "tsne", lambda vectors, seed: computed.append(seed) or TSNE(vectors, seed))
    again = draw_map(read_run(folder), "t-SNE")
    assert computed == []
    for before, after in zip(first.axes[0].collections, again.axes[0].collections, strict=True):
        np.testing.assert_array_equal(before.get_offsets(), after.get_offsets())
    draw_map(read_run(folder, seed=1), "t-SNE")  # other coordinates take their place
    draw_map(read_run(folder), "t-SNE")
    assert computed == [1, 0]
    assert file.read_bytes() == content
    assert told == []
    file.write_bytes(content[:-50])
    draw_map(read_run(folder), "t-SNE")
    assert computed == [1, 0, 0]
    assert told[0].startswith(f"{file} is damaged, and is computed again: ")
    assert file.read_bytes() == content


@pytest.mark.parametrize("is_replaced", [False, True])
def test_trap_a_strangers_file_with_the_name_of_the_coordinates_stays(run_dir, tmp_path, told, is_replaced):
    folder = shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("map-*", ".onceover.json"))
    if is_replaced:
        draw_map(read_run(folder), "t-SNE")
    (folder / "map-test-12.npz").write_bytes(b"mine")
    draw_map(read_run(folder), "t-SNE")
    if is_replaced:
        assert (folder / "map-test-12.npz.1.old").read_bytes() == b"mine"
        assert told[-1].endswith("what it held is kept as map-test-12.npz.1.old")
    else:
        assert (folder / "map-test-12.npz").read_bytes() == b"mine"
        assert "is left as it is" in told[-1]


def test_a_strangers_file_stops_no_figures_but_its_own(tmp_path, told):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/models.png").write_bytes(b"mine")
    draw_all({"models": "there is no evaluation", "ranks": Figure}, tmp_path / "figures")
    assert told == ["not drawn: models: there is no evaluation", "drawing ranks"]
    assert (tmp_path / "figures/models.png").read_bytes() == b"mine"
    assert (tmp_path / "figures/ranks.png").exists()


@pytest.mark.parametrize("method", ["t-SNE", "PCA"])
def test_a_map_shows_both_kinds_and_links_matched_pairs(files, method):
    figure = draw_map(files("train"), method)
    assert "train: 36 of 36 images" in texts(figure)
    links, *points = figure.axes[0].collections
    assert [len(part.get_offsets()) for part in points] == [36, 36]
    assert len(links.get_segments()) == 36
    pictures, captions = (part.get_offsets() for part in points)
    for start, end in links.get_segments():
        row = np.flatnonzero((pictures == start).all(1))[0]
        np.testing.assert_array_equal(captions[row], end)


def test_the_similarity_matrix_holds_the_matched_pairs_on_its_diagonal(files, embeddings):
    figure = draw_similarity(files("test"))
    matrix = figure.axes[0].images[0].get_array()
    pictures, captions, _ = files("test").sample_pairs(MAX_IMAGES)
    assert (embeddings.image_index[captions] == pictures).all()
    np.testing.assert_allclose(
        np.diag(matrix), np.sum(embeddings.images[pictures] * embeddings.texts[captions], 1), rtol=1e-4
    )


def test_both_matrices_of_similarity_have_one_scale_with_0_in_its_middle(files):
    scales = [draw(files("train")).axes[0].images[0] for draw in (draw_similarity, draw_ordered_similarity)]
    assert scales[0].get_clim() == scales[1].get_clim()
    for matrix in scales:
        low, high = matrix.get_clim()
        assert low == -high
        assert np.abs(matrix.get_array()).max() <= high


def test_no_two_groups_have_the_same_word():
    captions = ["a dog runs"] * 6 + ["a dog swims"] * 6 + ["snow"] * 12
    named = telling_words(captions, np.repeat([0, 1, 2], [6, 6, 12]))
    assert named == {0: "runs", 1: "swims", 2: "snow"}
    assert len(telling_words(["a dog runs"] * 12 + ["snow"] * 6, np.repeat([0, 1, 2], 6))) == 3


def test_rank_curves_end_at_100_and_name_the_gallery(files):
    figure = draw_ranks(files("test"))
    assert "gallery of 60" in texts(figure)
    assert "gallery of 12" in texts(figure)
    for axes in figure.axes:
        model, guess = axes.lines[:2]
        assert model.get_ydata()[-1] == guess.get_ydata()[-1] == pytest.approx(100)
        assert (np.diff(model.get_ydata()) >= 0).all()


def test_a_run_that_searches_with_a_correction_is_drawn_with_it_and_says_so(files, embeddings):
    generator = np.random.default_rng(0)
    corrected = dataclasses.replace(
        embeddings,
        rerank="qbnorm",
        image_bias=generator.normal(size=len(embeddings.ids)).astype(np.float32),
        text_bias=generator.normal(size=len(embeddings.captions)).astype(np.float32),
    )
    pictures, captions, index = embeddings.split("test")
    found = rank(embeddings.images[pictures], embeddings.texts[captions], index, **corrected.biases(split="test"))
    for axes, ranks in zip(draw_ranks(files("test", corrected)).axes, found, strict=True):
        assert axes.lines[0].get_label() == "multimodal_qbnorm"
        assert axes.lines[0].get_ydata()[0] == pytest.approx(100 * ranks.hit_at(1).mean())
    assert draw_ranks(files("test")).axes[0].lines[0].get_label() == "multimodal"


def test_training_curves_have_a_point_for_each_epoch(run_dir, tmp_path):
    figure = draw_training(run_dir)
    rows = len((run_dir / "history.csv").read_text().splitlines()) - 1
    assert len(figure.axes[0].lines[0].get_xdata()) == rows
    assert "Recall on dev: 12 images and their captions" in texts(figure)
    best = json.loads((run_dir / "run.json").read_text())["best_epochs"][0]
    assert f"epoch (dashed: {best}, that of the highest rsum)" in texts(figure)
    shutil.copy(run_dir / "run.json", tmp_path)
    with pytest.raises(PlotError, match="missing or damaged"):
        draw_training(tmp_path)
    (tmp_path / "history.csv").write_text("epoch,loss\n1,x\n")
    with pytest.raises(PlotError, match="missing or damaged"):
        draw_training(tmp_path)


def test_a_store_is_drawn_by_split(store, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "SUFFIXES", (".svg",))
    assert [path.name for path in plot_store(store, tmp_path)] == ["features.svg"]


@pytest.mark.parametrize(("kind", "title"), [("image", "PCA of image features"), ("text", "PCA of caption features")])
def test_a_store_of_one_kind_is_drawn_without_the_other(store, monkeypatch, kind, title):
    other = "text" if kind == "image" else "image"
    monkeypatch.setitem(store.recipes, other, {})
    if kind == "image":
        store.captions, store.image_index = [], np.empty(0, int)
    else:
        store.image_splits, store.image_index = [], np.full(len(store.captions), -1)
    figure = draw_features(store, 2**30)
    assert len(figure.axes) == 2
    assert title in figure.axes[0].get_title()
    monkeypatch.setitem(store.recipes, kind, {})
    with pytest.raises(PlotError, match="no two images or captions with features"):
        draw_features(store, 2**30)


def test_hits_are_drawn_and_one_without_an_image_leaves_its_cell_empty(embeddings, drawn):
    hits = search(embeddings, "image", 7)
    images = [Image.open(drawn / hit.path) for hit in hits[:6]]
    hits[1] = dataclasses.replace(hits[1], captions=["word " * 40])
    figure = draw_hits(hits, RED, "image", [*images, None], "60 images of runs/first")
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 6
    assert np.array_equal(shown[0].images[0].get_array(), np.asarray(images[0]))
    assert shown[1].texts[0].get_text().splitlines()[-1].endswith(" …")
    assert figure.axes[6].texts[0].get_text().replace("\n", " ") == f"no image of {hits[6].id}"
    assert figure.get_supxlabel() == "60 images of runs/first"
    for query in (Query((Term(image=str(drawn / "query.jpg")),)), RED):
        captions = draw_hits(search(embeddings, "text", 5), query, "text")
        assert {text.get_position()[0] for text in captions.axes[-1].texts} == {0, 0.06, 0.16}


def test_a_long_query_is_cut_in_the_title(embeddings):
    query = Query((Term(text="word " * 2000),))
    title = draw_hits([], query, "image").get_suptitle()
    assert len(title.splitlines()) == 3
    assert title.endswith(" …")


def test_a_format_that_cannot_be_written_and_a_folder_in_the_way(tmp_path):
    for name in ("a.xyz", "a.pgf", "a.eps", "a.jpg", "a"):
        with pytest.raises(PlotError, match=r"names no image format; use \.png, \.svg or \.pdf"):
            save_figure(Figure(), tmp_path / name)
    for name in ("a.png", "a.svg", "a.PDF"):
        assert save_figure(Figure(), tmp_path / name).stat().st_size > 500
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OutputError, match="was not written by this program, and is left as it is; name another file"):
        save_figure(Figure(), tmp_path / "b.png")


def test_trap_a_strangers_image_is_never_drawn_over_and_nothing_is_drawn_then(fails, run, run_dir, tmp_path):
    out, drawing = tmp_path / "figures", tmp_path / "hits.png"
    out.mkdir()
    (out / "ranks.svg").write_text("mine")
    drawing.write_text("mine")
    message = fails("plot", "--run", run_dir, "--out", out)
    assert message == (
        f"{out}/ranks.svg was not written by this program, and is left as it is; name another folder for the figures"
    )
    search = ("search", "--run", run_dir, "--query", "a red circle", "--device", "cpu", "--out")
    assert fails(*search, drawing) == (
        f"{drawing} was not written by this program, and is left as it is; name another file for the figure"
    )
    assert (drawing.read_text(), (out / "ranks.svg").read_text()) == ("mine", "mine")
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == ["ranks.svg"]
    assert fails(*search, tmp_path / "x.pgf") == f"{tmp_path}/x.pgf names no image format; use .png, .svg or .pdf"
    (out / "ranks.svg").unlink()
    draw_all({"ranks": Figure}, out)
    first = (out / "ranks.png").stat().st_mtime_ns
    draw_all({"ranks": Figure}, out)  # what is our own is drawn anew
    assert (out / "ranks.png").stat().st_mtime_ns > first
    run(*search, tmp_path / "own.svg")
    run(*search, tmp_path / "own.svg")
    (tmp_path / "own.svg").write_text("edited")
    assert "own.svg was changed since it was written, and is left as it is" in fails(*search, tmp_path / "own.svg")


def flipped(data, seed):
    generator = np.random.default_rng(seed)
    changed = bytearray(data)
    for place in generator.integers(len(data), size=1 + seed % 3):
        changed[place] ^= 1 << int(generator.integers(8))
    return bytes(changed)


TABLE = """model.temperature,model.head,outcome,split,seeds,rsum,i2t_R@1,i2t_R@1_sd,t2i_R@1,pictures,captions
0.03,linear,finished,dev,1,300.5,20.5,1.5,18.25,12,60
0.07,mlp,dropped,dev,1,250.5,10.5,,8.25,12,60
0.03,mlp,diverged,dev,1,,,,,,
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("20.5", "2x.5"), ("20.5", "nan"), ("20.5", "1e9"), ("20.5", ""), ("finished", "finixhed"), ("12,60", ","),
        ("12,60", "-12,60"), ("dev", ""), ("outcome", "outcom"), ("0.07,mlp", "0.07"), ("mlp,dropped", "mlp,x,dropped"),
        ("finished", "diverged"), ("0.03", "\udcff"), (TABLE, ""), (TABLE, TABLE.splitlines()[0]), ("300.5", "inf"),
        ("0.03,linear,", '"' + "x" * 200_000 + '",linear,'),
    ],
    ids=range(17),
)  # fmt: skip
def test_trap_a_damaged_table_of_a_sweep_is_one_line(fails, tmp_path, old, new):
    (tmp_path / "results.csv").write_text(TABLE.replace(old, new, 1), "utf-8", "surrogateescape")
    message = fails("plot", "--sweep", tmp_path, "--out", tmp_path / "f")
    assert message == (f"{tmp_path}/results.csv is missing or damaged; run the sweep again, which fits nothing anew")


def test_whatever_is_flipped_in_a_table_is_drawn_or_one_line(tmp_path):
    path = tmp_path / "results.csv"
    for seed in range(300):
        path.write_bytes(flipped(TABLE.encode(), seed))
        try:
            table = read_sweep(tmp_path)
        except PlotError as error:
            assert len(str(error).splitlines()) == 1
            continue
        if seed % 20 == 0 and table.keys:
            for draw in (draw_curves, draw_parallel):
                draw(table, table.keys).canvas.draw()


def test_whatever_is_flipped_in_a_history_or_a_record_is_drawn_or_one_line(run_dir, tmp_path):
    for name in ("history.csv", "run.json"):
        shutil.copy(run_dir / "history.csv", tmp_path)
        shutil.copy(run_dir / "run.json", tmp_path)
        for seed in range(60):
            (tmp_path / name).write_bytes(flipped((run_dir / name).read_bytes(), seed))
            try:
                draw_training(tmp_path)
            except OnceoverError as error:
                assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"split": 3}, {"models": {}}, {"models": []}, {"models": {"x": 3}}, {"models": {"x": {"image_to_text": []}}},
        {"R@5": "20"}, {"R@5": None}, {"R@5_ci": [1]}, {"R@5_ci": [1, "2"]}, {"R@5": 1e300}, {"queries": "12"},
    ],
    ids=str,
)  # fmt: skip
def test_trap_a_damaged_evaluation_is_one_line(tmp_path, change):
    side = {"queries": 12, "gallery": 60} | {f"R@{k}": 20.0 for k in (1, 5, 10)}
    good = {"split": "test", "models": {"x": {"image_to_text": side, "text_to_image": dict(side)}}}
    check_evaluation(good)
    for key, value in change.items():
        (good if key in good else side)[key] = value
    (tmp_path / "evaluation-test.json").write_text(json.dumps(good))
    with pytest.raises(PlotError) as error:
        read_evaluation(tmp_path / "evaluation-test.json", "any")
    assert str(error.value) == (f"{tmp_path}/evaluation-test.json is damaged, or of another version; evaluate again")


def test_plotting_loads_no_model(run_dir):
    script = (
        f"import sys; from onceover.analysis import figures\n"
        "from onceover.analysis.sources import read_run\n"
        f"drawings = figures.drawings_of('run', read_run({str(run_dir)!r}))\n"
        "print(*(name for name, draw in drawings.items() if callable(draw) and draw()))\n"
        "print(sorted({'torch', 'transformers', 'faiss'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "tsne pca similarity similarity-ordered training ranks\n[]\n", done.stderr


def test_dollar_signs_are_drawn_as_they_are(embeddings, drawn, tmp_path):
    hits = [dataclasses.replace(hit, captions=[r"a $5__x and $6 {"]) for hit in search(embeddings, "image", 2)]
    query = Query((Term(text=r"a $\foo$ b"), Term(image=str(drawn / "query.jpg"))))
    plot_hits(hits, query, "image", tmp_path / "a.png")
    plot_hits(hits, Query((Term(image=str(drawn / "query.jpg")),)), "text", tmp_path / "b.svg")
    assert "a $5__x and $6 {" in (tmp_path / "b.svg").read_text()


def test_an_evaluation_is_drawn_with_every_model_once_it_is_there(run_dir, store, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    result = evaluate(read_embeddings(folder / "embeddings.h5"), store, rerank=["csls"], folds=3)
    (folder / "evaluation-test.json").write_text(json.dumps(result))
    (folder / "evaluation-dev.json").write_text("{}")
    with pytest.raises(PlotError, match="of another version; evaluate again"):
        drawings_of("run", read_run(folder, "dev"))["models"]()
    figure = drawings_of("run", read_run(folder))["models"]()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["R@1", "R@5", "R@10"]
    assert "of image_only and text_only: the standard deviation over random maps" in legend.get_title().get_text()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    names = list(result["models"])
    names[1:3] = ["multimodal_csls\n(transductive)", "multimodal_3_folds\n(galleries of 20 and 4)"]
    assert labels == names
    assert "test: 12 queries, gallery of 60" in figure.axes[0].get_title()
    line = figure.axes[1].containers[2].lines[0]  # R@10
    np.testing.assert_allclose(line.get_xdata(), [m["text_to_image"]["R@10"] for m in result["models"].values()])


def drawn_quietly(draw):
    """A figure, and its texts, after it was drawn to its end with warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw()
        figure.draw_without_rendering()
    return figure, " ".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("method", ["t-SNE", "PCA"])
def test_trap_collapsed_embeddings_are_drawn_at_one_place_with_a_note(run_dir, embeddings, tmp_path, method):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    noise = np.random.default_rng(0).normal(0, 1e-8, embeddings.texts.shape).astype(np.float32)
    one = np.full_like(embeddings.texts, 16**-0.5) + noise  # equal but for rounding
    collapsed = dataclasses.replace(embeddings, images=one[: len(embeddings.images)], texts=one, space="collapsed")
    run = RunFiles(folder, collapsed, "test")
    figure, text = drawn_quietly(lambda: draw_map(run, method))
    assert "23 of 24 points hidden behind an equal one" in text
    places = [points.get_offsets() for points in figure.axes[0].collections[1:]]
    assert np.ptp(np.concatenate(places), axis=0).max() == 0
    assert np.isfinite(np.concatenate(places)).all()
    drawn_quietly(lambda: draw_similarity(run))
    drawn_quietly(lambda: draw_ordered_similarity(run))
    drawn_quietly(lambda: draw_ranks(run))


def test_equal_vectors_have_one_place_among_others(run_dir, embeddings, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    texts = embeddings.texts.copy()
    rows = RunFiles(folder, embeddings, "test").sample_pairs(400).captions
    texts[rows[:5]] = texts[rows[0]]
    run = RunFiles(folder, dataclasses.replace(embeddings, texts=texts, space="other"), "test")
    figure, text = drawn_quietly(lambda: draw_map(run, "t-SNE"))
    assert "4 of 24 points hidden" in text
    captions = figure.axes[0].collections[2].get_offsets()
    assert len(np.unique(captions, axis=0)) == 12 - 4
    assert np.ptp(captions[:5], axis=0).max() == 0
    assert "equal" not in drawn_quietly(lambda: draw_map(RunFiles(run_dir, embeddings, "test"), "PCA"))[1]


@pytest.mark.parametrize("count", [1, 2])
def test_a_split_of_very_few_images_is_drawn(run_dir, embeddings, tmp_path, count):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    splits = ["test"] * count + ["train"] * (len(embeddings.splits) - count)
    run = RunFiles(folder, dataclasses.replace(embeddings, splits=splits, space="few"), "test")
    matrices = (draw_similarity, draw_ordered_similarity)
    for draw in (*matrices, draw_ranks, lambda run: draw_map(run, "t-SNE"), lambda run: draw_map(run, "PCA")):
        assert f"{count}" in drawn_quietly(lambda draw=draw: draw(run))[1]


def test_features_that_are_all_equal_are_drawn_with_a_note(store, monkeypatch):
    monkeypatch.setattr(features, "_plain_features", lambda stored, rows: np.ones((len(rows), 8), np.float32))
    assert drawn_quietly(lambda: draw_features(store, 2**30))[1].count("all rows are equal") == 2


def sweep_of(folder, axes, recall=lambda number: 20.0 + number % 7):
    """A sweep's table of a grid, whose last setting diverged."""
    folder.mkdir()
    lines = [",".join([*axes, "outcome,split,rsum,i2t_R@1,t2i_R@1,pictures,captions"])]
    settings = list(itertools.product(*axes.values()))
    for number, values in enumerate(settings[:-1]):
        numbers = f"{300 - number / 100},{recall(number)},{recall(number) / 2},12,60"
        lines.append(",".join([*map(str, values), "finished,dev", numbers]))
    lines.append(",".join([*map(str, settings[-1]), "diverged,dev,,,,,"]))
    (folder / "results.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_sweep(folder)


def test_both_panels_of_a_heat_map_have_one_colour_scale_and_a_bar(tmp_path):
    table = sweep_of(tmp_path / "a", {"model.temperature": [0.03, 0.05, 0.07], "training.batch_size": [64, 128]})
    figure, text = drawn_quietly(lambda: draw_heat_map(table, *table.keys))
    left, right, bar = figure.axes
    assert left.images[0].get_clim() == right.images[0].get_clim() == (10.0, 24.0)
    assert bar.get_ylabel() == "R@1 in %"
    assert "20.0" in text
    assert "grey: diverged" in text
    assert "galleries of 12 images, 60 captions" in text
    for axes in (left, right):
        for number in axes.texts[:-1]:  # the last one is the diverged setting's dash
            light = heat_map._luminance(axes.images[0].to_rgba(float(number.get_text()))) + 0.05
            assert (light / 0.05 if number.get_color() == "black" else 1.05 / light) >= 4.5
    flat = sweep_of(tmp_path / "b", {"a": [1, 2], "b": [1, 2]}, lambda number: 0.0)
    drawn_quietly(lambda: draw_heat_map(flat, *flat.keys))


def test_a_sweep_of_fifty_values_and_long_names_stays_readable_and_says_what_is_left_out(tmp_path):
    axes = {
        "model." + "a_long_name" * 12: [f"value {number} {'x' * 150}" for number in range(50)],
        "training.learning_rate": [round(1e-4 * 1.1**number, 8) for number in range(50)],
    }
    table = sweep_of(tmp_path / "a", axes)
    for draw in (lambda: draw_heat_map(table, *table.keys), lambda: draw_curves(table, table.keys)):
        figure, text = drawn_quietly(draw)
        assert max(figure.get_size_inches()) <= 12
        assert max(map(len, text.split())) < 60
    assert (
        "too many cells for numbers, which are in results.csv"
        in drawn_quietly(lambda: draw_heat_map(table, *table.keys))[1]
    )
    figure, text = drawn_quietly(lambda: draw_parallel(table, table.keys))
    assert "rsum of the first 200 of 2,499 settings" in text
    assert len(figure.axes[0].lines) == 200 + 3


INTERVALS = "model.temperature,model.embedding_dim,outcome,split,rsum,i2t_R@1,i2t_R@1_low,i2t_R@1_high,"
INTERVALS += """t2i_R@1,t2i_R@1_low,t2i_R@1_high,pictures,captions,verdict
0.05,256,finished,dev,300.5,20.5,18.5,23,18.25,16,20,12,60,best
0.5,256,finished,dev,290.5,19.5,17.5,22,17.25,15,19,12,60,tie
0.05,128,finished,dev,250.5,10.5,8.5,13,8.25,7,9,12,60,worse
"""


def test_curves_show_intervals_what_is_held_and_the_best_setting(tmp_path):
    (tmp_path / "results.csv").write_text(INTERVALS)
    table = read_sweep(tmp_path)
    figure, text = drawn_quietly(lambda: draw_curves(table, table.keys))
    left, right = figure.axes
    assert left.get_xlabel() == "model.temperature\nat embedding_dim = 256"
    assert right.get_xlabel() == "model.embedding_dim\nat temperature = 0.05"
    assert "bars: 95 % intervals over images" in text
    bars = left.containers[0].lines[2][0].get_segments()
    assert [sorted(bar[:, 1]) for bar in bars] == [[18.5, 23.0], [17.5, 22.0]]
    rings = [line.get_xydata()[0] for line in right.lines if line.get_fillstyle() == "none"]
    assert [ring[1] for ring in rings] == [20.5, 18.25]
    assert rings[0][0] < 256 < rings[1][0]  # the directions' bars do not lie on each other
    assert rings[1][0] - rings[0][0] < 0.03 * 128
    assert "intervals" not in drawn_quietly(lambda: draw_curves(sweep_of(tmp_path / "a", {"b": [1, 2, 3]}), ["b"]))[1]


def test_parallel_lines_name_ties_and_label_the_rsum(tmp_path):
    near = INTERVALS.splitlines()[2].replace("256", "512").replace("290.5", "290.4")
    (tmp_path / "results.csv").write_text(f"{INTERVALS}{near}\n")
    table = read_sweep(tmp_path)
    figure, text = drawn_quietly(lambda: draw_parallel(table, table.keys))
    assert "thick line: the best; ring: cannot be told from the best" in text
    assert "a worse one can have a ring" in text
    (axes,) = figure.axes
    labels = {label.get_text(): label.xy[1] for label in axes.texts if label.xy[0] >= 2}
    assert labels == {str(250 + 10 * step): pytest.approx(step / 6) for step in range(7)}
    (ring,) = [line for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(ring.get_ydata(), [40.5 / 60, 40.4 / 60])
    assert ring.get_xdata()[0] < ring.get_xdata()[1]  # two of nearly one height lie beside each other
    assert places_of([0.05, 0.5]) == ([np.log(0.05), np.log(0.5)], True)
    assert places_of([128.0, 256.0]) == ([128.0, 256.0], False)
    assert places_of([1.0, "a"]) == ([0.0, 1.0], False)


def test_figures_are_fine_enough_and_as_wide_as_a_papers_text(monkeypatch, files):
    monkeypatch.undo()
    assert STYLE["savefig.dpi"] == 300
    for draw in (draw_similarity, draw_ranks, lambda run: draw_map(run, "PCA")):
        assert draw(files("test")).get_size_inches()[0] <= 7


def test_names_of_settings_are_broken_where_words_end():
    assert wrapped_key("model.temperature") == "model.temperature"
    assert wrapped_key("model.embedding_dim", 16) == "model.\nembedding_dim"
    assert wrapped_key("training." + "a_long_name_" * 12).count("\n") < 8
    assert label_of("x" * 200) == "xxxxxxxxxx…xxxxxxxxx"
    assert label_of(1e-4) == "0.0001"
    assert spaced([0, 1, 2, 3, 100], 5) == [0, 4]
    assert spaced(range(5), 5) == [0, 1, 2, 3, 4]


def test_no_library_talks_while_figures_are_saved(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_figure(Figure(), tmp_path / "a.pdf")
    assert caplog.records == []
