"""The files below a folder: hidden ones and what a user excludes left out, links followed, each folder listed once."""

import functools
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from onceover.base.addresses import Address
from onceover.base.entries import Entry
from onceover.base.errors import OnceoverError
from onceover.extract.formats import IMAGE_SUFFIXES
from onceover.extract.ledger import Failure
from onceover.extract.names import shown

#: what systems put beside people's files, in small letters: previews, bins, and what unpacking leaves
_SYSTEM_NAMES = {
    *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "__macosx"),
    *("$recycle.bin", "recycler", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
}
_KINDS = 6  # of files, what a note counts one by one


class ImageSourceError(OnceoverError):
    """A folder that cannot be listed."""


class Listing(NamedTuple):
    """The files below a folder.

    Attributes:
        names: their paths from it, with ``/``, sorted part by part.
        hidden: how many hidden images and folders were left out. excluded: how many images a pattern leaves out.
        unmatched: patterns that match nothing.
        failures: folders that cannot be read, and links that lead nowhere.
    """

    names: list[str]
    hidden: int
    excluded: int
    unmatched: list[str]
    failures: list[Failure]


def list_files(folder: Path, exclude: Sequence[str] = ()) -> Listing:
    """Lists the files below a folder, but for hidden ones, those of the system, and those that match a pattern.

    Links to folders are followed, wherever they lead. A folder that can be reached in several ways is listed once:
    where it lies itself, else by the link that comes first; links that lie in linked folders come last.

    Args:
        exclude: patterns, as ``is_excluded`` takes them.

    Raises:
        ImageSourceError: the folder itself cannot be read. AddressError: an address that cannot be reached.
    """
    if isinstance(folder, Address):
        return visible_files(files_at(folder), exclude)
    return _Walk(folder, exclude).listing()


def files_at(address: Address) -> dict[str, Entry]:
    """All files below an address, hidden ones too, by their paths from it.

    Raises:
        ImageSourceError: it cannot be listed. AddressError: it cannot be reached.
    """
    try:
        return address.files()
    except OSError as error:
        raise ImageSourceError(f"{address} cannot be listed: {error.strerror}") from error


def visible_files(names: Iterable[str], exclude: Sequence[str] = ()) -> Listing:
    """The listing of a folder whose files are known by their paths; the rules are those of ``list_files``."""
    visible: list[str] = []
    hidden: set[tuple[str, ...]] = set()
    excluded = 0
    unmatched = dict.fromkeys(exclude)
    for name in sorted(names, key=_parts):
        parts = _parts(name)
        for end in range(1, len(parts) + 1):
            if is_hidden(parts[end - 1]):
                if end < len(parts) or is_image(name):
                    hidden.add(tuple(parts[:end]))
                break
            matching = [pattern for pattern in exclude if _matches(parts[:end], _glob(pattern))]
            if matching:
                for pattern in matching:
                    unmatched.pop(pattern, None)
                excluded += is_image(name) and not any(map(is_hidden, parts[end:]))
                break
        else:
            visible.append(name)
    return Listing(visible, len(hidden), excluded, list(unmatched), [])


class _Walk:
    """Walks through a folder of this machine and lists its files."""

    def __init__(self, folder: Path, exclude: Sequence[str]):
        self._folder = folder
        self._exclude = exclude
        self._unmatched = dict.fromkeys(exclude)
        self._visited: set[tuple[int, int]] = set()
        self._names: list[str] = []
        self._links: list[str] = []  # to folders, not yet followed
        self._hidden = 0
        self._excluded = 0
        self._failures: list[Failure] = []

    def listing(self) -> Listing:
        """Walks, first where no link leads."""
        starts = [""]
        while starts:
            for start in starts:
                self._list_tree(start)
            starts = sorted(self._links, key=_parts)
            self._links = []
        names = sorted(self._names, key=_parts)
        failures = sorted(self._failures, key=lambda failure: _parts(failure.id))
        return Listing(names, self._hidden, self._excluded, list(self._unmatched), failures)

    def _list_tree(self, start: str) -> None:
        """Lists a folder and those below it, but for linked ones."""
        pending = [start]
        while pending:
            name = pending.pop()
            try:
                status = (self._folder / name).stat()
                identity = (status.st_dev, status.st_ino)
                if identity not in self._visited:
                    self._visited.add(identity)
                    pending += sorted(self._list_folder(name), reverse=True)
            except OSError as error:
                self._fail(name, error)

    def _list_folder(self, folder: str) -> list[str]:
        """Lists the files of one folder; returns the folders in it."""
        folders = []
        for entry in _entries(self._folder / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            is_folder = _is_folder(entry)
            if is_hidden(entry.name):
                self._hidden += is_folder or is_image(entry.name)
            elif self._matches(name):
                self._excluded += self._images_below(name) if is_folder else is_image(entry.name)
            elif is_folder and entry.is_symlink():
                self._links.append(name)
            elif is_folder:
                folders.append(name)
            elif entry.is_symlink() and not is_image(entry.name) and not (self._folder / name).exists():
                self._failures.append(Failure(name, "dataset", "a link that leads nowhere"))
            else:
                self._names.append(name)
        return folders

    def _images_below(self, start: str) -> int:
        """The number of images in a folder that is left out, as far as it can be read; no link is followed."""
        number = 0
        pending = [start]
        while pending:
            folder = pending.pop()
            for entry in _entries_if_readable(self._folder / folder):
                if is_hidden(entry.name):
                    continue
                if _is_folder(entry):
                    pending += [] if entry.is_symlink() else [f"{folder}/{entry.name}"]
                else:
                    number += is_image(entry.name)
        return number

    def _matches(self, name: str) -> bool:
        """Whether a pattern matches the path itself; notes which do."""
        matching = [pattern for pattern in self._exclude if _matches(_parts(name), _glob(pattern))]
        for pattern in matching:
            self._unmatched.pop(pattern, None)
        return bool(matching)

    def _fail(self, name: str, error: OSError) -> None:
        """Records a folder that cannot be read."""
        if not name:
            raise ImageSourceError(f"{self._folder} cannot be read: {error.strerror}") from error
        self._failures.append(Failure(name, "dataset", f"a folder that cannot be read: {error.strerror}"))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


def _entries_if_readable(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(_entries(folder))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _parts(path: str) -> list[str]:
    return path.split("/")


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted; none where it cannot be read. What is called as an image is none."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name) and not is_image(entry.name))
        return [entry for entry in entries if entry.is_dir()]
    except (OSError, ValueError):
        return []


def is_hidden(name: str) -> bool:
    """Whether a file or a folder is hidden by its name, or one that systems put beside people's files."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES  # of 100,000 names pathlib takes seconds


def kinds_of(names: Iterable[str]) -> str:
    """How many files have which suffix, for messages: ``8 .dng, 4 .txt, 3 without suffix``, the most frequent first."""
    counts = Counter(PurePosixPath(name).suffix.lower() for name in names)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shares = [f"{number:,} {shown(suffix) if suffix else 'without suffix'}" for suffix, number in ordered[:_KINDS]]
    rest = sum(number for _, number in ordered[_KINDS:])
    return ", ".join(shares) + (f" and {rest:,} others" if rest else "")


def is_excluded(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches a path, or a folder that it lies in.

    In a pattern ``*``, ``?`` and ``[abc]`` stand for letters of one name, and ``**`` for any number of folders, also
    none. A pattern with a ``/`` (other than at its end) is compared with the path from its start, any other with each
    name in it. Capital letters differ from small ones.

    Args:
        path: relative, with ``/``.

    Example:
        >>> is_excluded("2019/raw/a.jpg", ["raw"]), is_excluded("2019/raw/a.jpg", ["2019/*.jpg"])
        (True, False)
        >>> is_excluded("2019/raw/a.jpg", ["2019/**/*.jpg"])
        True
    """
    parts = _parts(path)
    ways = [parts[:length] for length in range(1, len(parts) + 1)]
    globs = [_glob(pattern) for pattern in patterns]
    return any(_matches(way, glob) for glob in globs for way in ways)


class _Glob(NamedTuple):
    """A pattern by its parts; it is compared from the path's start where it ``is_anchored``, else with one name."""

    parts: tuple[str, ...]
    is_anchored: bool


@functools.lru_cache(maxsize=256)
def _glob(pattern: str) -> _Glob:
    composed = unicodedata.normalize("NFC", pattern)
    parts = tuple(part for part in _parts(composed) if part not in ("", "."))
    return _Glob(parts, "/" in composed.rstrip("/"))


def _matches(parts: Sequence[str], glob: _Glob) -> bool:
    """Whether a pattern matches a path itself."""
    if not glob.parts:
        return False
    return _fits(parts if glob.is_anchored else parts[-1:], glob.parts)


def _fits(parts: Sequence[str], globs: Sequence[str]) -> bool:
    names = [unicodedata.normalize("NFC", part) for part in parts]
    ends = {0}  # how many parts the globs so far can match
    for glob in globs:
        if glob == "**":
            ends = {end for end in range(len(names) + 1) if end >= min(ends)}
        else:
            ends = {end + 1 for end in ends if end < len(names) and fnmatchcase(names[end], glob)}
        if not ends:
            return False
    return len(names) in ends
