"""A CSV with the columns image, caption and perhaps split, whose images lie beside it."""

from functools import partial
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.rows import folder_images, write_csv_example, write_images
from onceover.extract.dataset.table import csv_rows
from onceover.extract.listing import is_hidden

NAME = "csv"
PRIORITY = 40
LOOKED_FOR = "a .csv with the columns image,caption"
LISTS_ALL_IMAGES = False
FOLDERS = (".", "Images", "images")
rows = csv_rows
images = partial(folder_images, folders=FOLDERS)


def find(data: Path) -> Path | None:
    """A .csv or .txt file, or the only .csv in a folder.

    Raises:
        DatasetError: several of them.
    """
    if data.is_file():
        return data if data.suffix.lower() in (".csv", ".txt") else None
    tables = sorted(table for table in data.glob("*.csv") if not is_hidden(table.name))
    if len(tables) > 1:
        raise DatasetError(f"{data} holds {len(tables)} CSV files; name one of them: --data {tables[0]}")
    return tables[0] if tables else None


def write_example(folder: Path, images: dict[str, bytes]) -> Path:
    """A table beside its images."""
    write_images(folder / FOLDERS[0], images)
    write_csv_example(folder / "data.csv", images)
    return folder
