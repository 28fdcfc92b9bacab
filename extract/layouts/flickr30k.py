"""Flickr30k as published: ``results.csv`` with bars, ``results_20130124.token``, or the Hub's annotations."""

import re
from pathlib import Path

from onceover.extract.dataset.caption_table import open_table
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import write_images
from onceover.extract.dataset.text import read_head
from onceover.extract.layouts import Found, beside
from onceover.extract.listing import subfolders

NAME = "flickr30k"
PRIORITY = 15
LOOKED_FOR = "Flickr30k's results.csv, results_20130124.token or flickr_annotations_30k.csv (with flickr30k-images/)"
EXAMPLE = "image_name| comment_number| comment\na.jpg| 0| A dog runs over a meadow ."
SUFFIXES = (".token",)
#: the files that are published, with how each begins
FILES = {
    "results.csv": re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment"),
    "results_20130124.token": re.compile(r"\S+\.jpg#\d\t"),
    "flickr_annotations_30k.csv": re.compile(r"(?=.*\braw\b)(?=.*\bfilename\b)"),
}
FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images", ".")


def find(data: Path, options: ReadOptions) -> Found | None:
    """One of the published files; or the first of them in a folder, or in one of the folders there.

    Raises:
        DatasetError: one of them that cannot be read.
    """
    if data.is_file():
        return _found(data, data.parent, options) if _is_published(data) else None
    if not data.is_dir():
        return None
    for folder in (data, *subfolders(data)):
        for name in FILES:
            if _is_published(folder / name):
                return _found(folder / name, data, options)
    return None


def _is_published(file: Path) -> bool:
    """Whether a file is one of the published ones, by its name and its beginning."""
    if file.name not in FILES or not file.is_file():
        return False
    head, _ = read_head(file)
    return FILES[file.name].match(head) is not None


def _found(captions: Path, root: Path, options: ReadOptions) -> Found:
    """The dataset of a file: its images lie beside it, or beside the folder that it is in."""
    table = open_table(captions, options)
    inside = captions.parent.relative_to(root).as_posix()
    folders = [f"{inside}/{folder}".removeprefix("./").removesuffix("/.") for folder in FOLDERS]
    return beside(captions, root, table.rows, [*folders, *FOLDERS], options, table.form, lists_all_images=True)


def write_example(folder: Path, images: dict[str, bytes]) -> Path:
    """``results.csv`` beside ``flickr30k-images``."""
    write_images(folder / FOLDERS[0], images)
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| 0| Caption {number} ." for number, name in enumerate(images)]
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    return folder
