"""Results as HTML for a notebook: an evaluation and a comparison as tables with intervals and notes."""

from collections.abc import Sequence
from typing import Any

from onceover.analysis.pages import render
from onceover.analysis.pages.tables import page_table
from onceover.base.terminal import Table
from onceover.retrieval import tables


def evaluation_html(result: dict[str, Any]) -> str:
    """An evaluation as the tables that the terminal shows."""
    return _html(tables.evaluation_tables(result), tables.notes(result), tables.warnings(result))


def comparison_html(result: dict[str, Any]) -> str:
    """A comparison as the tables that the terminal shows."""
    found = tables.comparison_tables(result)
    return _html(found, tables.comparison_notes(result), tables.comparison_warnings(result))


def _html(found: Sequence[Table], notes: Sequence[str], warnings: Sequence[str]) -> str:
    return render("results.html", tables=[page_table(table) for table in found], notes=notes, warnings=warnings)
