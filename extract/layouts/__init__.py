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
from onceover.extract.dataset.caption_notes import notes_on_captions
from onceover.extract.dataset.examples import ExampleImage
from onceover.extract.dataset.image_folders import folder_images, images_in
from onceover.extract.dataset.inventory import inventory
from onceover.extract.dataset.reading import DEFAULT, ReadOptions, read_options
from onceover.extract.dataset.rows import Row, assemble, image_name, without_excluded
from onceover.extract.dataset.splits import with_splits
from onceover.extract.image_source import FolderImages, ImageSource
from onceover.extract.ledger import NO_SUCH_IMAGE
from onceover.extract.listing import subfolders
from onceover.extract.names import shown

if TYPE_CHECKING:
    from onceover.extract.store import FeatureStore

LAYOUTS = Registry("onceover.extract.layouts", "onceover.layouts", "layout")
#: what to do with files that are not read as they are
_TO_CONVERT = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the sheet as CSV"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"), "unpack it"),
}
_DEEPEST = 4  # levels of folders that are looked into, where each holds one folder and nothing else


@dataclass(frozen=True)
class UnreadDataset:
    """A dataset whose layout is known, before its rows are read.

    Attributes:
        root: the folder that the images' keys start from.
        captions: the file or folder with the captions, for messages; split lists are looked for beside it.
        rows: reads the captions with their images, in the order of the file. Raises DatasetError where it cannot.
        images: gives the source of the rows' images. Raises DatasetError where none of them is there.
        form: how the dataset is read, for the user: "TSV, images from `filepath`, captions from `title`".
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
    """One of several tables of a dataset, usually one for each split.

    Attributes:
        captions: the file. rows: reads its rows.
        folders: where its images are looked for, relative to the dataset's root.
        split: the split of rows that name none.
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
    """A dataset whose images are files in one folder: the first of ``folders`` that has one of them.

    Args:
        folders: relative to ``root``; where the user names the images' folder, only that is searched.
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

    An image's name is its path from ``root``, so that ``train/0.jpg`` and ``test/0.jpg`` are two images. The rows of a
    table without any of its images are left out, each with a reason for the ledger, and a note tells their number; so
    are rows that an earlier table has.
    Where all other tables are of one split, the split is not used.
    """
    base = options.images_root or root
    notes: list[str] = []

    def rows() -> Iterator[Row]:
        present, absent = _by_presence(parts, base)
        several = len({part.split for part, _, _ in present}) > 1
        first_in: dict[tuple[str, str], Path] = {}
        for part, read, images in present:
            notes.extend(note for note in _note_on_root(images) if note not in notes)
            for row in read:
                name = posixpath.normpath(posixpath.join(images.folder, images.local(image_name(row))))
                first = first_in.setdefault((name, row.caption), part.captions)
                fault = row.fault if first == part.captions else f"the row is in {first.name} too"
                yield row._replace(image=name, split=row.split or (part.split if several else ""), fault=fault)
        for part, read in absent:
            names = {image_name(row) for row in read}
            notes.append(
                f"none of the {len(names):,} images that {part.captions} names is there; its rows ({len(read):,}) are "
                "left out (if they lie elsewhere, name the folder above all images with --images-root)"
            )
            fault = f"{NO_SUCH_IMAGE}, nor any other of {part.captions.name}"
            for row in read:
                yield row._replace(image=image_name(row), split="", fault=row.fault or fault)

    return UnreadDataset(base, parts[0].captions, rows, lambda _: image_folder(base), form, notes=notes)


def _by_presence(
    parts: Sequence[SplitTable], root: Path
) -> tuple[list[tuple[SplitTable, list[Row], FolderImages]], list[tuple[SplitTable, list[Row]]]]:
    """The tables whose images are there, with their rows and images, and the other tables, with their rows.

    A table's images are looked for in its own folders, then in those of the other tables.

    Raises:
        DatasetError: no table has any of its images.
    """
    present: list[tuple[SplitTable, list[Row], FolderImages]] = []
    absent: list[tuple[SplitTable, list[Row]]] = []
    errors: list[DatasetError] = []
    for part in parts:
        read = list(part.rows())
        if not read:
            continue
        try:
            present.append((part, read, folder_images(read, root, part.captions, part.folders)))
        except DatasetError as error:
            absent.append((part, read))
            errors.append(error)
    if errors and not present:
        raise errors[0]
    folders = [images.folder for _, _, images in present]
    without = []
    for part, read in absent:
        images = images_in(read, root, folders)
        if images is None:
            without.append((part, read))
        else:
            present.append((part, read, images))
    order = [part.captions for part in parts]
    return sorted(present, key=lambda table: order.index(table[0].captions)), without


def _note_on_root(images: FolderImages) -> list[str]:
    """A note that the images' names begin with a folder that is not here, where they do."""
    if not images.prefix:
        return []
    folder = images.root / images.folder
    return [f"images' names begin with {shown(images.prefix)}, which is left out: taken from {folder}"]


class Layout(Protocol):
    """A way in which the files of a dataset are arranged and named.

    Attributes:
        NAME: its name in a store's provenance.
        PRIORITY: layouts are asked in ascending order, the most specific first. Below 30: published files, known by
            their very names or contents, and what an option asks for; 30 to 39: what one program writes, known by a
            name or suffix; from 40 on: any table, any text.
        LOOKED_FOR: the files by which it is known, for the message that nothing was found.
        EXAMPLE: such a dataset in two short lines, for the same message.
        HOLDS: ``captions`` where an image may have several, ``splits`` where the form has them.
        SUFFIXES: suffixes of files, such as ``.csv``, that make it likely that this layout was meant.

    A layout may also have ``near(data, options)``: the reason why ``data``, which is nearly of this layout, cannot be
    read, or None.
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
        """Writes some images as a small dataset and returns its folder or file, as ``read_dataset`` takes it.

        Captions and splits are left out where ``HOLDS`` lacks them. Options to read it with are ``EXAMPLE_OPTIONS``.
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
    layout, unread = _find(at, options)
    rows = list(unread.rows())
    if not rows:
        raise DatasetError(f"{unread.captions} holds no captions; is the download complete?")
    images = unread.images(rows)
    rows, notes = without_excluded(rows, options.exclude)
    dataset = assemble(
        unread.root, layout.NAME, rows, images, unread.captions, unread.lists_all_images, options.exclude
    )
    taken = unread.form or layout.NAME
    notes = [*unread.notes, *notes, *dataset.notes, *notes_on_captions(dataset.captions, dataset.image_index)]
    dataset = replace(dataset, named=at, reading=options, taken=f"{taken}: {len(rows):,} rows", notes=notes)
    if any(dataset.splits):
        return dataset
    return with_splits(dataset, unread.captions, seed)


def images_of(data: str | Path, keys: Sequence[str], options: ReadOptions = DEFAULT) -> ImageSource:
    """The source of a store's images: the folder ``data`` where it has a file of ``keys``; else the dataset's source.

    Captions are read only in the second case.
    """
    at = path_of(data)
    folder = image_folder(options.images_root or (at if at.is_dir() else at.parent))
    if any(folder.stat(key)[0] >= 0 for key in keys):
        return folder
    try:
        return read_dataset(at, options=options).images
    except DatasetError:
        return folder  # opening a file then names the one that is missing


def stored_images(store: "FeatureStore", data: str | Path | None = None) -> ImageSource:
    """The source of a store's images: at ``data``, or where the dataset was when it was encoded."""
    provenance = store.provenance
    options = read_options(provenance.get("reading", {}))
    return images_of(data or provenance.get("named", provenance["data"]), store.image_paths, options)


def _find(data: Path, options: ReadOptions) -> tuple[Layout, UnreadDataset]:
    """The layout of ``data``, and the dataset in it.

    Raises:
        DatasetError: no layout fits.
    """
    layouts: list[Layout] = sorted(map(LAYOUTS.load, LAYOUTS.names()), key=lambda layout: layout.PRIORITY)
    folder = data
    for _ in range(_DEEPEST):
        for layout in layouts:
            dataset = layout.find(folder, options)
            if dataset is not None:
                return layout, dataset
        inner = _only_folder(folder)
        if inner is None:
            break
        folder = inner
    raise DatasetError(_not_understood(data, layouts, options))


def _only_folder(data: Path) -> Path | None:
    """The one folder in a folder, as unpacking an archive leaves it; None where there are several or none."""
    folders = subfolders(data)
    return folders[0] if len(folders) == 1 else None


def _not_understood(data: Path, layouts: Sequence[Layout], options: ReadOptions) -> str:
    """The message that no layout fits ``data``: the files that are there, and the nearest form."""
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
    for (_, suffix), names in there.names.items():
        if suffix in _TO_CONVERT:
            return f"{data} holds {shown(names[0])}, which is not read as it is; {_TO_CONVERT[suffix]}"
    nearest = _nearest(layouts, there.suffixes)
    example = " and below it ".join(nearest.EXAMPLE.splitlines())
    return (
        f"{data} holds no captions in a form that is understood; there is {there}. "
        f"The nearest form is {nearest.LOOKED_FOR}: {example} (docs/data.md has all forms)"
    )


def _nearest(layouts: Sequence[Layout], suffixes: set[str]) -> Layout:
    """The layout that files of these suffixes suggest; a table where they suggest none."""
    table = next(layout for layout in layouts if layout.NAME == "csv")
    for layout in (table, *layouts):
        if not suffixes.isdisjoint(layout.SUFFIXES):
            return layout
    return table
