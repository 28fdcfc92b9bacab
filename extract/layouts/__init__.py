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
from onceover.extract.image_source import ImageSource

LAYOUTS = Registry("onceover.extract.layouts", "onceover.layouts", "layout")


class Layout(Protocol):
    """What a layout offers.

    Attributes:
        PRIORITY: layouts are asked in ascending order; those here have 10 to 40.
        LOOKED_FOR: the files by which it is known, for the message that nothing was found.
        LISTS_ALL_IMAGES: images without captions that lie beside the others go into the ledger.
    """

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
    name, layout, captions = _find(data)
    root = captions.parent if data.is_file() else data
    rows = list(layout.rows(captions))
    if not rows:
        raise DatasetError(f"{captions} holds no captions; is the download complete?")
    images = layout.images(root, rows, captions)
    dataset = assemble(root, name, rows, images, captions, layout.LISTS_ALL_IMAGES)
    if any(dataset.splits):
        return dataset
    return with_splits(dataset, captions, seed)


def _find(data: Path) -> tuple[str, Layout, Path]:
    """The name of the layout that ``data`` has, the layout, and the file with the captions.

    Raises:
        DatasetError: none.
    """
    layouts = {name: LAYOUTS.load(name) for name in LAYOUTS.names()}
    layouts = dict(sorted(layouts.items(), key=lambda item: item[1].PRIORITY))
    for name, layout in layouts.items():
        captions = layout.find(data)
        if captions is not None:
            return name, layout, captions
    if data.is_file():
        raise DatasetError(f"{data} is neither a folder nor a CSV or JSON file; name the dataset's folder")
    looked_for = ", ".join(layout.LOOKED_FOR for layout in layouts.values())
    raise DatasetError(f"{data} holds no captions: looked for {looked_for}")
