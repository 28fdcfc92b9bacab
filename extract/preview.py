"""The preview of a dataset in a few lines: its layout, images, splits and first captions, and the rows left out."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onceover.extract.dataset import Dataset
from onceover.extract.dataset.reading import DEFAULT, ReadOptions
from onceover.extract.dataset.splits import SPLITS
from onceover.extract.layouts import read_dataset
from onceover.extract.ledger import Failure
from onceover.extract.names import shown

_FIRST = 3  # captions that are shown
_MOST_REASONS = 8  # reasons of rows left out that are shown
_MOST_CHARACTERS = 80  # of a caption that are shown


def preview(data: str | Path, reading: ReadOptions = DEFAULT) -> str:
    """Describes the dataset that ``data`` names, as ``extract`` would take it; no image is opened.

    Raises:
        DatasetError: nothing readable there. AddressError: an address that cannot be opened.
    """
    return describe_dataset(read_dataset(data, options=reading))


def describe_dataset(dataset: Dataset) -> str:
    """The lines that describe a dataset."""
    per_image = np.bincount(dataset.image_index, minlength=len(dataset.ids))
    counts = sorted({int(per_image.min()), int(per_image.max())})
    lines = [
        f"dataset   {dataset.named or dataset.root}",
        f"layout    {dataset.layout}",
        f"taken     {dataset.taken}",
        f"images    {len(dataset.ids):,} ({_splits(dataset.splits)})",
        f"captions  {len(dataset.captions):,}, {' to '.join(f'{count:,}' for count in counts)} per image",
    ]
    lines += [f"note      {note}" for note in dataset.notes]
    lines.append("the first captions:")
    for row in range(min(_FIRST, len(dataset.captions))):
        caption = dataset.captions[row]
        cut = "…" if len(caption) > _MOST_CHARACTERS else ""
        name = shown(dataset.ids[dataset.image_index[row]])
        lines.append(f"  {name}: {shown(caption[:_MOST_CHARACTERS])}{cut}")
    return "\n".join([*lines, *_left_out(dataset.failures)])


def _splits(splits: Sequence[str]) -> str:
    """How many images are in each split."""
    counts = Counter(splits)
    parts = [f"{counts[split]:,} {split}" for split in SPLITS if counts[split]]
    if counts[""]:
        parts.append(f"{counts['']:,} in none")
    return ", ".join(parts)


def _left_out(failures: list[Failure]) -> list[str]:
    """How many rows are left out, by their reasons, each with the first of them."""
    if not failures:
        return ["left out: nothing"]
    first: dict[str, Failure] = {}
    counts: Counter[str] = Counter()
    for failure in failures:
        kind = failure.reason.partition(":")[0]
        counts[kind] += 1
        first.setdefault(kind, failure)
    lines = [f"left out: {len(failures):,} rows and images"]
    for kind, count in counts.most_common(_MOST_REASONS):
        lines.append(f"  {count:,} × {kind}; the first: {shown(first[kind].id)}")
    if len(counts) > _MOST_REASONS:
        lines.append(f"  and {len(counts) - _MOST_REASONS:,} more reasons")
    return lines
