"""Lists of ids, and datasets of a table's rows whose images need not be at hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from onceover.base.addresses import path_of
from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.rows import Row, positions, usable_rows, without_captions
from onceover.extract.dataset.splits import column_splits, with_splits
from onceover.extract.dataset.text import read_lines
from onceover.extract.ledger import NO_IMAGE_NAMED, Failure
from onceover.extract.names import shown


def read_ids(file: str | Path) -> list[str]:
    """The images' ids in a text file, one per line.

    Raises:
        DatasetError: an unreadable file, an empty line, or an id that stands twice.
    """
    ids = [line.strip() for line in read_lines(path_of(file))]
    while ids and not ids[-1]:
        ids.pop()
    first: dict[str, int] = {}
    for number, name in enumerate(ids, 1):
        if not name or "\0" in name:
            raise DatasetError(f"{file}, line {number}: there is no usable id; write one a line")
        if first.setdefault(name, number) != number:
            raise DatasetError(
                f"{file}, line {number}: {shown(name)} stands in line {first[name]} too; an id has one row"
            )
    return ids


def captioned(
    rows: Sequence[Row], source: Path, root: Path, gallery: list[str] | None = None, seed: int = 0
) -> tuple[Dataset, np.ndarray]:
    """A dataset of images that need not be at hand, from the rows (image, caption, split) of the table ``source``.

    Images keep the names that the table gives them, in the order of their first row, and those without a usable
    caption go into the ledger; or they are those of ``gallery``, where one without captions is in no split.

    Returns:
        The dataset, and the row of each of its captions, int64 (M,).

    Raises:
        DatasetError: no usable row, or an image in two splits.
    """
    names = [row[0].strip() for row in rows]
    known = set(names if gallery is None else gallery)
    reasons = {name: _why_no_id(name, known) for name in names}
    used, failures = usable_rows(names, rows, reasons)
    usable_names = {names[row] for row in used}
    ids = [name for name in reasons if name in usable_names]
    if gallery is None:
        failures += [Failure(name, "dataset", "no usable caption") for name in without_captions(reasons, ids)]
    if not ids:
        reason = f"; the first reason: {failures[0].id}: {failures[0].reason}" if failures else ""
        raise DatasetError(f"{source} holds no usable caption{reason}")
    named = [row for row, name in enumerate(names) if name]
    split_of = column_splits([names[row] for row in named], [rows[row][2] for row in named], source)
    dataset = Dataset(
        root=root,
        layout="table",
        ids=ids,
        paths=ids,
        splits=[split_of[name] for name in ids],
        captions=[rows[row][1].strip() for row in used],
        image_index=positions(ids, [names[row] for row in used]),
        failures=failures,
    )
    if not any(dataset.splits):
        dataset = with_splits(dataset, source, seed)
    if gallery is not None:
        split_of = dict(zip(ids, dataset.splits, strict=True))
        dataset = replace(
            dataset,
            ids=gallery,
            paths=gallery,
            splits=[split_of.get(name, "") for name in gallery],
            image_index=positions(gallery, [names[row] for row in used]),
        )
    return dataset, np.array(used, dtype=np.int64)


def _why_no_id(name: str, known: set[str]) -> str | None:
    if not name:
        return NO_IMAGE_NAMED
    if "\0" in name:
        return "a name with a NUL character"
    return None if name in known else "not among the image ids"
