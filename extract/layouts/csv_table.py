"""A CSV with the columns image, caption and perhaps split, whose images lie beside it."""

from functools import partial
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import write_csv_example, write_images
from onceover.extract.dataset.table import csv_rows
from onceover.extract.layouts import Found, beside
from onceover.extract.listing import is_hidden

NAME = "csv"
PRIORITY = 40
LOOKED_FOR = "a .csv with the columns image,caption"
EXAMPLE = "image,caption\na.jpg,A dog runs over a meadow ."
SUFFIXES = (".csv", ".txt")
FOLDERS = (".", "Images", "images")


def find(data: Path, options: ReadOptions) -> Found | None:
    """A .csv or .txt file, or the only .csv in a folder.

    Raises:
        DatasetError: several of them.
    """
    if data.is_file():
        if data.suffix.lower() not in (".csv", ".txt"):
            return None
        return beside(data, data.parent, partial(csv_rows, data), FOLDERS, options)
    tables = sorted(table for table in data.glob("*.csv") if not is_hidden(table.name))
    if len(tables) > 1:
        raise DatasetError(f"{data} holds {len(tables)} CSV files; name one of them: --data {tables[0]}")
    if not tables:
        return None
    return beside(tables[0], data, partial(csv_rows, tables[0]), FOLDERS, options)


def write_example(folder: Path, images: dict[str, bytes]) -> Path:
    """A table beside its images."""
    write_images(folder / FOLDERS[0], images)
    write_csv_example(folder / "data.csv", images)
    return folder
