"""Layouts of captioned-image datasets by name: each is one file here, or a module of another package.

Another package adds a layout by an entry point of the group ``onceover.layouts``. A layout is a module, or an object,
with what ``Layout`` lists.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from onceover.base.places import Address, place
from onceover.base.registry import Registry
from onceover.extract.address_images import image_folder
from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.inventory import inventory
from onceover.extract.dataset.reading import DEFAULT, ReadOptions, read_options
from onceover.extract.dataset.rows import Row, assemble, folder_images, without_excluded
from onceover.extract.dataset.splits import with_splits
from onceover.extract.image_source import ImageSource

if TYPE_CHECKING:
    from onceover.extract.store import FeatureStore

LAYOUTS = Registry("onceover.extract.layouts", "onceover.layouts", "layout")


@dataclass(frozen=True)
class Found:
    """A dataset that lies in a layout. Little of it has been read.

    Attributes:
        root: the folder that the images' keys start from.
        captions: the file with the captions, or the folder, for messages; split lists are looked for beside it.
        rows: gives the captions with their images, in the order of the file. Raises DatasetError where it cannot be
            read.
        images: given the rows, where their images come from. Raises DatasetError where none of them is there.
        form: what was taken for what, for the user: "TSV, images from `filepath`, captions from `title`".
        lists_all_images: images without captions that lie beside the others go into the ledger.
    """

    root: Path
    captions: Path
    rows: Callable[[], Iterable[Row]]
    images: Callable[[Sequence[Row]], ImageSource]
    form: str = ""
    lists_all_images: bool = False


def beside(
    captions: Path,
    root: Path,
    rows: Callable[[], Iterable[Row]],
    folders: Sequence[str],
    options: ReadOptions,
    form: str = "",
    lists_all_images: bool = False,
) -> Found:
    """A dataset whose images are files in the first of some folders that has one of them.

    Args:
        folders: relative to ``root``; where the user names another root, only that is looked in.
        captions, rows, form, lists_all_images: as ``Found`` has them.
    """
    if options.images_root is not None:
        root = options.images_root
        folders = (".",)
    images = partial(folder_images, root=root, captions=captions, folders=folders)
    return Found(root, captions, rows, images, form, lists_all_images)


class Layout(Protocol):
    """A way in which datasets lie on a disk or elsewhere.

    Attributes:
        NAME: what a store's provenance calls it.
        PRIORITY: layouts are asked in ascending order, so that the one that says more about a folder comes first.
        LOOKED_FOR: the files by which it is known, for the message that nothing was found.
        EXAMPLE: how such a dataset looks, in two short lines, for the same message.
        SUFFIXES: the files that make it likely that this layout was meant, such as ``.csv``.
    """

    NAME: str
    PRIORITY: int
    LOOKED_FOR: str
    EXAMPLE: str
    SUFFIXES: tuple[str, ...]

    def find(self, data: Path, options: ReadOptions) -> Found | None:
        """The dataset, where the folder, file or pattern ``data`` has this layout; else None.

        ``data`` may be an address (``base.places``), and need not exist where it is a pattern.

        Raises:
            DatasetError: it has this layout, and cannot be read.
        """

    def write_example(self, folder: Path, images: dict[str, bytes]) -> Path:
        """Writes a small dataset of some images (name -> bytes), a caption each; returns what names it (``data``)."""


def read_dataset(data: str | Path, seed: int = 0, options: ReadOptions = DEFAULT) -> Dataset:
    """Reads the dataset that ``data`` names: a folder, a file, a pattern of files, or an address of one of these.

    Official split lists beside the captions are used; without them images are assigned to train, dev and test
    (80, 10, 10 %) by a hash of ``seed`` and their id, so that an image keeps its split when others are added.
    Images without captions go into the ledger, unless a table lists what belongs to the dataset.

    Raises:
        DatasetError: nothing readable there, no usable image, or an image in two splits.
        PlaceError: an address that cannot be opened.
    """
    at = place(data)
    layout, found = _find(at, options)
    rows = list(found.rows())
    if not rows:
        raise DatasetError(f"{found.captions} holds no captions; is the download complete?")
    images = found.images(rows)
    rows, notes = without_excluded(rows, options.exclude)
    dataset = assemble(
        found.root, layout.NAME, rows, images, found.captions, found.lists_all_images, options.exclude
    )
    taken = found.form or layout.NAME
    dataset = replace(
        dataset,
        named=at,
        reading=options,
        taken=f"{taken}: {len(rows):,} rows",
        notes=[*notes, *dataset.notes],
    )
    if any(dataset.splits):
        return dataset
    return with_splits(dataset, found.captions, seed)


def images_of(data: str | Path, keys: Sequence[str], options: ReadOptions = DEFAULT) -> ImageSource:
    """The source of a store's images: files below a folder, where ``keys`` lead to some; else the layout's at ``data``.

    Captions are not needed, and not read, where the images lie in a folder.
    """
    at = place(data)
    folder = image_folder(options.images_root or (at if at.is_dir() else at.parent))
    if any(folder.stat(key)[0] >= 0 for key in keys):
        return folder
    try:
        return read_dataset(at, options=options).images
    except DatasetError:
        return folder  # whose files are missed by name when they are opened


def stored_images(store: "FeatureStore", data: str | Path | None = None) -> ImageSource:
    """The source of a store's images, where the dataset was when it was encoded, or at ``data``, where it is now."""
    provenance = store.provenance
    options = read_options(provenance.get("reading", {}))
    return images_of(data or provenance.get("named", provenance["data"]), store.image_paths, options)


def _find(data: Path, options: ReadOptions) -> tuple[Layout, Found]:
    """The layout that ``data`` has, and the dataset in it.

    Raises:
        DatasetError: none.
    """
    layouts: list[Layout] = sorted(map(LAYOUTS.load, LAYOUTS.names()), key=lambda layout: layout.PRIORITY)
    for layout in layouts:
        found = layout.find(data, options)
        if found is not None:
            return layout, found
    raise DatasetError(_not_understood(data, layouts))


def _not_understood(data: Path, layouts: Sequence[Layout]) -> str:
    """What is at ``data``, and the form that it comes nearest to."""
    if not data.exists():
        if isinstance(data, Address) and not data.lists:
            return f"{data} is no file of a known form; web servers list no folders: name the captions file"
        return f"{data} does not exist; name the dataset's folder or file"
    there = inventory(data)
    if not there.counts:
        return f"{data} is empty; name the folder or file of a dataset"
    if there.only_images:
        return (
            f"{data} holds images without captions ({there}); index them with onceover index --images {data}, "
            "or write captions: a line image,caption for each in captions.csv"
        )
    near = [layout for layout in layouts if not there.suffixes.isdisjoint(layout.SUFFIXES)]
    nearest = near[0] if near else layouts[-1]
    example = " ; ".join(nearest.EXAMPLE.splitlines())
    return (
        f"{data} holds no captions in a form that is understood: {there}; the nearest form is "
        f"{nearest.LOOKED_FOR}: {example}"
    )
