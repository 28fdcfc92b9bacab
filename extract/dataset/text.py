"""Text files of datasets, read whole within limits, or their beginning; which captions can be used."""

import codecs
import shlex
from pathlib import Path

from onceover.base.files import MAX_TEXT, FileError, open_regular, read_bytes
from onceover.extract.dataset import DatasetError
from onceover.extract.names import is_text

MAX_CAPTION = 100_000  # characters; encoders read a few hundred
_HEAD = 2**16  # bytes of a file's beginning
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # Excel's "Unicode text" begins with one


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, whose ends are LF, CR LF or, where it has no LF, CR."""
    return lines_of(read_text(path))


def lines_of(text: str) -> list[str]:
    """The lines of a text, as ``read_lines`` gives them."""
    if "\n" not in text:
        text = text.replace("\r", "\n")
    # not str.splitlines(), which also breaks lines at form feeds and Unicode separators inside captions
    return text.replace("\r\n", "\n").split("\n")


def read_head(path: Path) -> tuple[str, bool]:
    """The beginning of a text file, and whether that is all of it. What cannot be decoded is replaced.

    Raises:
        DatasetError: an unreadable file.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_HEAD + 1)
    except FileError as error:
        raise DatasetError(f"{error}; name another file") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    whole = len(data) <= _HEAD
    decoder = codecs.getincrementaldecoder(_encoding(data))("replace")
    return decoder.decode(data[:_HEAD], final=whole), whole


def _encoding(data: bytes) -> str:
    """UTF-16 where a text begins with its mark, else UTF-8."""
    return "utf-16" if data[:2] in _UTF16_MARKS else "utf-8-sig"


def read_text(path: Path) -> str:
    """The text of a file of UTF-8, or of UTF-16 that begins with its mark.

    Raises:
        DatasetError: an unreadable file, too large a one, or text of another encoding.
    """
    try:
        data = read_bytes(path, MAX_TEXT)
        return data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DatasetError(
            f"{path} is not UTF-8 (line {line}), perhaps Windows-1252, as Excel writes; convert it: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(path.name)} > NEW"
        ) from error
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


def caption_lines(text: str) -> list[str]:
    """The captions in a text, one a line, without empty lines."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]
