"""Layouts of captioned-image datasets by name: each is one file here, or a module of another package.

Another package adds a layout by an entry point of the group ``onceover.layouts``. A layout is a module, or an object,
with what ``Layout`` lists.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from onceover.base.registry import Registry
from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.rows import Row, assemble
from onceover.extract.dataset.splits import with_splits
from onceover.extract.image_source import FolderImages, ImageSource

LAYOUTS = Registry("onceover.extract.layouts", "onceover.layouts", "layout")


class Layout(Protocol):
    """A way in which datasets lie on a disk or elsewhere.

    Attributes:
        NAME: what a store's provenance calls it.
        PRIORITY: layouts are asked in ascending order; those here have 10 to 40, and the last refuses a folder with
            several CSV files.
        LOOKED_FOR: the files by which it is known, for the message that nothing was found.
        LISTS_ALL_IMAGES: images without captions that lie beside the others go into the ledger.
    """

    NAME: str
    PRIORITY: int
    LOOKED_FOR: str
    LISTS_ALL_IMAGES: bool

    def find(self, data: Path) -> Path | None:
        """The file with the captions, where the folder or file ``data`` has this layout; else None."""

    def rows(self, captions: Path) -> Iterator[Row]:
        """The captions with their images, in the order of the file.

        Raises:
            DatasetError: it cannot be read.
        """

    def images(self, root: Path, rows: Sequence[Row], captions: Path) -> ImageSource:
        """Where the images of the rows come from; ``root`` is the dataset's folder.

        Raises:
            DatasetError: none of them is there.
        """

    def write_example(self, folder: Path, images: dict[str, bytes]) -> Path:
        """Writes a small dataset of some images (name -> bytes), a caption each; returns what names it (``data``)."""


def read_dataset(data: str | Path, seed: int = 0) -> Dataset:
    """Reads the dataset in the folder ``data`` (or of the CSV or JSON file ``data``).

    Official split lists beside the captions are used; without them images are assigned to train, dev and test
    (80, 10, 10 %) by a hash of ``seed`` and their id, so that an image keeps its split when others are added.
    Images without captions go into the ledger, unless a CSV or JSON file lists what belongs to the dataset.

    Raises:
        DatasetError: nothing readable there, no usable image, or an image in two splits.
    """
    data = Path(data)
    if not data.exists():
        raise DatasetError(f"{data} does not exist; name the dataset's folder, or its CSV or JSON file")
    layout, captions = _find(data)
    root = captions.parent if data.is_file() else data
    rows = list(layout.rows(captions))
    if not rows:
        raise DatasetError(f"{captions} holds no captions; is the download complete?")
    images = layout.images(root, rows, captions)
    dataset = assemble(root, layout.NAME, rows, images, captions, layout.LISTS_ALL_IMAGES)
    if any(dataset.splits):
        return dataset
    return with_splits(dataset, captions, seed)


def images_of(data: Path, keys: Sequence[str]) -> ImageSource:
    """The source of a store's images: files below a folder, where ``keys`` lead to some; else the layout's at ``data``.

    Captions are not needed, and not read, where the images lie in a folder.
    """
    folder = FolderImages(data if data.is_dir() else data.parent)
    if any(folder.stat(key)[0] >= 0 for key in keys):
        return folder
    try:
        return read_dataset(data).images
    except DatasetError:
        return folder  # whose files are missed by name when they are opened


def _find(data: Path) -> tuple[Layout, Path]:
    """The layout that ``data`` has, and the file with the captions.

    Raises:
        DatasetError: none.
    """
    layouts: list[Layout] = sorted(map(LAYOUTS.load, LAYOUTS.names()), key=lambda layout: layout.PRIORITY)
    for layout in layouts:
        captions = layout.find(data)
        if captions is not None:
            return layout, captions
    if data.is_file():
        raise DatasetError(f"{data} is neither a folder nor a CSV or JSON file; name the dataset's folder")
    *others, last = [layout.LOOKED_FOR for layout in layouts]
    raise DatasetError(f"{data} holds no captions: looked for {', '.join(others)} and {last}")
