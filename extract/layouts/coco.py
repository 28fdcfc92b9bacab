"""COCO's own captions, and what has their form: ``annotations/captions_train2017.json`` beside ``train2017``."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from onceover.base.files import parse_json
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.examples import ExampleImage, by_split, write_images
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.splits import split_of
from onceover.extract.dataset.table_files import choose_tables, folders_from, root_of, split_folders
from onceover.extract.dataset.text import read_head, read_text
from onceover.extract.layouts import SplitTable, UnreadDataset, beside, in_parts
from onceover.extract.names import shown

NAME = "coco"
PRIORITY = 25
LOOKED_FOR = "annotations/captions_train2017.json (with train2017/), the captions of COCO"
EXAMPLE = (
    '{"images": [{"id": 1, "file_name": "a.jpg"}],\n'
    '"annotations": [{"image_id": 1, "caption": "A dog runs over a meadow ."}]}'
)
HOLDS = ("captions", "splits")
SUFFIXES = (".json",)
_FOLDERS = (".", "annotations", "annotations_trainval2017/annotations", "annotations_trainval2014/annotations")
_MOST_FILES = 40  # that are looked into
_REJECTED = "rejected by its publisher"  # as VizWiz marks a caption with "is_rejected": true
_IMAGES = re.compile(r'"images"\s*:\s*\[')
_ANNOTATIONS = re.compile(r'"annotations"\s*:\s*\[')
_YEAR = re.compile(r"20\d\d")


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """A file of that form; or those in a folder or its ``annotations``, one for each split.

    Raises:
        DatasetError: several of which it is not known which is meant.
    """
    if data.is_file():
        return _dataset_of([data], root_of(data), options) if _is_coco(data) else None
    if not data.is_dir():
        return None
    for name in _FOLDERS:
        files = _captions_in(data / name)
        if files:
            return _dataset_of(files, data, options)
    return None


def _dataset_of(files: Sequence[Path], root: Path, options: ReadOptions) -> UnreadDataset:
    """The dataset of these files, or of those of one year among them."""
    taken = choose_tables(_of_one_year(files, root), files[0].parent, {})
    form = f"COCO's captions, {', '.join(file.name for file in taken)}"
    left = [file.name for file in files if file not in taken]
    if left:
        form = f"{form} (left alone: {', '.join(left)})"
    parts = []
    for file in taken:
        split = split_of(file.stem)
        folders = [*split_folders(file.stem, split, root), *folders_from(root, file)]
        parts.append(SplitTable(file, partial(_rows, file), folders, split))
    if len(parts) > 1:
        return in_parts(root, parts, options, form)
    return beside(parts[0].captions, root, parts[0].rows, parts[0].folders, options, form)


def _captions_in(folder: Path) -> list[Path]:
    """The files of that form in a folder that have captions: those that are called so, else all that hold some."""
    if not folder.is_dir():
        return []
    files = sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))
    called = [file for file in files if "caption" in file.name.lower()]
    coco = [file for file in (called or files)[:_MOST_FILES] if _is_coco(file)]
    return [file for file in coco if (called and split_of(file.stem) != "test") or '"caption"' in read_text(file)]


def _is_coco(file: Path) -> bool:
    """Whether a JSON file begins as COCO's do."""
    if file.suffix.lower() != ".json" or not file.is_file():
        return False
    head, _ = read_head(file)
    if not head.lstrip().startswith("{") or '"sentences"' in head or '"image":' in head:
        return False
    if _IMAGES.search(head) is not None:
        return '"file_name"' in head
    if _ANNOTATIONS.search(head) is None or '"image_id"' not in head or '"caption"' not in head:
        return False
    return _IMAGES.search(read_text(file)) is not None


def _of_one_year(files: Sequence[Path], root: Path) -> list[Path]:
    """The files of the last year whose images seem to be there: 2014 and 2017 have the same images."""
    years: dict[str, list[Path]] = {}
    for file in files:
        match = _YEAR.search(file.stem)
        years.setdefault(match[0] if match is not None else "", []).append(file)
    present = []
    for year, of_year in years.items():
        if any(_has_folder(file, root) for file in of_year):
            present.append(year)
    return years[max(present or years)]


def _has_folder(file: Path, root: Path) -> bool:
    """Whether there is a folder with whose name that of a file ends."""
    folders = split_folders(file.stem, split_of(file.stem), root)
    return bool(folders) and file.stem.endswith(folders[0].rpartition("/")[2])


def _rows(captions: Path) -> Iterator[Row]:
    """The rows of ``annotations``, then one for each image that has none there.

    Raises:
        DatasetError: not such a file.
    """
    try:
        content = parse_json(read_text(captions))
        names: dict[str, set[str]] = {}
        for image in content["images"]:
            names.setdefault(str(image["id"]), set()).add(str(image["file_name"]))
        rows = [_row(names, annotation) for annotation in content["annotations"]]
        captioned = {str(annotation["image_id"]) for annotation in content["annotations"]}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            f"{captions} is not as COCO's captions are ({type(error).__name__}: {error}); it needs images with id and "
            "file_name, and annotations with image_id and caption, as captions_train2017.json has them"
        ) from error
    yield from rows
    for number, of_number in names.items():
        if number not in captioned:
            for name in sorted(of_number):
                yield Row(name, "")


def _row(names: dict[str, set[str]], annotation: dict[str, Any]) -> Row:
    """The row of an annotation; one whose number is that of no image, or of several, goes into the ledger."""
    number = str(annotation["image_id"])
    caption = annotation["caption"]
    caption = caption.strip() if caption is not None else ""
    of_number = sorted(names.get(number, ()))
    if len(of_number) == 1:
        return Row(of_number[0], caption, "", _REJECTED if annotation.get("is_rejected") else "")
    fault = f"several images have the id {number}: {', '.join(map(shown, of_number[:2]))}" if of_number else ""
    return Row(f"image_id {number}", caption, "", fault)


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """``annotations/captions_train2017.json`` beside ``train2017``, and ``val`` for dev."""
    (folder / "annotations").mkdir()
    first = 0
    for split, of_split in by_split(images).items():
        part = f"{'train' if split == 'train' else 'val'}2017"
        write_images(folder / part, of_split)
        entries = []
        annotations = []
        for number, image in enumerate(of_split, first):
            entries.append({"id": number, "file_name": image.name})
            annotations += [{"image_id": number, "caption": caption} for caption in image.captions]
        first += len(of_split)
        content = {"images": entries, "annotations": annotations}
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))
    return folder
