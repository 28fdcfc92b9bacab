"""The files of a dataset in several files: one file, all of a kind below a folder, or those of a pattern.

Patterns are those of webdataset's users, ``shards/{000000..000012}.tar`` with braces, and globs, ``shards/*.tar``.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from onceover.base.addresses import is_address
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.listing import list_files
from onceover.extract.names import natural_path

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_NAMES = 1_000_000  # that a pattern stands for


class ShardFiles(NamedTuple):
    """Files of one kind.

    Attributes:
        root: the folder that their names start from. names: in their order.
        missing: names that a pattern's braces give and that are not there. is_one: the user named a single file.
    """

    root: Path
    names: list[str]
    missing: list[str]
    is_one: bool = False


def files_below(folder: Path, options: ReadOptions, suffix: str = "") -> list[str]:
    """The names of all files below a folder of this machine or of an address, in natural order; hidden ones left out.

    Args:
        options: the user's, for ``exclude``. suffix: the end of the names, in lower case.

    Raises:
        ImageSourceError: the folder cannot be read.
    """
    names = list_files(folder, options.exclude).names
    chosen = [name for name in names if name.lower().endswith(suffix)]
    return sorted(chosen, key=natural_path)


def shard_files(data: Path, suffix: str, options: ReadOptions) -> ShardFiles | None:
    """The files that ``data`` names and that have a suffix (``.tar``), or None.

    Raises:
        DatasetError: a pattern that no file matches. ImageSourceError: a folder that cannot be read.
    """
    if data.is_file():
        return ShardFiles(data.parent, [data.name], [], is_one=True) if data.name.lower().endswith(suffix) else None
    if data.is_dir():
        names = files_below(data, options, suffix)
        return ShardFiles(data, names, []) if names else None
    if not _is_pattern(data) or not data.name.lower().endswith(suffix):
        return None
    root = data.parent
    while _is_pattern(root):
        root = root.parent
    names = []
    missing = []
    for pattern in _expanded(data.relative_to(root).as_posix(), data):
        matches = _matches(root, pattern)
        names += matches
        if not matches and not _is_glob(pattern):
            missing.append(pattern)
    if not names:
        raise DatasetError(f"no file is named by the pattern {data}; look at what is in {root}")
    return ShardFiles(root, list(dict.fromkeys(names)), missing)


def _is_pattern(path: Path) -> bool:
    return _is_glob(str(path)) or _BRACES.search(str(path)) is not None


def _is_glob(name: str) -> bool:
    """Whether a name has wildcards; a question mark in an address starts its parameters."""
    return any(sign in name for sign in ("*[" if is_address(name) else "*?["))


def _matches(root: Path, pattern: str) -> list[str]:
    """The names of the files that a pattern without braces means."""
    if not _is_glob(pattern):
        return [pattern] if (root / pattern).is_file() else []
    names = [path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file()]
    return sorted(names, key=natural_path)


def _expanded(pattern: str, data: Path) -> Iterator[str]:
    """The patterns without braces that one with braces stands for: ``{00..12}``, ``{train,val}``.

    Raises:
        DatasetError: too many.
    """
    count = 1
    choices = []
    position = 0
    for braces in _BRACES.finditer(pattern):
        choices.append([pattern[position : braces.start()]])
        choices.append(_choices(braces[1], data))
        count *= len(choices[-1])
        position = braces.end()
        if count > _MOST_NAMES:
            raise DatasetError(f"the pattern {data} stands for too many files; at most {_MOST_NAMES:,} are looked for")
    names = [""]
    for choice in [*choices, [pattern[position:]]]:
        names = [f"{name}{part}" for name in names for part in choice]
    yield from names


def _choices(text: str, data: Path) -> list[str]:
    """The choices in braces: the numbers of a range with their leading zeros, or the parts between commas."""
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        return text.split(",")
    first = int(numbers[1])
    last = int(numbers[2])
    if abs(last - first) >= _MOST_NAMES:
        raise DatasetError(f"the pattern {data} stands for too many files; at most {_MOST_NAMES:,} are looked for")
    step = 1 if last >= first else -1
    return [str(number).zfill(len(numbers[1])) for number in range(first, last + step, step)]
