"""Flickr8k as Kaggle has it: ``captions.txt``, a CSV, beside ``Images``."""

from functools import partial
from pathlib import Path

from onceover.extract.dataset.rows import folder_images, write_csv_example, write_images
from onceover.extract.dataset.table import csv_rows

NAME = "kaggle"
PRIORITY = 30
LOOKED_FOR = "captions.txt (with Images/)"
LISTS_ALL_IMAGES = True
FOLDERS = ("Images", "images", ".")
rows = csv_rows
images = partial(folder_images, folders=FOLDERS)


def find(data: Path) -> Path | None:
    """``captions.txt`` in the folder."""
    captions = data / "captions.txt"
    return captions if captions.is_file() else None


def write_example(folder: Path, images: dict[str, bytes]) -> Path:
    """``captions.txt`` beside ``Images``."""
    write_images(folder / FOLDERS[0], images)
    write_csv_example(folder / "captions.txt", images)
    return folder
