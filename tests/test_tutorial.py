"""The tutorial runs from its first cell to its last, and is kept without outputs; results show themselves as tables."""

import html.parser
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from onceover import workflows
from onceover.extract.store import FeatureStore
from onceover.heads.checkpoint import load_run

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"
UNTRAINED = ("torchvision:shufflenet_v2_x0_5@random", "hf:distilbert-base-uncased@random")  # most of its time
QUICKLY = """
from onceover.analysis import drawing
drawing.STYLE["savefig.dpi"] = 50
drawing.SUFFIXES = (".png",)
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory, tiny_resnet, tiny_bert):
    """The tutorial as it is after all of its cells have run, with smaller encoders and figures, and its folder."""
    from nbclient import NotebookClient

    notebook = nbformat.read(TUTORIAL, as_version=4)
    for spec, tiny in zip(UNTRAINED, (tiny_resnet, tiny_bert), strict=True):
        [cell] = [cell for cell in notebook.cells if spec in cell.source]
        cell.source = cell.source.replace(spec, f"hf:{tiny}")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUICKLY))
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONWARNINGS", "ignore::PendingDeprecationWarning:ipykernel")
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook, folder / "tutorial"


def test_the_tutorial_is_kept_without_outputs():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 5
    for cell in cells:
        assert cell.outputs == []
        assert cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert TUTORIAL.stat().st_size < 20_000
    for cell in notebook.cells:
        for name in re.findall(r"\]\((\w+\.md)", cell.source):
            assert (TUTORIAL.parent / name).is_file(), name


def output_of(notebook, code, kind):
    """What the cell that has some code showed last, as ``text/html`` or another kind."""
    [cell] = [cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source]
    return cell.outputs[-1]["data"][kind]


def test_the_tutorial_runs_from_data_to_map(executed):
    notebook, folder = executed
    for name in ("store.h5", "runs/first/run.json", "figures/features.png", "report.html", "images.parquet"):
        assert (folder / name).is_file(), name
    line = output_of(notebook, "onceover.extract_features(", "text/plain")
    assert line.startswith("<FeatureStore tutorial/store.h5: 60 images, 300 captions;")
    assert " dimensions; rsum " in output_of(notebook, 'onceover.fit(store, folder / "runs/first"', "text/plain")
    assert "image → caption: 12 queries, gallery of 60" in output_of(notebook, "onceover.evaluate(", "text/html")
    assert " against tutorial/runs/first" in output_of(notebook, "onceover.compare(", "text/html")
    assert output_of(notebook, "hits = onceover.search(", "text/html").count("<img") == 3
    assert output_of(notebook, "figures/features.png", "image/png")
    assert 'src="tutorial/report.html"' in output_of(notebook, "onceover.report(", "text/html")
    assert "images/0000.jpg" in output_of(notebook, "onceover.export(", "text/plain")


def test_the_tutorial_warns_of_nothing_and_shows_bars(executed):
    notebook, _ = executed
    shown = {"stderr": "", "stdout": ""}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                shown[output["name"]] += output["text"]
    assert "rows/s" in shown["stderr"]  # a bar, in a notebook without widgets
    for text in shown.values():
        assert "Warning" not in text


class Tags(html.parser.HTMLParser):
    """The tags that a page opens, and those that it leaves open."""

    def __init__(self, text):
        super().__init__()
        self.names = []
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.open.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_an_evaluation_and_a_comparison_show_themselves_as_tables(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir, "<b>&run")
    shutil.copytree(run_dir, "other")
    evaluation = workflows.evaluate("<b>&run")
    text = evaluation._repr_html_()
    tags = Tags(text)
    assert not tags.open
    tables = {"table", "thead", "tbody", "tr", "th", "td"}
    assert set(tags.names) == tables | {"div", "p", "strong", "details", "summary", "ul", "li"}
    numbers = evaluation.result["models"]["multimodal"]["text_to_image"]
    low, high = numbers["R@5_ci"]
    cell = re.escape(f"{numbers['R@5']:.1f} [{low:.1f}, {high:.1f}]")
    assert re.search(rf"<td [^>]*>{cell}</td>", text)
    comparison = workflows.compare(["<b>&run", "other"])
    page = comparison._repr_html_()
    assert not Tags(page).open
    assert "&lt;b&gt;&amp;run" in page
    assert "<b>" not in page
    assert "not distinguishable" in page
    assert str(comparison).splitlines()[0] == "other against <b>&run"
    assert comparison == dict(comparison)


def test_a_result_that_flatters_says_so(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    assert "<strong>Warning:</strong>" in workflows.compare([run_dir, copy], "train")._repr_html_()


def test_a_run_and_a_store_say_in_a_line_what_they_are(run_dir, store_file, extract_config):
    line = repr(load_run(run_dir))
    assert line.startswith(f"<Run {run_dir}: {extract_config.image_encoder} and hf:")
    assert ", 16 dimensions; rsum " in line
    assert line.endswith(" on dev>")
    with FeatureStore(store_file) as store:
        told = f"<FeatureStore {store_file}: 60 images, 300 captions; features of {extract_config.image_encoder}"
        assert repr(store).startswith(told)
