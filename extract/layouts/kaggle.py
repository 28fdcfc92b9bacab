"""Flickr8k as Kaggle has it: ``captions.txt``, a table, beside ``Images``."""

from collections.abc import Sequence
from pathlib import Path

from onceover.extract.dataset.caption_table import open_table
from onceover.extract.dataset.examples import ExampleImage, write_csv_example, write_images
from onceover.extract.dataset.image_folders import FOLDERS
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.layouts import UnreadDataset, beside

NAME = "kaggle"
PRIORITY = 30
LOOKED_FOR = "captions.txt (with Images/)"
EXAMPLE = "image,caption\na.jpg,A dog runs over a meadow ."
HOLDS = ("captions",)
SUFFIXES = (".txt",)


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """``captions.txt`` in the folder.

    Raises:
        DatasetError: it is no table of captions.
    """
    captions = data / "captions.txt"
    if not captions.is_file():
        return None
    table = open_table(captions, options)
    return beside(captions, data, table.rows, ("Images", *FOLDERS), options, table.form, lists_all_images=True)


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """``captions.txt`` beside ``Images``."""
    write_images(folder / "Images", images)
    write_csv_example(folder / "captions.txt", images)
    return folder
