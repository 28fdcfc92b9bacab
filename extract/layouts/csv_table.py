"""A CSV with the columns image, caption and perhaps split, whose images lie beside it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.rows import Row, folder_images, write_images
from onceover.extract.dataset.table import csv_rows
from onceover.extract.image_source import FolderImages

NAME = "csv"
PRIORITY = 40
LOOKED_FOR = "a .csv with the columns image,caption"
LISTS_ALL_IMAGES = False
FOLDERS = (".", "Images", "images")


def find(data: Path) -> Path | None:
    """A .csv or .txt file, or the only .csv in a folder.

    Raises:
        DatasetError: several of them.
    """
    if data.is_file():
        return data if data.suffix.lower() in (".csv", ".txt") else None
    tables = sorted(data.glob("*.csv"))
    if len(tables) > 1:
        raise DatasetError(f"{data} holds {len(tables)} CSV files; name one of them: --data {tables[0]}")
    return tables[0] if tables else None


def rows(captions: Path) -> Iterator[Row]:
    """The rows of the CSV.

    Raises:
        DatasetError: unreadable, or no such columns.
    """
    return csv_rows(captions)


def images(root: Path, rows: Sequence[Row], captions: Path) -> FolderImages:
    """The images' files, in the first folder that has one."""
    return folder_images(root, FOLDERS, rows, captions)


def write_example(folder: Path, images: dict[str, bytes]) -> Path:
    """A table beside its images."""
    write_images(folder / FOLDERS[0], images)
    lines = [f"{name},Caption {number} ." for number, name in enumerate(images)]
    (folder / "data.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    return folder
