"""The rows of a captions file -> a dataset: which can be used, which images they name, what goes into the ledger."""

import csv
import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from onceover.base.places import is_address
from onceover.extract.address_images import image_folder, may_be_folder
from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.splits import column_splits
from onceover.extract.dataset.text import why_unusable
from onceover.extract.image_source import FolderImages, ImageSource
from onceover.extract.ledger import MAX_ID, Failure
from onceover.extract.listing import is_excluded, is_image, subfolders
from onceover.extract.names import shown

#: where the images of a table are looked for
FOLDERS = (
    *(".", "Images", "images", "image", "imgs", "img", "photos", "pictures", "JPEGImages"),
    *("Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "flickr30k-images", "flickr30k_images"),
)
_FIRST = 100  # names by which a folder is known in which nobody said that they are
_MOST_FOLDERS = 200  # that are looked through


class Row(NamedTuple):
    """A caption of an image, as a captions file has it. ``split`` is "" where the file says nothing of splits.

    ``fault``: why the row cannot be used, where that is known already; it goes into the ledger.
    """

    image: str
    caption: str
    split: str = ""
    fault: str = ""


def folder_images(rows: Sequence[Row], root: Path, captions: Path, folders: Sequence[str]) -> FolderImages:
    """The images that rows name, in the first of several folders that has one of them.

    A folder with a file of the very name comes before one with a near name; then come paths that begin with a folder of
    another machine or program, and last the one folder below ``root`` that has the first images.

    Args:
        captions: their file, for the error. folders: relative to ``root``.

    Raises:
        DatasetError: no folder has any of them.
    """
    start = image_folder(root)
    names = list(filter(None, dict.fromkeys(start.local(image_name(row)) for row in rows)))
    if not names:
        raise DatasetError(f"{captions} names no image; say which column does with --image-column")
    candidates = [image_folder(root, folder) for folder in dict.fromkeys(folders) if may_be_folder(root / folder)]
    for images in candidates:
        if images.has_any(names):
            return images if is_address(root) else _fullest(images, candidates, names[:_FIRST])
    for images in candidates:
        if images.has_near(names):
            return images
    moved = _of_another_root(names, root, folders)
    if moved is not None:
        return moved
    first = names[:_FIRST]
    below = [images for images in _folders_below(root) if images.has_any(first) or images.has_near(first)]
    if len(below) == 1:
        return below[0]
    if below:
        places = " and ".join(str(root / images.folder) for images in below[:2])
        raise DatasetError(f"images that {captions} names are in {places}; say which to take with --images-root")
    if names[0].startswith(("http:/", "https:/")):
        raise DatasetError(
            f"{captions} names images by their addresses ({shown(names[0])}); download them first, for example with "
            "img2dataset, and name the folder that they are in then"
        )
    places = ", ".join(str(root / images.folder) for images in candidates) or str(root)
    raise DatasetError(
        f"none of the images that {captions} names is there (the first: {shown(names[0])}); looked in {places}; "
        "name their folder with --images-root"
    )


def _fullest(images: FolderImages, candidates: Sequence[FolderImages], names: Sequence[str]) -> FolderImages:
    """The folder that has most of some names, ``images`` where it has half of them: a few samples may lie elsewhere."""

    def count(folder: FolderImages) -> int:
        return sum(folder.has_any([name]) for name in names)

    if 2 * count(images) >= len(names):
        return images
    return max([images, *candidates, *_folders_below(images.root)], key=count)


def _of_another_root(names: Sequence[str], root: Path, folders: Sequence[str]) -> FolderImages | None:
    """The images of names that all begin with a folder that is not here, where what follows it is here."""
    names = [name for name in names if "/" in name]
    if not names:
        return None
    parts = [name.split("/") for name in names]
    most = min(len(part) for part in parts) - 1
    shared = next((at for at in range(most) if len({part[at] for part in parts}) > 1), most)
    for dropped in range(1, shared + 1):
        prefix = "/".join(parts[0][:dropped]) + "/"
        first = [name[len(prefix) :] for name in names[:_FIRST]]
        for folder in dict.fromkeys(folders):
            images = image_folder(root, folder, prefix)
            if images.has_any(first) or images.has_near(first):
                return images
    return None


def _folders_below(root: Path) -> list[FolderImages]:
    """The folders in ``root`` and in those, in their order, as places of images."""
    folders: list[str] = []
    for first in subfolders(root)[:_MOST_FOLDERS]:
        folders.append(first.name)
        folders += [f"{first.name}/{second.name}" for second in subfolders(first)[:_MOST_FOLDERS]]
    return [image_folder(root, folder) for folder in folders]


class ExampleImage(NamedTuple):
    """An image of a layout's example: its file name and bytes, one or more captions, and its split or ""."""

    name: str
    content: bytes
    captions: Sequence[str]
    split: str = ""


def write_images(folder: Path, images: Iterable[ExampleImage]) -> None:
    """Writes the images of a layout's example into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        (folder / image.name).write_bytes(image.content)


def by_split(images: Sequence[ExampleImage]) -> dict[str, list[ExampleImage]]:
    """The images of each split, in their order."""
    groups: dict[str, list[ExampleImage]] = {}
    for image in images:
        groups.setdefault(image.split, []).append(image)
    return groups


def write_csv_example(captions: Path, images: Sequence[ExampleImage], with_splits: bool = False) -> None:
    """Writes the table of a layout's example, a row for each caption."""
    with captions.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "caption", "split"] if with_splits else ["image", "caption"])
        for image in images:
            for caption in image.captions:
                table.writerow([image.name, caption, image.split] if with_splits else [image.name, caption])


def image_name(row: Row) -> str:
    """The name that a row gives its image, without blanks, with forward slashes."""
    name = row.image.strip().replace("\\", "/")
    return posixpath.normpath(name) if name else ""


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
    names = [images.local(image_name(row)) for row in rows]
    keys, reasons = images.resolve(names)
    named = [(name, row.split) for name, row in zip(names, rows, strict=True) if name]
    splits = column_splits([name for name, _ in named], [split for _, split in named], source)
    used, failures = usable_rows(names, rows, reasons)
    ids = list(dict.fromkeys(names[row] for row in used))
    faulty = {name for name, row in zip(names, rows, strict=True) if row.fault}
    for name in without_captions(reasons, ids):
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
        notes=_notes_on_names(ids, keys) if isinstance(images, FolderImages) else [],
        source=images,
    )


def _notes_on_names(ids: Sequence[str], keys: dict[str, str]) -> list[str]:
    """How many images have other names than the table gives them."""
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
    """The images that could be used, had they a caption."""
    known = set(captioned)
    return [name for name in reasons if not reasons[name] and name not in known]


def positions(ids: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """The position of each name among the ids, int64."""
    position_of = {name: number for number, name in enumerate(ids)}
    return np.array([position_of[name] for name in names], dtype=np.int64)
