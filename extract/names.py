"""Names of images: which can be stored, which lead to a file, their natural order, and how a message shows one."""

import re

from onceover.extract.ledger import NO_IMAGE_NAMED

_SHOWN = 80  # characters of a name that a message repeats


def shown(name: str) -> str:
    """A name for a message: on one line, and cut where it is long."""
    text = name[:_SHOWN]
    return text if text.isprintable() else f"{text!r}"


def is_text(text: str) -> bool:
    """Whether it can be stored as UTF-8: JSON and file names can hold halves of characters (lone surrogates)."""
    return text.encode("utf-8", "ignore").decode() == text


def why_no_path(name: str) -> str | None:
    """Why a name leads to no file below the data folder, or None."""
    if not name:
        return NO_IMAGE_NAMED
    if name.startswith(("/", "../")) or name == ".." or "\0" in name:
        return "its path leaves the data folder"
    return None if is_text(name) else "a name with half a character"


def natural(name: str) -> list[str | int]:
    """The key of a name in natural order, in which 2 comes before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def natural_path(path: str) -> list[list[str | int]]:
    """The key of a path with ``/`` in natural order, folder by folder."""
    return [natural(part) for part in path.split("/")]
