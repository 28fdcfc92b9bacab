"""Text files of datasets, read whole within limits; which captions can be used."""

from pathlib import Path
from typing import Any

from onceover.base.files import MAX_TEXT, FileError, read_bytes
from onceover.extract.dataset import DatasetError
from onceover.extract.names import is_text

MAX_CAPTION = 100_000  # characters; encoders read a few hundred
_TEXT_KEYS = ("raw", "caption", "text", "sentence")  # of a caption that is an object


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, whose ends are LF, CR LF or, where it has no LF, CR."""
    text = read_text(path)
    if "\n" not in text:
        text = text.replace("\r", "\n")
    # not str.splitlines(), which also breaks lines at form feeds and Unicode separators inside captions
    return text.replace("\r\n", "\n").split("\n")


def read_text(path: Path) -> str:
    """The text of a file of UTF-8.

    Raises:
        DatasetError: an unreadable file, too large a one, or other text than UTF-8.
    """
    try:
        return read_bytes(path, MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DatasetError(f"{path} is not UTF-8 (line {line}); convert it, for example with iconv") from error
    except FileError as error:
        raise DatasetError(f"{error}; name another file") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


def why_unusable(caption: str) -> str | None:
    """Why a caption cannot be used, or None."""
    if not caption:
        return "empty caption"
    if "\0" in caption:
        return "caption with a NUL character"
    if len(caption) > MAX_CAPTION:
        return f"caption of {len(caption):,} characters, more than {MAX_CAPTION:,}"
    return None if is_text(caption) else "caption with half a character"


def lines_of(text: str) -> list[str]:
    """The captions in a text, one a line, without empty lines."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def caption_texts(value: Any, place: str) -> list[str]:
    """The captions in a value of a table or of JSON: a text, or a list of texts or of objects with a text (``raw``).

    Nothing gives one empty caption, which is recorded as such.

    Args:
        place: where it stands, for the error.

    Raises:
        DatasetError: something else.
    """
    if value is None or value == []:
        return [""]
    parts = value if isinstance(value, list) else [value]
    return [_caption_text(part, place) for part in parts]


def _caption_text(value: Any, place: str) -> str:
    """The text of one caption."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        for key in _TEXT_KEYS:
            if isinstance(value.get(key), str):
                return str(value[key])
    raise DatasetError(f"{place} holds {value!r:.60}; a caption is a text, or a list of texts")
