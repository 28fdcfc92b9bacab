"""Folders of images called after classes, ``cat/1.jpg``: with ``--caption-template`` a class becomes a caption."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.examples import ExampleImage, by_split, write_images
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.shard_files import files_below
from onceover.extract.dataset.splits import is_split_word, named_splits
from onceover.extract.layouts import UnreadDataset, beside
from onceover.extract.listing import is_image

NAME = "class folders"
PRIORITY = 11  # the user asks for it, whatever else lies there
LOOKED_FOR = "a folder for each class (with --caption-template)"
EXAMPLE = "cat/1.jpg and dog/2.jpg\n--caption-template 'a photo of a {}'"
HOLDS = ("splits",)
SUFFIXES = ()
EXAMPLE_OPTIONS = ReadOptions(caption_template="{}")


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """A folder with images in folders below it, where there is a template.

    Raises:
        DatasetError: a template without ``{}``.
    """
    template = options.caption_template
    if template is None:
        return None
    if "{}" not in template:
        raise DatasetError(f"the caption template {template!r:.80} has no {{}} for the class: 'a photo of a {{}}'")
    folder = options.images_root or data
    if not folder.is_dir():
        return None
    images = [name for name in files_below(folder, options) if is_image(name)]
    class_of = _classes(images)
    classes = {*class_of.values()} - {""}
    if not classes:
        return None
    rows = partial(_rows, class_of, template)
    form = f"class folders, {len(classes):,} classes, captions from {template!r}"
    return beside(data, folder, rows, (".",), options, form)


def _classes(images: list[str]) -> dict[str, str]:
    """The class of each image: the folder that it lies in, as words; "" of one that lies in none, or in a split's."""
    top = {name.split("/")[0] for name in images if name.count("/") == 1}
    are_splits = all(map(is_split_word, top))  # else ``train`` beside ``bus`` is a class
    class_of = {}
    for name in images:
        folders = name.split("/")[:-1]
        of_class = folders[-1] if folders and not (len(folders) == 1 and are_splits) else ""
        class_of[name] = " ".join(of_class.replace("_", " ").replace("-", " ").split())
    return class_of


def _rows(class_of: dict[str, str], template: str) -> Iterator[Row]:
    splits = named_splits(["/".join(name.split("/")[:-2]) for name in class_of])
    for (name, of_class), split in zip(class_of.items(), splits, strict=True):
        if of_class:
            yield Row(name, template.replace("{}", of_class), split)
        else:
            yield Row(name, "", split, "an image in no class's folder")


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """A folder for each image, called as its first caption, below one for each split."""
    for split, chosen in by_split(images).items():
        for image in chosen:
            write_images(folder / split / image.captions[0], [image])
    return folder
