"""Results as HTML for a notebook: an evaluation and a comparison as tables with intervals and notes."""

from typing import Any

from onceover.analysis.pages import render
from onceover.retrieval import tables

_SHOWN = ("model", "direction (gallery)", "R@1", "R@5", "R@10", "median_rank", "rsum", "fitted on")  # the rest: in .csv


def evaluation_html(result: dict[str, Any]) -> str:
    """An evaluation as a table of its models; without the columns that few read."""
    header, *rows = tables.table_rows(result)
    columns = [header.index(name) for name in _SHOWN]
    return render(
        "results.html",
        title=f"Retrieval on {result['split']}, in percent with 95 % intervals",
        header=[header[column] for column in columns],
        rows=[[row[column] for column in columns] for row in rows],
        names=2,
        notes=tables.notes(result),
        warnings=tables.warnings(result),
    )


def comparison_html(result: dict[str, Any]) -> str:
    """A comparison as a table of differences."""
    header, *rows = tables.comparison_rows(result)
    return render(
        "results.html",
        title=f"Runs compared with {result['reference']} on {result['split']}",
        header=header,
        rows=rows,
        names=3,
        notes=tables.comparison_notes(result),
        warnings=tables.comparison_warnings(result),
    )
