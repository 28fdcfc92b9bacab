"""A table of images and captions in any usual form, whose images are files: CSV, TSV, bars, JSON lines, …"""

from collections.abc import Sequence
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.caption_table import SUFFIXES as TABLES
from onceover.extract.dataset.caption_table import CaptionTable, open_table
from onceover.extract.dataset.examples import ExampleImage, write_csv_example, write_images
from onceover.extract.dataset.image_folders import FOLDERS
from onceover.extract.dataset.parts import (
    TABLE_FOLDERS,
    chosen,
    files_in,
    folders_from,
    root_of,
    split_folders,
    tables_in,
)
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.splits import SPLITS, split_of
from onceover.extract.layouts import SplitTable, UnreadDataset, beside, in_parts
from onceover.extract.listing import subfolders

NAME = "csv"
PRIORITY = 40
LOOKED_FOR = "a table of images and captions beside the images (.csv, .tsv, .txt, .json, .jsonl)"
EXAMPLE = "image,caption\na.jpg,A dog runs over a meadow ."
HOLDS = ("captions", "splits")
SUFFIXES = TABLES
_PLAIN_TABLES = (".csv", ".tsv", ".tab", ".psv", ".jsonl", ".ndjson")  # files of these are nothing else


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """A file of a table; or the tables in a folder, in its folders of annotations, or in its folders of splits.

    Raises:
        DatasetError: a file that is no table of captions, or several tables of which it is not known which is meant.
    """
    if data.is_file():
        if data.suffix.lower() not in TABLES:
            return None
        table = open_table(data, options)
        root = root_of(data)
        return beside(data, root, table.rows, folders_from(root, data), options, table.form)
    if not data.is_dir():
        return None
    for folder in (data, *(data / name for name in TABLE_FOLDERS)):
        tables = tables_in(folder, data, options) if folder.is_dir() else []
        if tables:
            return found_tables(tables, folder, data, options)
    return found_splits(data, options)


def found_tables(tables: Sequence[CaptionTable], folder: Path, root: Path, options: ReadOptions) -> UnreadDataset:
    """The dataset of the tables in ``folder``, or of those of them that are to be taken, with its images in ``root``.

    Raises:
        DatasetError: it cannot be told which tables are meant.
    """
    by_path = {table.path: table for table in tables}
    taken = chosen(list(by_path), folder)
    form = by_path[next(iter(taken))].form
    if len(tables) > 1:
        form = f"{form}, in {', '.join(path.name for path in taken)}"
    left = [path.name for path in by_path if path not in taken]
    if left:
        form = f"{form} (left alone: {', '.join(left)})"
    if len(taken) == 1:
        table = by_path[next(iter(taken))]
        return beside(table.path, root, table.rows, folders_from(root, table.path), options, form)
    parts = []
    for path, split in taken.items():
        folders = (*folders_from(root, path), *split_folders(path.stem, split, root))
        parts.append(SplitTable(path, by_path[path].rows, folders, split))
    return in_parts(root, parts, options, form)


def found_splits(data: Path, options: ReadOptions, names: Sequence[str] = ()) -> UnreadDataset | None:
    """The dataset of tables that lie in folders called after splits: ``train/``, ``validation/``, ``test/``.

    Args:
        names: the only names of tables that are looked at.

    Raises:
        DatasetError: several tables in one of them.
    """
    parts: list[SplitTable] = []
    forms: list[str] = []
    for folder in sorted(filter(_is_split, subfolders(data)), key=_order):
        by_path = {table.path: table for table in tables_in(folder, folder, options, names)}
        if not by_path:
            continue
        for path in chosen(list(by_path), folder):
            inside = [f"{folder.name}/{place}".removesuffix("/.") for place in FOLDERS]
            parts.append(SplitTable(path, by_path[path].rows, (*inside, *FOLDERS), split_of(folder.name)))
            forms.append(by_path[path].form)
    if not parts:
        return None
    places = ", ".join(f"{part.captions.parent.name}/{part.captions.name}" for part in parts)
    return in_parts(data, parts, options, f"{forms[0]}, in {places}")


def _is_split(folder: Path) -> bool:
    """Whether a folder is called after a split."""
    return split_of(folder.name) != ""


def _order(folder: Path) -> tuple[int, str]:
    """The order of splits, and of folders in a split."""
    return SPLITS.index(split_of(folder.name)), folder.name


def near(data: Path, options: ReadOptions) -> str | None:
    """Why the only table in a folder is not taken; None where there is none, or several."""
    if not data.is_dir():
        return None
    tables = [file for file in files_in(data) if file.suffix.lower() in _PLAIN_TABLES]
    if len(tables) != 1:
        return None
    try:
        open_table(tables[0], options)
    except DatasetError as error:
        return str(error)
    return None


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """A table beside its images."""
    write_images(folder, images)
    write_csv_example(folder / "data.csv", images, with_splits=any(image.split for image in images))
    return folder
