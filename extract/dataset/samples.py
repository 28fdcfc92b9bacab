"""Samples: an image with the text or JSON of the same name beside it, as webdataset and img2dataset write them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from onceover.base.files import parse_json
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.cells import captions_of
from onceover.extract.dataset.columns import CAPTION_NAMES
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.text import caption_lines
from onceover.extract.listing import is_image

TEXT_SUFFIXES = (".txt", ".caption", ".text")  # the first that is there is taken
MAX_SIDECAR = 2**22  # bytes of a text or a JSON beside an image
NOT_DOWNLOADED = "not downloaded"
SUCCESS = "success"  # the status of an image that img2dataset has downloaded
TEXT_ALONE = "text without an image"


@dataclass
class Sample:
    """The names of a sample's files; "" where there is no such file.

    Attributes:
        name: the name that they share, without suffixes. others: further images, which are left out.
    """

    name: str
    image: str = ""
    text: str = ""
    json: str = ""
    others: list[str] = field(default_factory=list)

    def add(self, name: str, suffix: str) -> None:
        """Adds a file of the sample by its suffix, in lower case."""
        if suffix == ".json":
            self.json = name
        elif suffix in TEXT_SUFFIXES:
            texts = [text for text in (self.text, name) if text]
            self.text = min(texts, key=lambda text: TEXT_SUFFIXES.index(f".{text.rpartition('.')[2].lower()}"))
        elif not self.image:
            self.image = name
        else:
            self.others.append(name)


def sample_rows(sample: Sample, read: Callable[[str], bytes], options: ReadOptions, split: str = "") -> Iterator[Row]:
    """The rows of a sample: one for each line of its text, or for each caption in its JSON.

    A text without an image, and what could not be downloaded or read, are rows with a fault. An image without a text
    gives no row.

    Args:
        read: gives the content of a file by its name. options: the names of captions and split in the JSON.
    """
    for name in sample.others:
        yield Row(name, "", split, f"another image of the sample: {sample.image} is taken")
    name = sample.image or sample.name
    values: dict[str, Any] = {}
    try:
        if sample.json and (options.caption_columns or options.split_column or not sample.text or not sample.image):
            values = _read_json(read(sample.json))
        captions = _captions(sample, values, read, options)
    except DatasetError as error:
        yield Row(name, "", split, str(error))
        return
    if options.split_column is not None:
        split = str(values.get(options.split_column) or "")
    status = values.get("status", SUCCESS)
    if not sample.image and status != SUCCESS:
        yield Row(name, "".join(captions[:1]), split, why_not_downloaded(status, values.get("error_message")))
        return
    if not sample.image and (captions or sample.text):
        yield Row(sample.text or name, "".join(captions[:1]), split, TEXT_ALONE)
        return
    for caption in captions:
        yield Row(name, caption, split)


def why_not_downloaded(status: Any, message: Any) -> str:
    """Why there is no image, in the words of the program that should have fetched it (img2dataset)."""
    return f"{NOT_DOWNLOADED}: {status}, {message}" if message else f"{NOT_DOWNLOADED}: {status}"


def _captions(sample: Sample, values: dict[str, Any], read: Callable[[str], bytes], options: ReadOptions) -> list[str]:
    """The captions of a sample; none where it has no text.

    Raises:
        DatasetError: a text that cannot be read.
    """
    if options.caption_columns:
        texts: list[str] = []
        for key in options.caption_columns:
            if key in values:
                texts += captions_of(values[key], f"its JSON's {key}")
        return texts
    if sample.text:
        # an empty text is one empty caption, so that it is recorded
        return caption_lines(_decoded(read(sample.text))) or [""]
    found: list[str] = []
    for key in CAPTION_NAMES:
        if values.get(key) is not None:
            captions = captions_of(values[key], f"its JSON's {key}")
            if any(caption.strip() and not is_image(caption) for caption in captions):
                return captions
            found = [""]  # it is empty, or the file's name, as a title may be
    return found


def _read_json(content: bytes) -> dict[str, Any]:
    """The object in a JSON.

    Raises:
        DatasetError: something else is in it.
    """
    try:
        values = parse_json(_decoded(content))
    except ValueError as error:
        raise DatasetError("its JSON cannot be read") from error
    if not isinstance(values, dict):
        raise DatasetError("its JSON is no object")
    return values


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError("its text is not UTF-8") from error
