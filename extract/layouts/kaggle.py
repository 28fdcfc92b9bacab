"""Flickr8k as Kaggle has it: ``captions.txt``, a CSV, beside ``Images``."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from onceover.extract.dataset.rows import Row, folder_images, write_images
from onceover.extract.dataset.table import csv_rows
from onceover.extract.image_source import FolderImages

NAME = "kaggle"
PRIORITY = 30
LOOKED_FOR = "captions.txt (with Images/)"
LISTS_ALL_IMAGES = True
FOLDERS = ("Images", "images", ".")


def find(data: Path) -> Path | None:
    """``captions.txt`` in the folder."""
    captions = data / "captions.txt"
    return captions if captions.is_file() else None


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
    """``captions.txt`` beside ``Images``."""
    write_images(folder / FOLDERS[0], images)
    lines = [f"{name},Caption {number} ." for number, name in enumerate(images)]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    return folder
