"""The rows of a captions file -> a dataset: which can be used, which images they name, what goes into the ledger."""

import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onceover.extract.address_images import image_folder
from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.splits import column_splits
from onceover.extract.dataset.text import why_unusable
from onceover.extract.image_source import FolderImages, ImageSource
from onceover.extract.ledger import MAX_ID, Failure
from onceover.extract.listing import is_excluded
from onceover.extract.names import shown


class Row(NamedTuple):
    """A caption of an image, as a captions file has it. ``split`` is "" where the file says nothing of splits."""

    image: str
    caption: str
    split: str = ""


def folder_images(rows: Sequence[Row], root: Path, captions: Path, folders: Sequence[str]) -> FolderImages:
    """The images that rows name, in the first of several folders that has one of them.

    A folder with a file of the very name comes before one with a near name.

    Args:
        captions: their file, for the error. folders: relative to ``root``.

    Raises:
        DatasetError: no folder has any of them.
    """
    names = list(dict.fromkeys(image_name(row) for row in rows))
    candidates = [image_folder(root, folder) for folder in folders]
    for images in candidates:
        if images.has_any(names):
            return images
    for images in candidates:
        if images.has_near(names):
            return images
    places = ", ".join(str(root / folder) for folder in folders)
    raise DatasetError(
        f"none of the images that {captions} names is there (the first: {shown(names[0])}); looked in {places}"
    )


def write_images(folder: Path, images: dict[str, bytes]) -> None:
    """Writes the images of a layout's example into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        (folder / name).write_bytes(content)


def write_csv_example(captions: Path, images: Iterable[str]) -> None:
    """Writes the table of a layout's example: a caption for each image."""
    lines = [f"{name},Caption {number} ." for number, name in enumerate(images)]
    captions.write_text("\n".join(["image,caption", *lines]) + "\n")


def image_name(row: Row) -> str:
    """The name that a row gives its image, without blanks, with forward slashes."""
    return posixpath.normpath(row.image.strip().replace("\\", "/"))


def without_excluded(rows: Sequence[Row], patterns: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The rows whose images no pattern leaves out (``listing.is_excluded``), and notes on what the patterns did.

    Raises:
        DatasetError: no row is left.
    """
    kept = list(rows)
    notes = []
    for pattern in patterns:
        names = {image_name(row) for row in kept}
        excluded = {name for name in names if is_excluded(name, [pattern])}
        kept = [row for row in kept if image_name(row) not in excluded]
        notes.append(f"images left out by --exclude {pattern}: {len(excluded):,}")
    if rows and not kept:
        raise DatasetError(f"--exclude {' --exclude '.join(patterns)} leaves out all images; give other patterns")
    return kept, notes


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
    names = [image_name(row) for row in rows]
    keys, reasons = images.resolve(names)
    splits = column_splits(names, [row.split for row in rows], source)
    used, failures = usable_rows(names, rows, reasons)
    ids = list(dict.fromkeys(names[row] for row in used))
    failures += [Failure(name, "dataset", "no usable caption") for name in without_captions(reasons, ids)]
    if list_others:
        failures += images.images_beside({*keys.values()}, exclude)
    if not ids:
        raise DatasetError(f"{source}: no image is usable; the first reason: {failures[0].id}: {failures[0].reason}")
    renamed = sum(keys[name] != name and not keys[name].endswith(f"/{name}") for name in ids)
    notes = [f"images whose names differ in case, Unicode form or blanks, taken: {renamed:,}"] if renamed else []
    return Dataset(
        root=root,
        layout=layout,
        ids=ids,
        paths=[keys[name] for name in ids],
        splits=[splits[name] for name in ids],
        captions=[rows[row].caption.strip() for row in used],
        image_index=positions(ids, [names[row] for row in used]),
        failures=failures,
        notes=notes,
        source=images,
    )


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
        caption = row[1].strip()
        reason = reasons[name] or why_unusable(caption)
        if reason:
            stage = "dataset" if reasons[name] else "caption"
            failures.append(Failure(name[:MAX_ID] or f"row {number + 1}", stage, f"{reason}: {caption[:60]!r}"))
        else:
            used.append(number)
    return used, failures


def without_captions(reasons: dict[str, str | None], captioned: Iterable[str]) -> list[str]:
    """The images that could be used, had they a caption."""
    known = set(captioned)
    return [name for name in reasons if not reasons[name] and name not in known]


def positions(ids: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """The position of each name among the ids, int64."""
    position_of = {name: number for number, name in enumerate(ids)}
    return np.array([position_of[name] for name in names], dtype=np.int64)
