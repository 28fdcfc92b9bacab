"""Tables of images and captions: CSV files, lists of ids, and datasets whose images need not be at hand."""

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from onceover.base.files import MAX_TEXT
from onceover.base.places import place
from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.rows import Row, positions, usable_rows, without_captions
from onceover.extract.dataset.splits import column_splits, with_splits
from onceover.extract.dataset.text import read_lines
from onceover.extract.ledger import NO_IMAGE_NAMED, Failure
from onceover.extract.names import shown

_MAX_RECORD = 2**17  # characters of a record of several lines; a quote that is open for longer was never closed
_LOOKS_LIKE_A_RECORD = re.compile(r'(^|,)"?[^",]+\.(jpe?g|png|gif|bmp|webp|tiff?)"?(,|$)', re.IGNORECASE)
csv.field_size_limit(MAX_TEXT - 1)  # a long cell is a matter for the ledger (``MAX_CAPTION``), not for the parser


def read_ids(file: str | Path) -> list[str]:
    """The images' ids in a text file, one per line.

    Raises:
        DatasetError: an unreadable file, an empty line, or an id that stands twice.
    """
    ids = [line.strip() for line in read_lines(place(file))]
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
    rows: list[tuple[str, str, str]], source: Path, root: Path, gallery: list[str] | None = None, seed: int = 0
) -> tuple[Dataset, np.ndarray]:
    """A dataset of images that need not be at hand, from the rows (image, caption, split) of the table ``source``.

    Images keep the names that the table gives them, in the order of their first row, and those without a usable
    caption go into the ledger; or they are those of ``gallery``, where one without captions is in no split.

    Returns:
        The dataset, and the row of each of its captions, int64 (M,).

    Raises:
        DatasetError: no usable row, or an image in two splits.
    """
    names = [name.strip() for name, _, _ in rows]
    known = set(names if gallery is None else gallery)
    reasons = {name: _why_no_id(name, known) for name in names}
    used, failures = usable_rows(names, [Row(*row) for row in rows], reasons)
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


def csv_rows(path: Path) -> Iterator[Row]:
    """(image, caption, split) from a CSV with a header.

    A two-column file may leave captions with commas or stray quotes unquoted, as published copies do: what follows
    the first comma is then the caption, verbatim.

    Raises:
        DatasetError: unreadable, no such columns, or a line of another number of fields.
    """
    lines = read_lines(path)
    columns, _ = _csv_record(lines[:1], 0)
    header = [name.strip().lower() for name in columns or ()]
    if "image" not in header or "caption" not in header:
        raise DatasetError(f"{path} needs a first line with the columns image,caption[,split]; it has {lines[0]!r:.80}")
    twice = [name for name in ("image", "caption", "split") if header.count(name) > 1]
    if twice:
        raise DatasetError(f"{path} has several columns called {twice[0]}; leave one, with a line for each caption")
    image = header.index("image")
    caption = header.index("caption")
    split = header.index("split") if "split" in header else None
    position = 1
    while position < len(lines):
        fields, taken = _csv_record(lines, position)
        if not lines[position].strip():
            position += 1
            continue
        if fields is None or len(fields) != len(header):
            fields = lines[position].split(",", 1)
            taken = 1
            if header != ["image", "caption"] or len(fields) != 2:
                raise DatasetError(
                    f"{path}, line {position + 1}: expected {len(header)} fields ({shown(','.join(header))}); "
                    "quote captions that contain commas"
                )
        yield Row(fields[image], fields[caption], fields[split] if split is not None else "")
        position += taken


def _csv_record(lines: list[str], position: int) -> tuple[list[str] | None, int]:
    """The fields of the record that starts at ``position`` and the lines it takes; None where quoting is broken.

    Only a quote that is left open makes a record run over a line's end, and never into a line that looks like a record.
    """
    record = lines[position]
    taken = 1
    while True:
        try:
            return next(csv.reader([record], strict=True), []), taken
        except csv.Error as error:
            if "unexpected end of data" not in str(error):
                return None, 1
        following = _to_closing_quote(lines, position + taken)
        if following is None or len(record) + len(following) > _MAX_RECORD:
            return None, 1
        taken += following.count("\n") + 1
        record += f"\n{following}"


def _to_closing_quote(lines: list[str], position: int) -> str | None:
    """The lines from ``position`` to the first that can close a quote, which has an odd number of them.

    None where none comes soon, or one before it looks like a record.
    """
    size = 0
    for end in range(position, len(lines)):
        size += len(lines[end]) + 1
        if size > _MAX_RECORD or _LOOKS_LIKE_A_RECORD.search(lines[end]):
            return None
        if lines[end].count('"') % 2:
            return "\n".join(lines[position : end + 1])
    return None
