"""The values in a table of captions: an image's name, a caption, or a list of captions."""

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

from onceover.base.files import parse_json
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.columns import CAPTION_NAMES
from onceover.extract.dataset.rows import Row
from onceover.extract.listing import is_image

_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_A_STRING = re.compile(_STRING, re.DOTALL)
#: a list as pandas writes it, ['one', "two"], or numpy, which has no commas; or a tuple, which has some
_PYTHON_LIST = re.compile(
    rf"\[\s*(?:{_STRING}\s*(?:,\s*)?)*\]|\(\s*{_STRING}\s*,\s*(?:{_STRING}\s*(?:,\s*)?)*\)", re.DOTALL
)
_NUMBERED_NAME = re.compile(r"(.+)#\d+")  # a.jpg#0, of Flickr8k and Flickr30k


def image_in(cell: str) -> str | None:
    """The image's name in a cell, where it is one by its suffix; ``#0`` behind it is left out."""
    name = without_number(cell.strip())
    return name if is_image(name) else None


def without_number(name: str) -> str:
    """An image's name without the number of its caption: ``a.jpg`` of ``a.jpg#0``."""
    numbered = _NUMBERED_NAME.fullmatch(name.strip())
    return numbered[1] if numbered is not None and is_image(numbered[1]) else name


def captions_in(cell: str) -> list[str]:
    """The captions in a cell: those of a list in JSON, of a list or tuple in Python's form, or the one that it is."""
    text = cell.strip()
    if (text[:1], text[-1:]) not in (("[", "]"), ("(", ")")):
        return [cell]
    try:
        values = parse_json(text)
    except ValueError:
        values = None
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    if _PYTHON_LIST.fullmatch(text) is None:
        return [cell]
    try:
        return [ast.literal_eval(string) for string in _A_STRING.findall(text)]
    except (ValueError, SyntaxError):  # an escape that is none
        return [cell]


def captions_of(value: Any, where: str) -> list[str]:
    """The captions in a value of JSON or Parquet: text, a list of texts, or of objects with a text each (``raw``).

    Nothing gives one empty caption, so that it is recorded.

    Args:
        where: the place of the value, for the error.

    Raises:
        DatasetError: something other than text or numbers.
    """
    if isinstance(value, str):
        return captions_in(value)
    if not isinstance(value, list):
        value = [value]
    captions = []
    for item in value:
        if isinstance(item, dict):
            item = next((item[name] for name in CAPTION_NAMES if name in item), item)
        captions.append(text_of(item, where))
    return captions or [""]


def image_of(value: Any, where: str) -> str:
    """An image's name in JSON: a text or a number, or a list of just one.

    Raises:
        DatasetError: something else.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return text_of(value, where)


def text_of(value: Any, where: str) -> str:
    """A text or number as text; nothing, which pandas writes as NaN, too, as "".

    Raises:
        DatasetError: something else.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # an id of a column that lacks some
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    kind = {list: "a list of several texts or of lists", dict: "an object", bool: "true or false"}.get(type(value), "")
    held = f"{value!r:.80}{f', {kind},' if kind else ''} where a text is needed"
    raise DatasetError(
        f"{where}: {held}; name other columns (--image-column, --caption-column), or write an object for each image: "
        '{"image": "a.jpg", "captions": ["A dog runs .", "A dog ."]}'
    )


def rows_of(image: str, captions: Sequence[str], split: str) -> Iterator[Row]:
    """A row for each caption of an image; one without a caption where there is none, for the ledger."""
    if len(captions) > 1:
        captions = [caption for caption in captions if caption.strip()]  # an image has fewer captions than columns
    for caption in captions or [""]:
        yield Row(without_number(image), caption, split)
