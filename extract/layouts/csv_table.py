"""A table of images and captions in any usual form, whose images are files: CSV, TSV, bars, JSON lines, …"""

from collections.abc import Sequence
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.caption_table import SUFFIXES as TABLES
from onceover.extract.dataset.caption_table import open_table
from onceover.extract.dataset.columns import NoKnownColumn
from onceover.extract.dataset.examples import ExampleImage, write_csv_example, write_images
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.table_files import TABLE_FOLDERS, folders_from, root_of, table_files, tables_in
from onceover.extract.layouts import UnreadDataset, beside
from onceover.extract.layouts._tables import dataset_of_splits, dataset_of_tables

NAME = "csv"
PRIORITY = 40
LOOKED_FOR = "a table of images and captions beside the images (.csv, .tsv, .txt, .json, .jsonl)"
EXAMPLE = "image,caption\na.jpg,A dog runs over a meadow ."
HOLDS = ("captions", "splits")
SUFFIXES = TABLES
_PLAIN_TABLES = (".csv", ".tsv", ".tab", ".psv", ".jsonl", ".ndjson")  # files of these are nothing else
_FEW = 8  # tables in a folder


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
        tables = tables_in(folder, data, options) if folder.is_dir() else None
        if tables is not None and tables.tables:
            return dataset_of_tables(tables, folder, data, options)
    return dataset_of_splits(data, options)


def near(data: Path, options: ReadOptions) -> str | None:
    """Why the table in a folder that is nearest to one of captions is not taken; None where it is not known which."""
    if not data.is_dir():
        return None
    for folder in (data, *(data / name for name in TABLE_FOLDERS)):
        tables = tables_in(folder, data, options) if folder.is_dir() else None
        if tables is not None and (tables.unknown or tables.others):
            return str([*tables.unknown, *tables.others][0])
    files = [file for file in table_files(data) if file.suffix.lower() in (*_PLAIN_TABLES, ".json")]
    if len(files) > _FEW:
        return None  # they belong to the images, one to each
    reasons = []
    for file in files:
        try:
            open_table(file, options)
        except NoKnownColumn as error:
            return str(error)
        except DatasetError as error:
            reasons.append(str(error))
    return reasons[0] if len(files) == 1 and reasons and files[0].suffix.lower() in _PLAIN_TABLES else None


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """A table beside its images."""
    write_images(folder, images)
    write_csv_example(folder / "data.csv", images, with_splits=any(image.split for image in images))
    return folder
