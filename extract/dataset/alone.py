"""Images without captions, and captions without images: what an index is built of."""

from pathlib import Path

import numpy as np

from onceover.base.places import place
from onceover.extract.address_images import image_folder
from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.text import read_lines, why_unusable
from onceover.extract.image_source import IMAGE_SUFFIXES, is_image
from onceover.extract.ledger import Failure
from onceover.extract.names import is_text


def read_images(folder: str | Path) -> Dataset:
    """Every image in a folder and the folders below it, without captions, in no split; an image's id is its path.

    Raises:
        DatasetError: no folder, or no image in it. ImageSourceError: it cannot be listed.
        PlaceError: an address that cannot be opened.
    """
    folder = place(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder; name one that holds images")
    source = image_folder(folder)
    listing = source.listing()
    images = sorted(filter(is_image, listing.names), key=lambda name: name.split("/"))
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
        raise DatasetError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){reason}")
    others = len(listing.names) - len(images)
    notes = [f"other files in {folder}, left alone: {others:,} (no images by their names)"] if others else []
    if listing.hidden:
        notes.append(f"hidden images and folders in {folder}, left alone: {listing.hidden:,} (as ._a.jpg and @eaDir)")
    none = np.empty(0, np.int64)
    return Dataset(folder, "folder", paths, list(paths), [""] * len(paths), [], none, failures, notes, source)


def read_captions(file: str | Path) -> Dataset:
    """The captions in a text file, one per line, without images; lines that cannot be used go into the ledger.

    Raises:
        DatasetError: an unreadable file, or one without captions. PlaceError: an address that cannot be opened.
    """
    file = place(file)
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(read_lines(file), 1)]
    while lines and not lines[-1][1]:
        lines.pop()  # the file's last line break is no empty line
    failures = [Failure(name, "dataset", reason) for name, line in lines if (reason := why_unusable(line))]
    captions = [line for _, line in lines if not why_unusable(line)]
    if not captions:
        raise DatasetError(f"{file} holds no captions; write one per line")
    index = np.full(len(captions), -1, np.int64)
    return Dataset(file.parent, "lines", [], [], [], captions, index, failures, [])
