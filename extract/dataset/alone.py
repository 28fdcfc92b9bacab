"""Images without captions, and captions without images, to build an index of."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from onceover.base.addresses import is_address, path_of
from onceover.extract.address_images import image_folder
from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.text import read_lines, why_unusable
from onceover.extract.formats import IMAGE_SUFFIXES
from onceover.extract.ledger import Failure
from onceover.extract.listing import Listing, is_image, kinds_of
from onceover.extract.names import is_text


def read_folders(folders: Sequence[str | Path], exclude: Sequence[str] = ()) -> Dataset:
    """Every image in some folders and the folders below them, without captions, in no split.

    An image's id is its path in the folder; where there are several folders, its path on this machine.

    Args:
        exclude: patterns of images and folders that are left alone, as ``listing.is_excluded`` takes them.

    Raises:
        DatasetError: the same folder twice, one in another, an address beside others; and those of ``read_images``.
    """
    if len(folders) == 1:
        return read_images(folders[0], exclude)
    roots = [path_of(folder).resolve() for folder in folders]
    _check_apart(roots)
    datasets = [read_images(folder, exclude) for folder in folders]
    paths: list[str] = []
    failures: list[Failure] = []
    notes: list[str] = []
    for root, dataset in zip(roots, datasets, strict=True):
        paths += [str(root / path) for path in dataset.paths]
        failures += [failure._replace(id=str(root / failure.id)) for failure in dataset.failures]
        notes += dataset.notes
    return replace(
        datasets[0],
        root=Path(roots[0].anchor),  # which a path of this machine, an image's key, replaces
        ids=list(paths),
        paths=paths,
        splits=[""] * len(paths),
        failures=failures,
        notes=notes,
        source=None,
    )


def _check_apart(roots: Sequence[Path]) -> None:
    """Refuses folders of which one is another one, or lies in it, and addresses."""
    for number, root in enumerate(roots):
        if is_address(root):
            raise DatasetError(f"{root} is an address, which is indexed by itself; several folders lie on this machine")
        for other in roots[:number]:
            if root == other:
                raise DatasetError(f"{root} is named twice; name each folder once")
            if root in other.parents or other in root.parents:
                outer = min(root, other, key=_depth)
                inner = max(root, other, key=_depth)
                raise DatasetError(f"{inner} lies in {outer}, which is named, too; name the outer one alone")


def _depth(path: Path) -> int:
    return len(path.parts)


def read_images(folder: str | Path, exclude: Sequence[str] = ()) -> Dataset:
    """Every image in a folder and the folders below it, without captions, in no split; an image's id is its path.

    Args:
        exclude: patterns of images and folders that are left alone, as ``listing.is_excluded`` takes them.

    Raises:
        DatasetError: no folder, or no image in it. ImageSourceError: it cannot be listed.
        AddressError: an address that cannot be opened.
    """
    folder = path_of(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder; name one that holds images")
    source = image_folder(folder)
    listing = source.listing(exclude)
    images = list(filter(is_image, listing.names))
    failures = listing.failures
    paths = []
    for name in images:
        reason = source.why_unreadable(name) if is_text(name) else "its name is not UTF-8"
        if reason:
            failures.append(Failure(name, "dataset", reason))
        else:
            paths.append(name)
    if not paths:
        reason = f"; the first reason: {failures[0].id}: {failures[0].reason}" if failures else ""
        if listing.excluded:
            reason = f"; excluded: {listing.excluded:,}"
        raise DatasetError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){reason}")
    notes = _notes(folder, listing)
    no_captions = np.empty(0, np.int64)
    splits = [""] * len(paths)
    return Dataset(folder, "folder", paths, list(paths), splits, [], no_captions, failures, notes, source)


def _notes(folder: Path, listing: Listing) -> list[str]:
    """Notes on the files that are left alone in a folder."""
    notes = []
    others = [name for name in listing.names if not is_image(name)]
    if others:
        notes.append(f"files in {folder} that are no images by their names, left alone: {kinds_of(others)}")
    if listing.hidden:
        notes.append(f"hidden images and folders in {folder}, left alone: {listing.hidden:,} (as ._a.jpg and @eaDir)")
    if listing.excluded:
        notes.append(f"excluded images in {folder}, left alone: {listing.excluded:,}")
    notes += [f"nothing in {folder} matches the pattern {pattern!r} to exclude" for pattern in listing.unmatched]
    return notes


def read_captions(file: str | Path) -> Dataset:
    """The captions in a text file, one per line, without images; lines that cannot be used go into the ledger.

    Raises:
        DatasetError: an unreadable file, or one without captions. AddressError: an address that cannot be opened.
    """
    file = path_of(file)
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(read_lines(file), 1)]
    while lines and not lines[-1][1]:
        lines.pop()  # the file's last line break is no empty line
    failures = [Failure(name, "dataset", reason) for name, line in lines if (reason := why_unusable(line))]
    captions = [line for _, line in lines if not why_unusable(line)]
    if not captions:
        raise DatasetError(f"{file} holds no captions; write one per line")
    index = np.full(len(captions), -1, np.int64)
    return Dataset(file.parent, "lines", [], [], [], captions, index, failures, [])
