"""The documents: their links lead somewhere, and the README stays short and names the test command."""

import re
from pathlib import Path

import pytest

from onceover.extract.formats import FORMATS
from onceover.extract.layouts import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS_IN_PAGE = {  # how docs/data.md calls each layout
    "class folders": "a folder for each class",
    "coco": "COCO's captions",
    "csv": "table with a header",
    "flickr30k": "Flickr30k, bars",
    "imagefolder": "imagefolder of the Hub",
    "img2dataset": "img2dataset, `--output_format files`",
    "kaggle": "Flickr8k, Kaggle's",
    "karpathy": "Karpathy's split files",
    "original": "Flickr8k, original",
    "parquet": "Parquet of Hugging Face's datasets",
    "text beside": "a text for each image",
    "webdataset": "webdataset's tar shards",
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_readme_is_short_and_names_the_test_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert "make test" in text
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_the_page_on_images_names_each_format_and_its_suffixes_and_tests_that_exist():
    page = (ROOT / "docs/images.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "`" in line]
    suffixes = {row[0].removeprefix("| ").replace(" ", "").upper(): tuple(row[1].split()) for row in rows[1:]}
    assert suffixes == FORMATS
    tests = (ROOT / "tests/test_pictures.py").read_text(encoding="utf-8")
    for name in re.findall(r"`(test_[a-z0-9_]+)", page.split("## How")[0].replace("tests/test_pictures.py", "")):
        assert f"def {name}" in tests


def test_every_layout_stands_in_the_page_on_data():
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for name in LAYOUTS.names():
        assert LAYOUTS.load(name).NAME in LAYOUTS_IN_PAGE, f"{name} is not in docs/data.md"
        assert LAYOUTS_IN_PAGE[LAYOUTS.load(name).NAME] in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_test_that_a_page_names_is_there(page):
    for file, function in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(test_\w+))?", page.read_text(encoding="utf-8")):
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, f"{file}::{function}"
