"""The contract of figures, over all that are registered, and a figure of another package."""

import json
import shutil
import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_plots import TABLE

from onceover.analysis.drawing import draw_all
from onceover.analysis.figures import FIGURES, SOURCES, drawings_of, plot_run, plot_sweep
from onceover.analysis.sources import PlotError, StoreFiles, read_run, read_sweep
from onceover.base.registry import RegistryError
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.evaluation import evaluate


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


def check_contract(figure, sources, folder, told):
    """Checks that a figure is drawn from stored files as PNG and SVG, the same each time, and not empty."""
    assert figure.SOURCE in SOURCES
    assert isinstance(figure.ORDER, int)
    drawings = figure.drawings(sources[figure.SOURCE])
    assert drawings
    for name, draw in drawings.items():
        assert name.replace("-", "_").isidentifier()
        assert isinstance(draw(), Figure)
    before = {path: path.stat().st_mtime_ns for path in sources["run"].folder.iterdir()}
    told.clear()
    written = draw_all(drawings, folder / "first")
    assert told == [f"drawing {name}" for name in drawings]
    expected = {f"{name}{suffix}" for name in drawings for suffix in (".png", ".svg")}
    assert {path.name for path in written} == expected
    assert {path.name for path in (folder / "first").iterdir() if not path.name.startswith(".")} == expected
    assert {path: path.stat().st_mtime_ns for path in sources["run"].folder.iterdir()} == before
    draw_all(figure.drawings(sources[figure.SOURCE]), folder / "second")
    for path in written:
        if path.suffix == ".svg":
            assert path.read_bytes() == (folder / "second" / path.name).read_bytes()
        else:
            with Image.open(path) as image:
                assert min(image.size) > 200
                assert len(image.convert("L").getcolors(2**20)) > 10


@pytest.mark.parametrize("name", FIGURES.names())
def test_a_registered_figure_keeps_the_contract(sources, tmp_path, name, told):
    check_contract(FIGURES.load(name), sources, tmp_path, told)


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
    outside, run, evaluated, sources, tmp_path, told
):
    outside("onceover.figures", "norms", NORMS)
    assert "norms" in FIGURES.names()
    check_contract(FIGURES.load("norms"), sources, tmp_path / "contract", told)
    names = list(drawings_of("run", sources["run"]))
    assert names == ["tsne", "pca", "similarity", "similarity-ordered", "training", "ranks", "norms", "models"]
    said = run("plot", "--run", evaluated, "--out", tmp_path / "figures").stderr
    assert "drawing norms" in said
    assert (tmp_path / "figures/norms.png").stat().st_size > 500
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
