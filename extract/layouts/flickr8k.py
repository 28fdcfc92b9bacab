"""Flickr8k as it was first published: ``Flickr8k.token.txt`` beside ``Flicker8k_Dataset``."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.examples import ExampleImage, write_images
from onceover.extract.dataset.image_folders import FOLDERS
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.text import read_lines
from onceover.extract.layouts import UnreadDataset, beside

NAME = "original"
PRIORITY = 20
LOOKED_FOR = "Flickr8k.token.txt (with Flicker8k_Dataset/)"
EXAMPLE = "a.jpg#0<tab>A dog runs over a meadow ."
HOLDS = ("captions",)
SUFFIXES = (".token.txt",)


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """``Flickr8k.token.txt``, in the folder or in ``Flickr8k_text``; or a file whose name ends in ``.token.txt``."""
    candidates = [data / "Flickr8k.token.txt", data / "Flickr8k_text" / "Flickr8k.token.txt"]
    root = data
    if data.is_file():
        candidates = [data] if data.name.endswith(".token.txt") else []
        root = data.parent
    for captions in candidates:
        if captions.is_file():
            form = f"Flickr8k's captions, {captions.name}"
            folders = ("Flicker8k_Dataset", *FOLDERS)
            return beside(captions, root, partial(_rows, captions), folders, options, form, lists_all_images=True)
    return None


def _rows(captions: Path) -> Iterator[Row]:
    """The rows of lines ``name.jpg#0<tab>caption``.

    Raises:
        DatasetError: unreadable, or a line of another form.
    """
    for number, line in enumerate(read_lines(captions), 1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        if not tab or not mark:
            raise DatasetError(f"{captions}, line {number}: expected name.jpg#0, a tab and a caption")
        yield Row(name, caption)


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """``Flickr8k.token.txt`` beside ``Flicker8k_Dataset``."""
    write_images(folder / "Flicker8k_Dataset", images)
    lines = []
    for image in images:
        lines += [f"{image.name}#{number}\t{caption}" for number, caption in enumerate(image.captions)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    return folder
