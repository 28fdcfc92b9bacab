"""The numbers of a report: the evaluation beside its baselines, comparisons with other runs, and ranks by band."""

from typing import Any

import numpy as np

from onceover.analysis.pages.tables import page_table
from onceover.analysis.report.files import AbsentError, ReportFiles
from onceover.analysis.sources import PlotError, read_evaluation
from onceover.base.terminal import Table
from onceover.retrieval import tables
from onceover.retrieval.baseline_ranks import FITTED
from onceover.retrieval.comparison import compare_runs
from onceover.retrieval.embeddings import model_name
from onceover.retrieval.metrics import DIRECTIONS, RECALL_AT

_BASELINES = ("zero_shot", *FITTED)
_BANDS = ((1, 1), (2, 5), (6, 10), (11, 100), (101, None))  # of ranks, from and to


def evaluation(files: ReportFiles) -> dict[str, Any]:
    """The tables of the evaluation, its notes and warnings, and the run's own numbers.

    Raises:
        AbsentError: the split was not evaluated. PlotError: the evaluation is damaged, or of another run or version.
    """
    file = files.run.evaluation_file
    if not file.is_file():
        command = files.command("evaluate", "--split", files.run.split)
        raise AbsentError(f"{files.run.split} was not evaluated yet; run: {command}")
    result = read_evaluation(file, files.run.embeddings.space)
    try:
        return {
            "tables": [page_table(table) for table in tables.evaluation_tables(result)],
            "notes": tables.notes(result),
            "warnings": tables.warnings(result),
            "highlights": _highlights(result["models"], model_name(files.run.embeddings.rerank)),
            "own": model_name(files.run.embeddings.rerank),
            "file": str(file),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlotError(f"{file} is damaged, or of another version; evaluate again") from error


def _highlights(models: dict[str, dict], own: str) -> list[dict[str, Any]]:
    """A run's own recalls in each direction, with their intervals; none where it was not evaluated itself.

    With them the baselines that find more in first place.
    """
    if own not in models:
        return []
    shown = []
    for direction in DIRECTIONS:
        side = models[own][direction]
        ahead = []
        for name in _BASELINES:
            if name in models and models[name][direction]["R@1"] > side["R@1"]:
                ahead.append(f"{name} ({models[name][direction]['R@1']:.1f})")
        recalls = []
        for k in RECALL_AT:
            low, high = side[f"R@{k}_ci"]
            recalls.append((f"R@{k}", f"{side[f'R@{k}']:.1f}", f"{low:.1f} to {high:.1f}"))
        name = tables.DIRECTION_NAMES[direction]
        gallery = f"gallery of {side['gallery']:,}"
        shown.append({"direction": name, "recalls": recalls, "gallery": gallery, "ahead": ", ".join(ahead)})
    return shown


def comparison(files: ReportFiles) -> dict[str, Any]:
    """A table for each run that is compared with, with notes and warnings.

    Raises:
        EvaluationError: a run of other images or captions.
    """
    runs = {str(files.run.folder): files.run.embeddings, **files.others}
    result = compare_runs(runs, files.run.split)
    return {
        "tables": [page_table(table) for table in tables.comparison_tables(result)],
        "notes": tables.comparison_notes(result),
        "warnings": tables.comparison_warnings(result),
    }


def rank_bands(files: ReportFiles) -> dict[str, Any]:
    """The shares of queries by the rank of their best correct item."""
    rows = [["rank of the best correct item", *tables.DIRECTION_NAMES.values()]]
    both = (files.searched.to_text.expected_rank(), files.searched.to_image.expected_rank())
    for least, most in _BANDS:
        label = f"{least}" if least == most else f"{least} to {most}" if most else f"{least} and above"
        cells = []
        for ranks in both:
            within = (ranks >= least) & (ranks < (most or np.inf) + 1)
            cells.append(f"{100 * within.mean():.1f} % ({int(within.sum()):,})")
        rows.append([label, *cells])
    return {"table": page_table(Table("Queries by rank", rows))}
