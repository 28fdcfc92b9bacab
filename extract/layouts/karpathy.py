"""The split files of Karpathy and Fei-Fei 2015: ``dataset_flickr8k.json``, Flickr30k's and COCO's."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from onceover.base.files import parse_json
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import ExampleImage, Row, write_images
from onceover.extract.dataset.text import read_head, read_text
from onceover.extract.layouts import Found, beside

NAME = "karpathy"
PRIORITY = 10  # the published splits are in it, whatever else lies there
FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json")
LOOKED_FOR = ", ".join(FILES)
EXAMPLE = '{"images": [{"filename": "a.jpg", "split": "train",\n"sentences": [{"raw": "A dog runs ."}]}]}'
HOLDS = ("captions", "splits")
SUFFIXES = (".json",)
FOLDERS = (
    ".",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    "Images",
    "images",
    "flickr30k-images",
    "flickr30k_images",
)


def find(data: Path, options: ReadOptions) -> Found | None:
    """A JSON file with sentences of images, or the first of the published ones in a folder."""
    if data.is_file():
        if data.name not in FILES and not _has_sentences(data):
            return None
        return beside(data, data.parent, partial(_rows, data), FOLDERS, options, _form(data))
    for name in FILES:
        if (data / name).is_file():
            return beside(data / name, data, partial(_rows, data / name), FOLDERS, options, _form(data / name))
    return None


def _form(captions: Path) -> str:
    """What is taken, for the user."""
    return f"Karpathy's split file, {captions.name}"


def _has_sentences(file: Path) -> bool:
    """Whether a JSON file begins as a split file does."""
    if file.suffix.lower() != ".json":
        return False
    head, _ = read_head(file)
    return head.lstrip().startswith("{") and '"images"' in head and '"sentences"' in head


def _rows(captions: Path) -> Iterator[Row]:
    """The rows of ``images`` with ``filename``, perhaps ``filepath``, ``split`` and ``sentences``.

    Raises:
        DatasetError: not such a file.
    """
    try:
        entries = parse_json(read_text(captions))["images"]
    except (ValueError, TypeError, KeyError):
        entries = None
    if not isinstance(entries, list):
        raise DatasetError(
            f"{captions} has no list of images; name a split file such as dataset_flickr8k.json, or a CSV"
        )
    for number, image in enumerate(entries):
        try:
            name = posixpath.join(image.get("filepath") or "", image["filename"])
            texts = [sentence["raw"] for sentence in image["sentences"]] or [""]
            rows_of_image = [Row(name, text.strip(), image["split"].strip()) for text in texts]
        except (AttributeError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{captions}: image {number} of images needs filename, split and sentences, each with its raw text"
            ) from error
        yield from rows_of_image


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """``dataset_flickr8k.json`` beside its images."""
    write_images(folder / FOLDERS[0], images)
    entries = []
    for image in images:
        sentences = [{"raw": caption} for caption in image.captions]
        entries.append({"filename": image.name, "split": image.split or "train", "sentences": sentences})
    (folder / FILES[0]).write_text(json.dumps({"images": entries}))
    return folder
