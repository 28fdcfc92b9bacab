"""Text files of datasets, read whole within limits; which captions can be used."""

from pathlib import Path

from onceover.base.files import MAX_TEXT, FileError, read_bytes
from onceover.extract.dataset import DatasetError
from onceover.extract.names import is_text

MAX_CAPTION = 100_000  # characters; encoders read a few hundred


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
