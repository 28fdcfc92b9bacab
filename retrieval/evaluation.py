"""A run against its baselines on one split: the result as plain values, and as terminal, Markdown and CSV tables."""

import csv
import io

from tqdm import tqdm

from configs import OnceoverError
from extract.store import FeatureStore
from retrieval.baselines import MAPS, unlearned
from retrieval.embeddings import Embeddings
from retrieval.metrics import RECALL_AT, chance, rank, report

_COLUMNS = (*(f"R@{k}" for k in RECALL_AT), "median_rank", "mean_rank", "mrr")
_DIRECTIONS = (("image_to_text", "image→text"), ("text_to_image", "text→image"))


class EvaluationError(OnceoverError):
    """A store and a run that do not belong together."""


def evaluate(embeddings: Embeddings, store: FeatureStore, split: str | None = None, seed: int = 0) -> dict:
    """Metrics of the multimodal model, the unlearned baselines and chance on a split (default: the reported one).

    Raises:
        EvaluationError: the store's features are not those the run was fitted on.
        EmbeddingsError: no such split.
    """
    if embeddings.fingerprints != store.fingerprints:
        changed = ", ".join(
            kind for kind, value in store.fingerprints.items() if embeddings.fingerprints[kind] != value
        )
        raise EvaluationError(
            f"{store.path} is not the store that the run was fitted on ({changed} differ); fit again on it"
        )
    split = split or embeddings.report_split
    pictures, captions, image_index = embeddings.split(split)
    images, texts = store.image_features[:][pictures, 0], store.text_features[:][captions]
    models = {"multimodal": [rank(embeddings.images[pictures], embeddings.texts[captions], image_index)]}
    with tqdm(total=2 * MAPS, desc="baselines", unit=" maps", disable=None) as bar:
        common = {"image_index": image_index, "seed": seed, "step": bar.update}
        models["image_only"] = unlearned(images, texts, images_are_space=True, **common)
        models["text_only"] = unlearned(texts, images, images_are_space=False, **common)
    models["chance"] = [chance(len(pictures), image_index)]
    return {
        "split": split,
        "n_images": len(pictures),
        "n_captions": len(captions),
        "selected_on": embeddings.selection_split,
        "models": {
            name: report(pairs, draws=0 if name == "chance" else 1000, seed=seed) for name, pairs in models.items()
        },
    }


def notes(result: dict) -> list[str]:
    """What a reader of the numbers has to know."""
    lines = [
        f"{result['split']}: {result['n_images']:,} pictures, {result['n_captions']:,} captions; "
        f"R@K in percent with 95 % intervals over pictures; heads chosen on {result['selected_on']}",
        f"image_only, text_only: mean ± standard deviation over {MAPS} random maps, nothing learned",
    ]
    if result["split"] == result["selected_on"]:
        lines.append(f"the heads were chosen on {result['split']}: these numbers flatter the model")
    if result["split"] == "train":
        lines.append("the heads were trained on these pictures: these numbers say nothing about new ones")
    return lines


def table_rows(result: dict) -> list[list[str]]:
    """Header and one row for each model and direction, as text."""
    rows = [["model", "direction", *_COLUMNS, "rsum"]]
    for model, summary in result["models"].items():
        for key, label in _DIRECTIONS:
            side = summary[key]
            cells = [_cell(side, column) for column in _COLUMNS]
            rows.append([model, label, *cells, f"{summary['rsum']:.1f}"])
    return rows


def _cell(side: dict, column: str) -> str:
    if column == "mrr":
        return f"{side[column]:.3f}"
    if not column.startswith("R@"):
        return f"{side[column]:.1f}"
    digits = 1 if side[column] >= 2 else 2
    value = f"{side[column]:.{digits}f}"
    if f"{column}_sd" in side:
        return f"{value} ± {side[f'{column}_sd']:.{digits}f}"
    low, high = side.get(f"{column}_ci", (None, None))
    return value if low is None else f"{value} [{low:.{digits}f}, {high:.{digits}f}]"


def terminal_table(result: dict) -> str:
    """The table in aligned columns."""
    rows = table_rows(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(result: dict) -> str:
    """The table in Markdown, with its notes."""
    rows = table_rows(result)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(result)), ""])


def csv_table(result: dict) -> str:
    """Every number in full, one row for each model and direction."""
    rows: list[dict] = []
    for model, summary in result["models"].items():
        for key, _ in _DIRECTIONS:
            flat: dict = {"split": result["split"], "n_images": result["n_images"], "n_captions": result["n_captions"]}
            flat |= {"model": model, "direction": key}
            for column, value in summary[key].items():
                flat |= (
                    {f"{column}_low": value[0], f"{column}_high": value[1]}
                    if isinstance(value, list)
                    else {column: value}
                )
            rows.append(flat | {"rsum": summary["rsum"]})
    buffer = io.StringIO()
    writer = csv.DictWriter(
        buffer, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
