"""The numbers of a report: the evaluation beside its baselines, comparisons with other runs, and ranks by band."""

from typing import Any

import numpy as np

from onceover.analysis.report.cells import table
from onceover.analysis.report.files import AbsentError, ReportFiles
from onceover.analysis.sources import read_evaluation
from onceover.retrieval import tables
from onceover.retrieval.comparison import compare_runs
from onceover.retrieval.embeddings import model_name
from onceover.retrieval.metrics import DIRECTIONS, RECALL_AT

_BANDS = ((1, 1), (2, 5), (6, 10), (11, 100), (101, None))  # of ranks, from and to
_LABELS = {"image_to_text": "image → caption", "text_to_image": "caption → image"}


def evaluation(files: ReportFiles) -> dict[str, Any]:
    """The table of the evaluation, its notes and warnings, and the run's own numbers.

    Raises:
        AbsentError: the split was not evaluated. PlotError: the evaluation is damaged, or of another run.
    """
    file = files.run.evaluation_file
    if not file.is_file():
        command = files.command("evaluate", "--split", files.run.split)
        raise AbsentError(f"{files.run.split} was not evaluated yet; run: {command}")
    result = read_evaluation(file, files.run.embeddings.space)
    header, *rows = tables.table_rows(result)
    names = [name.replace("_", " ") for name in header]  # which may wrap
    own = result["models"].get(model_name(files.run.embeddings.rerank))
    highlights = []
    if own:
        for direction in DIRECTIONS:
            numbers = own[direction]
            recalls = [(f"R@{k}", f"{numbers[f'R@{k}']:.1f}") for k in RECALL_AT]
            highlights.append((_LABELS[direction], recalls, f"gallery of {numbers['gallery']:,}"))
    return {
        "table": table(f"Evaluation on {result['split']}", [names, *rows]),
        "notes": tables.notes(result),
        "warnings": tables.warnings(result),
        "highlights": highlights,
        "file": str(file),
    }


def comparison(files: ReportFiles) -> dict[str, Any]:
    """The table of the comparisons with the other runs, with its notes and warnings.

    Raises:
        EvaluationError: a run of other images or captions.
    """
    runs = {str(files.run.folder): files.run.embeddings, **files.others}
    result = compare_runs(runs, files.run.split)
    return {
        "table": table("Comparison", tables.comparison_rows(result)),
        "notes": tables.comparison_notes(result),
        "warnings": tables.comparison_warnings(result),
    }


def rank_bands(files: ReportFiles) -> dict[str, Any]:
    """The shares of queries by the rank of their best correct item."""
    rows = [["rank of the best correct item", *_LABELS.values()]]
    both = (files.searched.to_text.expected_rank(), files.searched.to_image.expected_rank())
    for least, most in _BANDS:
        label = f"{least}" if least == most else f"{least} to {most}" if most else f"{least} and above"
        cells = []
        for ranks in both:
            within = (ranks >= least) & (ranks < (most or np.inf) + 1)
            cells.append(f"{100 * within.mean():.1f} % ({int(within.sum()):,})")
        rows.append([label, *cells])
    return {"table": table("Queries by rank", rows)}
