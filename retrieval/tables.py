"""Tables and notes of evaluations and comparisons: rows of text, in the terminal, in Markdown and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence

from onceover.base.files import json_text, sealed
from onceover.base.terminal import Table
from onceover.retrieval.baselines import MAPS
from onceover.retrieval.comparison import verdict
from onceover.retrieval.metrics import DIRECTIONS, RECALL_AT

_RECALLS = tuple(f"R@{k}" for k in RECALL_AT)
_COLUMNS = (*_RECALLS, "median_rank", "mean_rank", "mrr", "hub_skewness")
_COMPARED = (*_RECALLS, "mrr")
DIRECTION_NAMES = {"image_to_text": "image → caption", "text_to_image": "caption → image"}
_MODEL_NOTES = {
    "multimodal_qbnorm": "multimodal_qbnorm: inverted softmax with a bank of training queries, as sharp as the spread "
    "of the scores asks for, or none at all; inductive: the split's queries play no part in it",
    "multimodal_csls_transductive": "multimodal_csls_transductive: corrected with all queries of the split at once; "
    "transductive: not to be compared with single queries",
    "multimodal_trained": "multimodal_trained, multimodal_closed_form: the run's heads that are trained and those that "
    "are not (a CCA in closed form, or the features' own space), each alone and uncorrected; the run's scores are a "
    "weighted mean of both",
    "zero_shot": "zero_shot: the features compared as they are, a dual encoder's or imported ones of one width; "
    "nothing learned here",
    "cca": "cca, ridge, text_knn, image_knn: their settings were chosen on the validation split, by fits on train "
    "images alone; then fitted on as many images as stand beside them",
    "image_only": f"image_only, text_only: mean ± standard deviation over {MAPS} random maps, nothing learned",
    "shuffled": "shuffled: heads fitted with the run's settings (an ensemble's first member's) to train images that "
    "had swapped their captions",
}
_ENDING_NOTES = {
    "_equal_captions": "…_equal_captions: a caption equal to one of an image's own is correct for it, and the image "
    "for the caption",
    "_folds": "…_folds: each query searches its own fold alone, consecutive images in the store's order with their "
    "captions; the gallery is the largest fold's",
}
_FEW_DIFFERENT = 0.9  # share of different captions below which equal ones are worth a note


def table_rows(result: dict) -> list[list[str]]:
    """The table of an evaluation: a header, and a row for each model and direction."""
    rows = [["model", "direction (gallery)", *_COLUMNS, "rsum", "dims", "fitted on"]]
    for model, summary in result["models"].items():
        for direction in DIRECTIONS:
            numbers = summary[direction]
            cells = [_cell(numbers, column) for column in _COLUMNS]
            label = _direction_label(direction, numbers)
            rows.append([model, label, *cells, f"{summary['rsum']:.1f}", *_size(summary)])
    return rows


def evaluation_tables(result: dict) -> list[Table]:
    """An evaluation for people: a table for each direction and size of gallery, a row for each model.

    Of the numbers those that are compared most; all of them are in the files.
    """
    tables: dict[str, Table] = {}
    for direction in DIRECTIONS:
        for model, summary in result["models"].items():
            numbers = summary[direction]
            sizes = f"{numbers['queries']:,} queries, gallery of {numbers['gallery']:,}"
            title = f"{DIRECTION_NAMES[direction]}: {sizes}"
            header = ["model", *_RECALLS, "median rank", "rsum", "dims", "fitted on"]
            table = tables.setdefault(title, Table(title, [header]))
            cells = [_cell(numbers, column) for column in (*_RECALLS, "median_rank")]
            table.rows.append([model, *cells, f"{summary['rsum']:.1f}", *_size(summary)])
    return list(tables.values())


def summary_table(result: dict) -> Table:
    """An evaluation in one table for people: a row for each model, both directions beside each other."""
    rows = [["model", "R@1 → caption", "R@10 → caption", "R@1 → image", "R@10 → image", "rsum", "dims", "fitted on"]]
    for model, summary in result["models"].items():
        cells = []
        for direction in DIRECTIONS:
            cells += [_recall(summary[direction][column]) for column in ("R@1", "R@10")]
        rows.append([model, *cells, f"{summary['rsum']:.1f}", *_size(summary)])
    galleries = [f"{result['models']['chance'][direction]['gallery']:,}" for direction in DIRECTIONS]
    title = f"{result['split']}: recall in percent among {galleries[0]} captions and {galleries[1]} images"
    return Table(title, rows)


def _size(summary: dict) -> list[str]:
    """The dimensions of the vectors that are searched, and how many images they were fitted on; a dash for none."""
    return [f"{summary[key]:,}" if key in summary else "–" for key in ("dimensions", "fitted_images")]


def _direction_label(direction: str, numbers: dict) -> str:
    """A direction with the size of its gallery."""
    return f"{DIRECTION_NAMES[direction]} ({numbers['gallery']:,})"


def _cell(numbers: dict, column: str) -> str:
    """A number with its interval or spread; a dash where a model lacks it."""
    if column not in numbers:
        return "–"
    number = numbers[column]
    if column == "mrr":
        return f"{number:.3f}"
    if column == "hub_skewness":
        return f"{number:.2f}"
    if column not in _RECALLS:
        return f"{number:,.1f}"
    text = _recall(number)
    digits = len(text.partition(".")[2])
    if f"{column}_sd" in numbers:
        return f"{text} ± {numbers[f'{column}_sd']:.{digits}f}"
    if f"{column}_ci" in numbers:
        low, high = numbers[f"{column}_ci"]
        return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def _recall(number: float) -> str:
    """A recall in percent, small ones with one more digit."""
    digits = 1 if number >= 2 else 2
    return f"{number:.{digits}f}"


def notes(result: dict) -> list[str]:
    """Notes that a reader of an evaluation needs."""
    chosen = "nothing fitted"
    if result["selected_on"]:
        chosen = f"all settings were chosen on the validation split ({result['selected_on']})"
    models = result["models"]
    lines = [
        f"{result['split']}: {result['n_images']:,} images, {result['n_captions']:,} captions; R@K: hit@K in percent "
        "with 95 % intervals over images; rsum: the sum of R@1, R@5 and R@10 of both directions; gallery: the items "
        "that a query searches; dims: of the vectors that are searched; fitted on: images; true recall@K and all other "
        "numbers: in .csv and .json",
        chosen,
        *(note for model, note in _MODEL_NOTES.items() if model in models),
        *(note for ending, note in _ENDING_NOTES.items() if any(model.endswith(ending) for model in models)),
    ]
    if result.get("kept_rows"):
        lines.append(f"from an earlier evaluation of the same embeddings: {', '.join(result['kept_rows'])}")
    fitted = result["baselines_fitted_on"]
    if fitted["images"] < fitted["of"]:
        lines.append(
            f"the fitted baselines were fitted on {fitted['images']:,} of {fitted['of']:,} images, as many as --memory "
            "allows"
        )
    if result["n_different_captions"] < _FEW_DIFFERENT * result["n_captions"]:
        lines.append(
            f"only {result['n_different_captions']:,} of the {result['n_captions']:,} captions are different, and an "
            "equal caption of another image counts as wrong; --equal-captions adds a row that counts it as correct"
        )
    return lines


def warnings(result: dict) -> list[str]:
    """Reasons why the numbers of an evaluation are unfit to be reported."""
    return _warnings(result["split"], {"heads and settings": result["selected_on"]})


def comparison_warnings(result: dict) -> list[str]:
    """Reasons why the numbers of a comparison are unfit to be reported."""
    return _warnings(result["split"], result["selected_on"])


def _warnings(split: str, chosen_on: Mapping[str, str]) -> list[str]:
    """Reasons why numbers on a split are unfit to be reported.

    Args:
        chosen_on: the split that each of several things was chosen on.
    """
    if split == "train":
        return ["the heads were trained on these images: these numbers say nothing about new ones"]
    flattered = [name for name, chosen in chosen_on.items() if chosen == split]
    if not flattered:
        return []
    chosen = f"{', '.join(flattered)} were chosen on {split}, and heads by default fitted on it in the end"
    return [f"{chosen}: these numbers flatter them"]


def comparison_tables(result: dict) -> list[Table]:
    """A comparison: a table for each other run, with a row for each direction and metric."""
    first = result["reference"]
    before = result["runs"][first]
    tables = []
    for name, difference in result["differences"].items():
        after = result["runs"][name]
        rows = [["direction (gallery)", "metric", first, name, "difference [95 %]", "verdict"]]
        for direction in DIRECTIONS:
            label = _direction_label(direction, before[direction])
            for key in _COMPARED:
                cells = _comparison_cells(key, before[direction], after[direction], difference[direction])
                rows.append([label, *cells])
        rows.append(["both", *_comparison_cells("rsum", before, after, difference)])
        tables.append(Table(f"{name} against {first}", rows))
    return tables


def _comparison_cells(key: str, before: dict, after: dict, difference: dict) -> list[str]:
    """A metric's name, its values before and after, their difference with its interval, and the verdict."""
    digits = 3 if key == "mrr" else 1
    low, high = difference[f"{key}_ci"]
    return [
        key.upper() if key == "mrr" else key,
        f"{before[key]:.{digits}f}",
        f"{after[key]:.{digits}f}",
        f"{difference[key]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]",
        verdict((low, high)),
    ]


def comparison_notes(result: dict) -> list[str]:
    """Notes that a reader of a comparison needs."""
    tests = len(result["differences"]) * (len(DIRECTIONS) * len(_COMPARED) + 1)
    lines = [
        f"{result['split']}: {result['n_images']:,} images, {result['n_captions']:,} captions; intervals resample "
        "the images, the same ones for both runs; they say nothing about other seeds, which fits of several seeds do",
        f"the {tests} intervals are not corrected for multiple comparisons",
        f"correction for hubs: {_corrections(result['rerank'])}",
        f"dimensions of what is searched: {', '.join(f'{name} {dim:,}' for name, dim in result['dimensions'].items())}",
    ]
    if "csls" in result["rerank"].values():
        lines.append("csls is transductive: it uses all queries of the split at once")
    return lines


def _corrections(methods: dict[str, str]) -> str:
    """The correction that all runs share, or that of each run."""
    different = set(methods.values())
    if len(different) == 1:
        return different.pop()
    return ", ".join(f"{name}: {method}" for name, method in methods.items())


def markdown_table(rows: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """A table in Markdown, with its notes."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks), ""])


def csv_table(result: dict) -> str:
    """An evaluation as CSV, every number in full, one row for each model and direction."""
    rows: list[dict] = []
    for model, summary in result["models"].items():
        for direction in DIRECTIONS:
            row = {
                "split": result["split"],
                "n_images": result["n_images"],
                "n_captions": result["n_captions"],
                "model": model,
                "direction": direction,
            }
            for column, value in summary[direction].items():
                row |= _flat(column, value)
            row["rsum"] = summary["rsum"]
            for key in ("dimensions", "fitted_images"):
                if key in summary:
                    row[key] = summary[key]
            rows.append(row)
    return csv_text(rows)


def _flat(column: str, value: object) -> dict:
    """A number as a column; an interval as two."""
    if not isinstance(value, list):
        return {column: value}
    low, high = value
    return {f"{column}_low": low, f"{column}_high": high}


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV with a header of all their columns; a column that a row lacks is blank there."""
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def evaluation_names(stem: str) -> list[str]:
    """The names of an evaluation's files."""
    return [f"{stem}{suffix}" for suffix in (".md", ".csv", ".json")]


def evaluation_files(stem: str, result: dict) -> dict[str, str]:
    """The files of an evaluation by name, ``stem`` with a suffix: a Markdown table, a CSV table and sealed JSON."""
    table = markdown_table(table_rows(result), [*notes(result), *warnings(result)])
    return dict(zip(evaluation_names(stem), (table, csv_table(result), json_text(sealed(result))), strict=True))
