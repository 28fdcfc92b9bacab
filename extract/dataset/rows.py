"""Rows of a captions file -> a dataset: the usable rows and their images; all others go into the ledger."""

import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.splits import column_splits
from onceover.extract.dataset.text import why_unusable
from onceover.extract.image_source import FolderImages, ImageSource
from onceover.extract.ledger import MAX_ID, Failure
from onceover.extract.listing import is_excluded, is_image

_DRIVE = re.compile(r"[a-z]:/")


class Row(NamedTuple):
    """A caption of an image, as a captions file has it. ``split`` is "" where the file says nothing of splits.

    ``fault``: the reason, for the ledger, why the row cannot be used, where the layout knows it.
    """

    image: str
    caption: str
    split: str = ""
    fault: str = ""


def image_name(row: Row) -> str:
    """The name that a row gives its image, without blanks, with forward slashes; a drive is written ``D:``.

    An address stays as it is written.
    """
    name = row.image.strip().replace("\\", "/")
    if "://" in name:
        return name
    if _DRIVE.match(name):
        name = name[0].upper() + name[1:]
    return posixpath.normpath(name) if name else ""


def without_excluded(rows: Sequence[Row], patterns: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The rows whose images no pattern leaves out (``listing.is_excluded``), and notes on what the patterns did.

    Raises:
        DatasetError: no row is left.
    """
    remaining = list(rows)
    notes = []
    for pattern in patterns:
        names = {image_name(row) for row in remaining}
        excluded = {name for name in names if is_excluded(name, [pattern])}
        remaining = [row for row in remaining if image_name(row) not in excluded]
        notes.append(f"images left out by --exclude {pattern}: {len(excluded):,}")
    if rows and not remaining:
        raise DatasetError(f"--exclude {' --exclude '.join(patterns)} leaves out all images; give other patterns")
    return remaining, notes


def assemble(
    root: Path,
    layout: str,
    rows: Sequence[Row],
    images: ImageSource,
    source: Path,
    list_others: bool,
    exclude: Sequence[str] = (),
) -> Dataset:
    """A dataset of the rows of a captions file.

    Args:
        source: the captions file. list_others: images that no row names go into the ledger, but for those that a
            pattern of ``exclude`` matches.

    Raises:
        DatasetError: no usable image, or an image in two splits.
    """
    names = [images.local(image_name(row)) for row in rows]
    keys, reasons = images.resolve(names)
    names, notes = _one_name_each(names, keys, reasons)
    named = [(name, row.split) for name, row in zip(names, rows, strict=True) if name]
    splits = column_splits([name for name, _ in named], [split for _, split in named], source)
    used, failures = usable_rows(names, rows, reasons)
    ids = list(dict.fromkeys(names[row] for row in used))
    faulty = {name for name, row in zip(names, rows, strict=True) if row.fault}
    for name in without_captions({name: reasons[name] for name in names}, ids):
        if name not in faulty:
            failures.append(Failure(name, "dataset", "no usable caption"))
    if list_others:
        failures += images.images_beside({*keys.values()}, exclude)
    if not ids:
        raise DatasetError(f"{source}: no image is usable; the first reason: {failures[0].id}: {failures[0].reason}")
    return Dataset(
        root=root,
        layout=layout,
        ids=ids,
        paths=[keys[name] for name in ids],
        splits=[splits[name] for name in ids],
        captions=[rows[row].caption.strip() for row in used],
        image_index=positions(ids, [names[row] for row in used]),
        failures=failures,
        notes=[*_notes_on_names(ids, keys), *notes] if isinstance(images, FolderImages) else [],
        source=images,
    )


def _one_name_each(
    names: Sequence[str], keys: dict[str, str], reasons: dict[str, str | None]
) -> tuple[list[str], list[str]]:
    """The rows' names, where several that mean one image become one of them, and a note on these images.

    That is the file's own name where a row has it, else the first.
    """
    chosen: dict[str, str] = {}
    several = set()
    for name in dict.fromkeys(names):
        if reasons[name]:
            continue
        key = keys[name]
        if key in chosen:
            several.add(key)
        if key not in chosen or f"/{key}".endswith(f"/{name}"):
            chosen[key] = name
    notes = []
    if several:
        notes.append(f"images whose names are written in several ways, each taken as one image: {len(several):,}")
    return [name if reasons[name] else chosen[keys[name]] for name in names], notes


def _notes_on_names(ids: Sequence[str], keys: dict[str, str]) -> list[str]:
    """Notes on images whose files have other names than the table gives them."""
    other = [name for name in ids if keys[name] != name and not keys[name].endswith(f"/{name}")]
    bare = sum(is_image(keys[name]) and not is_image(name) and unquote(name) == name for name in other)
    quoted = sum(unquote(name) != name for name in other)
    notes = []
    if quoted:
        notes.append(f"images whose names are quoted as in addresses, taken: {quoted:,}")
    if bare:
        notes.append(f"images that are named without their suffix, taken: {bare:,}")
    if len(other) > bare + quoted:
        notes.append(
            f"images whose names differ in case, Unicode form or blanks, taken: {len(other) - bare - quoted:,}"
        )
    return notes


def usable_rows(
    names: Sequence[str], rows: Iterable[Row], reasons: dict[str, str | None]
) -> tuple[list[int], list[Failure]]:
    """The rows whose image and caption can be used, and a failure for each other one.

    Args:
        names: each row's image. reasons: why an image cannot be used, or None.
    """
    used = []
    failures = []
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        caption = row.caption.strip()
        of_image = row.fault or reasons[name]
        reason = of_image or why_unusable(caption)
        if reason:
            stage = "dataset" if of_image else "caption"
            repeated = f": {caption[:60]!r}" if caption or not row.fault else ""
            failures.append(Failure(name[:MAX_ID] or f"row {number + 1}", stage, f"{reason}{repeated}"))
        else:
            used.append(number)
    return used, failures


def without_captions(reasons: dict[str, str | None], captioned: Iterable[str]) -> list[str]:
    """The usable images that have no caption."""
    known = set(captioned)
    return [name for name in reasons if not reasons[name] and name not in known]


def positions(ids: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """The position of each name among the ids, int64."""
    position_of = {name: number for number, name in enumerate(ids)}
    return np.array([position_of[name] for name in names], dtype=np.int64)
