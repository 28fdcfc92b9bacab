"""Layouts of captioned-image datasets by name: each is one file here, or a module of another package.

Another package adds a layout by an entry point of the group ``onceover.layouts``. A layout is a module, or an object,
with what ``Layout`` lists.
"""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from onceover.base.addresses import Address, path_of
from onceover.base.registry import Registry
from onceover.extract.address_images import image_folder
from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.examples import ExampleImage
from onceover.extract.dataset.image_folders import folder_images
from onceover.extract.dataset.inventory import inventory
from onceover.extract.dataset.reading import DEFAULT, ReadOptions, read_options
from onceover.extract.dataset.rows import Row, assemble, image_name, without_excluded
from onceover.extract.dataset.splits import with_splits
from onceover.extract.image_source import FolderImages, ImageSource
from onceover.extract.listing import subfolders
from onceover.extract.names import shown

if TYPE_CHECKING:
    from onceover.extract.store import FeatureStore

LAYOUTS = Registry("onceover.extract.layouts", "onceover.layouts", "layout")
_DEEPEST = 4  # folders that hold nothing but a folder, with the one in them


@dataclass(frozen=True)
class UnreadDataset:
    """A dataset that lies in a layout. Little of it has been read.

    Attributes:
        root: the folder that the images' keys start from.
        captions: the file with the captions, or the folder, for messages; split lists are looked for beside it.
        rows: gives the captions with their images, in the order of the file. Raises DatasetError where it cannot be
            read.
        images: given the rows, where their images come from. Raises DatasetError where none of them is there.
        form: what was taken for what, for the user: "TSV, images from `filepath`, captions from `title`".
        lists_all_images: images without captions that lie beside the others go into the ledger.
        notes: what the user should be told; complete once ``images`` has been called.
    """

    root: Path
    captions: Path
    rows: Callable[[], Iterable[Row]]
    images: Callable[[Sequence[Row]], ImageSource]
    form: str = ""
    lists_all_images: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SplitTable:
    """A table of a dataset that lies in several: one for each split, as a rule.

    Attributes:
        captions: the file. rows: gives its rows.
        folders: relative to the dataset's root, where the images of this part are looked for.
        split: that of the rows which name none.
    """

    captions: Path
    rows: Callable[[], Iterable[Row]]
    folders: Sequence[str]
    split: str = ""


def beside(
    captions: Path,
    root: Path,
    rows: Callable[[], Iterable[Row]],
    folders: Sequence[str],
    options: ReadOptions,
    form: str = "",
    lists_all_images: bool = False,
) -> UnreadDataset:
    """A dataset whose images are files in the first of some folders that has one of them.

    Args:
        folders: relative to ``root``; where the user names another root, only that is looked in.
        captions, rows, form, lists_all_images: as ``UnreadDataset`` has them.
    """
    if options.images_root is not None:
        root = options.images_root
        folders = (".",)
    notes: list[str] = []

    def images(rows: Sequence[Row]) -> FolderImages:
        source = folder_images(rows, root, captions, folders)
        notes.extend(_note_on_root(source))
        return source

    return UnreadDataset(root, captions, rows, images, form, lists_all_images, notes)


def in_parts(root: Path, parts: Sequence[SplitTable], options: ReadOptions, form: str = "") -> UnreadDataset:
    """A dataset of several tables with a folder of images each, or one for all.

    An image's name is its path from ``root``, so that ``train/0.jpg`` and ``test/0.jpg`` are two. A part none of whose
    images is there is left alone, and a note says so. Parts that are all of one split say nothing of splits.
    """
    base = options.images_root or root
    notes: list[str] = []

    def rows() -> Iterator[Row]:
        placed, absent = _placed(parts, base)
        if not placed and absent:
            raise absent[0][1]
        several = len({part.split for part, _, _ in placed}) > 1
        for part, read, images in placed:
            notes.extend(_note_on_root(images))
            for row in read:
                name = posixpath.normpath(posixpath.join(images.folder, images.local(image_name(row))))
                yield row._replace(image=name, split=row.split or (part.split if several else ""))
        notes.extend(f"left alone: {part.captions}, none of whose images is there" for part, _ in absent)

    return UnreadDataset(base, parts[0].captions, rows, lambda _: image_folder(base), form, notes=notes)


def _placed(
    parts: Sequence[SplitTable], root: Path
) -> tuple[list[tuple[SplitTable, list[Row], FolderImages]], list[tuple[SplitTable, DatasetError]]]:
    """The parts whose images are there, with their rows and images, and those whose images are not, with the error."""
    placed: list[tuple[SplitTable, list[Row], FolderImages]] = []
    absent: list[tuple[SplitTable, DatasetError]] = []
    for part in parts:
        read = list(part.rows())
        if not read:
            continue
        try:
            placed.append((part, read, folder_images(read, root, part.captions, part.folders)))
        except DatasetError as error:
            absent.append((part, error))
    return placed, absent


def _note_on_root(images: FolderImages) -> list[str]:
    """A note where the images' names begin with a folder that is not here."""
    if not images.prefix:
        return []
    there = images.root / images.folder
    return [f"images' names begin with {shown(images.prefix)}, which is left out: taken from {there}"]


class Layout(Protocol):
    """A way in which datasets lie on a disk or elsewhere.

    Attributes:
        NAME: what a store's provenance calls it.
        PRIORITY: layouts are asked in ascending order, so that the one that says more about a folder comes first.
        LOOKED_FOR: the files by which it is known, for the message that nothing was found.
        EXAMPLE: how such a dataset looks, in two short lines, for the same message.
        HOLDS: what the form holds beside one caption of each image: several ``captions``, ``splits``.
        SUFFIXES: the files that make it likely that this layout was meant, such as ``.csv``.

    A layout may have ``near(data, options)`` too: why what is at ``data`` comes near to it and is not taken, or None.
    """

    NAME: str
    PRIORITY: int
    LOOKED_FOR: str
    EXAMPLE: str
    HOLDS: tuple[str, ...]
    SUFFIXES: tuple[str, ...]

    def find(self, data: Path, options: ReadOptions) -> UnreadDataset | None:
        """The dataset, where the folder, file or pattern ``data`` has this layout; else None.

        ``data`` may be an address (``base.addresses``), and need not exist where it is a pattern.

        Raises:
            DatasetError: it has this layout, and cannot be read.
        """

    def write_example(self, folder: Path, images: Sequence[ExampleImage]) -> Path:
        """Writes a small dataset of some images, as far as the form holds what they have; returns what names it.

        Where it is read with options, those are ``EXAMPLE_OPTIONS``.
        """


def read_dataset(data: str | Path, seed: int = 0, options: ReadOptions = DEFAULT) -> Dataset:
    """Reads the dataset that ``data`` names: a folder, a file, a pattern of files, or an address of one of these.

    Official split lists beside the captions are used; without them images are assigned to train, dev and test
    (80, 10, 10 %) by a hash of ``seed`` and their id, so that an image keeps its split when others are added.
    Images without captions go into the ledger, unless a table lists what belongs to the dataset.

    Raises:
        DatasetError: nothing readable there, no usable image, or an image in two splits.
        AddressError: an address that cannot be opened.
    """
    at = path_of(data)
    layout, found = _find(at, options)
    rows = list(found.rows())
    if not rows:
        raise DatasetError(f"{found.captions} holds no captions; is the download complete?")
    images = found.images(rows)
    rows, notes = without_excluded(rows, options.exclude)
    dataset = assemble(found.root, layout.NAME, rows, images, found.captions, found.lists_all_images, options.exclude)
    taken = found.form or layout.NAME
    notes = [*found.notes, *notes, *dataset.notes]
    dataset = replace(dataset, named=at, reading=options, taken=f"{taken}: {len(rows):,} rows", notes=notes)
    if any(dataset.splits):
        return dataset
    return with_splits(dataset, found.captions, seed)


def images_of(data: str | Path, keys: Sequence[str], options: ReadOptions = DEFAULT) -> ImageSource:
    """The source of a store's images: files below a folder, where ``keys`` lead to some; else the layout's at ``data``.

    Captions are not needed, and not read, where the images lie in a folder.
    """
    at = path_of(data)
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


def _find(data: Path, options: ReadOptions) -> tuple[Layout, UnreadDataset]:
    """The layout that ``data`` has, and the dataset in it.

    Raises:
        DatasetError: none.
    """
    layouts: list[Layout] = sorted(map(LAYOUTS.load, LAYOUTS.names()), key=lambda layout: layout.PRIORITY)
    place_of = data
    for _ in range(_DEEPEST):
        for layout in layouts:
            found = layout.find(place_of, options)
            if found is not None:
                return layout, found
        inner = _only_folder(place_of)
        if inner is None:
            break
        place_of = inner
    raise DatasetError(_not_understood(data, layouts, options))


def _only_folder(data: Path) -> Path | None:
    """The one folder in a folder, as unpacking an archive leaves it; None where there are several or none."""
    folders = subfolders(data)
    return folders[0] if len(folders) == 1 else None


def _not_understood(data: Path, layouts: Sequence[Layout], options: ReadOptions) -> str:
    """What is at ``data``, and the form that it comes nearest to."""
    if not data.exists():
        if isinstance(data, Address) and not data.lists:
            return f"{data} is no file of a known form; web servers list no folders: name the captions file"
        return f"{data} does not exist; name the dataset's folder or file"
    for layout in layouts:
        near = layout.near(data, options) if hasattr(layout, "near") else None
        if near is not None:
            return str(near)
    there = inventory(data)
    if not there.counts:
        return f"{data} is empty; name the folder or file of a dataset"
    if there.only_images:
        by_class = ""
        if any(folder for folder, _ in there.counts):
            by_class = ", or, where folders are classes, --caption-template 'a photo of a {}'"
        return (
            f"{data} holds images without captions ({there}); index them with "
            f"onceover index --run RUN --images {data}, "
            f"or write their captions into captions.csv, a line for each: image,caption{by_class}"
        )
    nearest = _nearest(layouts, there.suffixes)
    example = " and below it ".join(nearest.EXAMPLE.splitlines())
    return (
        f"{data} holds no captions in a form that is understood; there is {there}. "
        f"The nearest form is {nearest.LOOKED_FOR}: {example} (docs/data.md has all forms)"
    )


def _nearest(layouts: Sequence[Layout], suffixes: set[str]) -> Layout:
    """The layout that files of these suffixes come nearest to; a table where they come near to none."""
    table = next(layout for layout in layouts if layout.NAME == "csv")
    for layout in (table, *layouts):
        if not suffixes.isdisjoint(layout.SUFFIXES):
            return layout
    return table
