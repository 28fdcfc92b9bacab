"""Flickr30k as published: ``results.csv`` with bars, ``results_20130124.token``, or the Hub's annotations."""

import re
from collections.abc import Sequence
from pathlib import Path

from onceover.extract.dataset.caption_table import open_table
from onceover.extract.dataset.examples import ExampleImage, write_images
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.table_files import folders_from
from onceover.extract.dataset.text import read_head
from onceover.extract.layouts import UnreadDataset, beside
from onceover.extract.listing import subfolders

NAME = "flickr30k"
PRIORITY = 15
LOOKED_FOR = "Flickr30k's results.csv, results_20130124.token or flickr_annotations_30k.csv (with flickr30k-images/)"
EXAMPLE = "image_name| comment_number| comment\na.jpg| 0| A dog runs over a meadow ."
HOLDS = ("captions",)
SUFFIXES = (".token",)
#: the files that are published, with how each begins
FILES = {
    "results.csv": re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment"),
    "results_20130124.token": re.compile(r"\S+\.jpg#\d\t"),
    "flickr_annotations_30k.csv": re.compile(r"(?=.*\braw\b)(?=.*\bfilename\b)"),
}


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """One of the published files; or the first of them in a folder, or in one of the folders there.

    Raises:
        DatasetError: one of them that cannot be read.
    """
    if data.is_file():
        return _dataset_of(data, data.parent, options) if _is_published(data) else None
    if not data.is_dir():
        return None
    for folder in (data, *subfolders(data)):
        for name in FILES:
            if _is_published(folder / name):
                return _dataset_of(folder / name, data, options)
    return None


def _is_published(file: Path) -> bool:
    """Whether a file is one of the published ones, by its name and its beginning."""
    if file.name not in FILES or not file.is_file():
        return False
    head, _ = read_head(file)
    return FILES[file.name].match(head) is not None


def _dataset_of(captions: Path, root: Path, options: ReadOptions) -> UnreadDataset:
    """The dataset of a file: its images lie beside it, or beside the folder that it is in."""
    table = open_table(captions, options)
    folders = ("flickr30k-images", *folders_from(root, captions))
    return beside(captions, root, table.rows, folders, options, table.form, lists_all_images=True)


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """``results.csv`` beside ``flickr30k-images``."""
    write_images(folder / "flickr30k-images", images)
    lines = ["image_name| comment_number| comment"]
    for image in images:
        lines += [f"{image.name}| {number}| {caption}" for number, caption in enumerate(image.captions)]
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    return folder
