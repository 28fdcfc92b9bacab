"""The documents: their links lead somewhere, and the README stays short and names the test command."""

import re
from pathlib import Path

import pytest

from onceover.extract.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
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
