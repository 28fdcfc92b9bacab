"""The contract of figures, over all that are registered, and a figure of another package."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import warnings

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from test_plots import TABLE

from onceover.analysis import drawing
from onceover.analysis.drawing import STYLE, draw_all
from onceover.analysis.figures import FIGURES, SOURCES, drawings_of, plot_run, plot_sweep
from onceover.analysis.sources import PlotError, StoreFiles, read_run, read_sweep
from onceover.base.registry import RegistryError
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("low_resolution")


@pytest.fixture(scope="module")
def evaluated(run_dir, store_file, tmp_path_factory):
    """A copy of the run with an evaluation of its test split."""
    from onceover.extract.store import FeatureStore

    folder = shutil.copytree(run_dir, tmp_path_factory.mktemp("evaluated") / "run")
    with FeatureStore(store_file) as opened:
        result = evaluate(read_embeddings(folder / "embeddings.h5"), opened)
    (folder / "evaluation-test.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def sources(evaluated, store, tmp_path):
    """Stored files of each kind."""
    (tmp_path / "results.csv").write_text(TABLE)
    return {"run": read_run(evaluated), "store": StoreFiles(store, 2**30), "sweep": read_sweep(tmp_path)}


def check_labels(figure):
    """Checks that every panel says what it shows, and the figure how many images or rows of what."""
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel() or axes.get_title()
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any(re.search(r"\d.* (images|rows|queries)|images", text) for text in texts)


def check_legends(figure):
    """Checks that no legend lies over a line or a point, or beyond the others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        figure.draw_without_rendering()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    boxes = [legend.get_window_extent() for legend in legends if legend is not None]
    for box in boxes:
        assert not any(box.overlaps(other) for other in boxes if other is not box)
        for axes in figure.axes:
            shared = Bbox.intersection(box, axes.bbox)
            if shared is None:
                continue
            for line in axes.lines:
                path = line.get_path().transformed(line.get_transform())
                assert not path.intersects_bbox(shared, filled=False), (axes.get_title(), line.get_label())
            for points in axes.collections:
                places = points.get_offset_transform().transform(points.get_offsets())
                assert not any(shared.contains(*place) for place in places), (axes.get_title(), points.get_label())


def check_contract(figure, sources, folder, told):
    """Checks that a figure is drawn from stored files in three formats, the same each time, labelled and not empty.

    That the formats are the same when their drawing is, is checked once, for all figures.
    """
    assert figure.SOURCE in SOURCES
    assert isinstance(figure.ORDER, int)
    drawings = figure.drawings(sources[figure.SOURCE])
    assert drawings
    for name, draw in drawings.items():
        assert name.replace("-", "_").isidentifier()
        with matplotlib.rc_context(STYLE):
            drawn = draw()
        assert isinstance(drawn, Figure)
        check_labels(drawn)
        check_legends(drawn)
    before = {path: path.stat().st_mtime_ns for path in sources["run"].folder.iterdir()}
    told.clear()
    written = draw_all(drawings, folder / "first")
    assert told == [f"drawing {name}" for name in drawings]
    expected = {f"{name}{suffix}" for name in drawings for suffix in (".png", ".svg", ".pdf")}
    assert {path.name for path in written} == expected
    assert {path.name for path in (folder / "first").iterdir() if not path.name.startswith(".")} == expected
    assert {path: path.stat().st_mtime_ns for path in sources["run"].folder.iterdir()} == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "SUFFIXES", (".png", ".svg"))
        for path in draw_all(figure.drawings(sources[figure.SOURCE]), folder / "second"):
            assert path.read_bytes() == (folder / "first" / path.name).read_bytes()
    for path in written:
        if path.suffix == ".pdf":
            assert b"/CIDFontType2" in path.read_bytes()  # TrueType
            assert b"CreationDate" not in path.read_bytes()
        elif path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 100
                assert len(image.convert("L").getcolors(2**20)) > 10


def test_the_check_of_legends_sees_one_over_a_line_or_a_point():
    for draw in (lambda axes: axes.plot([0, 1], [0, 1], label="a"), lambda axes: axes.scatter([0.5], [0.5], label="a")):
        for anchor, is_over in (((0.5, 0.5), True), ((0.5, -0.3), False)):
            figure = Figure()
            axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1))
            draw(axes)
            axes.legend(loc="center", bbox_to_anchor=anchor)
            with pytest.raises(AssertionError) if is_over else contextlib.nullcontext():
                check_legends(figure)


@pytest.mark.parametrize("name", FIGURES.names())
def test_a_registered_figure_keeps_the_contract(sources, tmp_path, name, told):
    check_contract(FIGURES.load(name), sources, tmp_path, told)


def test_a_figure_has_the_same_bytes_in_each_format_each_time(sources, tmp_path):
    figure = FIGURES.load("ranks")
    for folder in ("first", "second"):
        draw_all(figure.drawings(sources["run"]), tmp_path / folder)
    for suffix in (".png", ".svg", ".pdf"):
        first, second = (tmp_path / folder / f"ranks{suffix}" for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_the_orders_of_a_sources_figures_differ():
    orders = [(FIGURES.load(name).SOURCE, FIGURES.load(name).ORDER) for name in FIGURES.names()]
    assert len(set(orders)) == len(orders)


def test_all_figures_of_a_source_are_drawn_in_their_order(sources):
    assert list(drawings_of("run", sources["run"])) == [
        "tsne",
        "pca",
        "similarity",
        "similarity-ordered",
        "training",
        "ranks",
        "models",
    ]
    assert list(drawings_of("store", sources["store"])) == ["features"]
    assert list(drawings_of("sweep", sources["sweep"])) == ["heatmap-temperature-head", "curves", "parallel"]


def test_a_sweep_of_one_setting_has_nothing_to_draw(tmp_path):
    (tmp_path / "results.csv").write_text("\n".join(TABLE.splitlines()[:2]))
    assert plot_sweep(tmp_path, tmp_path / "figures") == []


def test_figures_load_no_model():
    names = ("torch", "transformers", "faiss")
    script = (
        "import sys\n"
        "from onceover.analysis.figures import FIGURES\n"
        "print(len(list(map(FIGURES.load, FIGURES.names()))))\n"
        f"print(sorted(set({names}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == f"{len(FIGURES.names())}\n[]\n", done.stderr


NORMS = """
import numpy as np
from matplotlib.figure import Figure

SOURCE = "run"
ORDER = 45

def drawings(source):
    return {"norms": lambda: draw_norms(source)}

def draw_norms(run):
    vectors = run.embeddings.vectors_of(run.split)
    figure = Figure()
    axes = figure.add_subplot()
    axes.hist(np.abs(vectors.images).sum(1), label="images")
    axes.hist(np.abs(vectors.texts).sum(1), label="captions")
    axes.legend()
    axes.set(xlabel="sum of absolute coordinates", ylabel="items", title=run.split)
    return figure
"""


def test_another_package_adds_a_figure_that_keeps_the_contract_and_is_drawn_by_plot(
    outside, run, evaluated, sources, tmp_path, told, monkeypatch
):
    outside("onceover.figures", "norms", NORMS)
    assert "norms" in FIGURES.names()
    check_contract(FIGURES.load("norms"), sources, tmp_path / "contract", told)
    names = list(drawings_of("run", sources["run"]))
    assert names == ["tsne", "pca", "similarity", "similarity-ordered", "training", "ranks", "norms", "models"]
    monkeypatch.setattr(drawing, "SUFFIXES", (".svg",))
    said = run("plot", "--run", evaluated, "--out", tmp_path / "figures").stderr
    assert "drawing norms" in said
    assert (tmp_path / "figures/norms.svg").stat().st_size > 500


def test_another_package_cannot_draw_over_a_figure_of_ours(outside, run_dir, tmp_path):
    outside("onceover.figures", "other", NORMS.replace('"norms"', '"ranks"'))
    with pytest.raises(PlotError, match="the figure 'other' draws 'ranks', which another figure draws; rename it"):
        plot_run(run_dir, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_a_broken_figure_of_another_package_is_named_and_nothing_is_drawn(outside, run_dir, tmp_path):
    outside("onceover.figures", "broken", "import no_such_module_at_all")
    with pytest.raises(RegistryError, match="the figure 'broken' of the package outside-0 cannot be imported"):
        plot_run(run_dir, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
