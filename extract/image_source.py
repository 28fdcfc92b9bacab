"""Sources of a dataset's images: files below a folder here, members of tars and rows of Parquet files elsewhere.

An image has a *key*, in a folder its path from there. A source can be pickled, so that processes can read from it.
"""

import posixpath
import stat
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from onceover.base.files import read_bytes
from onceover.extract.containers import stamp_of
from onceover.extract.ledger import NO_CAPTIONS, NO_SUCH_IMAGE, Failure
from onceover.extract.listing import Listing, is_image, list_files
from onceover.extract.names import is_text, shown, why_no_path
from onceover.extract.pictures import MAX_BYTES

ABSENT = "no such file"


class ImageSource(ABC):
    """Images by key."""

    @abstractmethod
    def open(self, key: str) -> bytes:
        """The bytes of an image, ``MAX_BYTES`` at most.

        Raises:
            OSError: it cannot be read now. FileError: it is no regular file, or too large.
        """

    def reads(self, keys: Sequence[str]) -> Iterator[Callable[[], bytes]]:
        """For each image a call that gives its bytes, as ``open`` does; a slow source begins some ahead."""
        for key in keys:
            yield partial(self.open, key)

    @abstractmethod
    def stat(self, key: str) -> tuple[int, int]:
        """Size in bytes and modification time in ns; (-1, -1) where no such image can be looked at.

        A change of the image has to show in them. Where its size is known only once it is read, they are those of the
        file that it lies in.
        """

    def describe(self, key: str) -> str:
        """Where an image lies, for messages."""
        return key

    def local(self, name: str) -> str:
        """An image's name relative to this source, where it is a path that leads here; else as it is."""
        return name

    def resolve(self, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str | None]]:
        """The key of each name, and why a name is left out, or None."""
        keys = {name: name for name in names}
        reasons = {name: None if self.stat(name)[0] >= 0 else NO_SUCH_IMAGE for name in keys}
        return keys, reasons

    def images_beside(self, keys: set[str], exclude: Sequence[str] = ()) -> list[Failure]:
        """A failure for each image of the source that is not among ``keys``; of a source that cannot tell, none.

        Args:
            exclude: patterns of images that are left alone, as ``listing.is_excluded`` takes them.
        """
        return []


class FolderImages(ImageSource):
    """Files below a folder.

    Args:
        root: the folder that keys start from. folder: the one below it in which names are looked for.
        prefix: a beginning of names that is left out, such as a folder of another machine.
    """

    def __init__(self, root: Path, folder: str = ".", prefix: str = ""):
        self.root = root
        self.folder = folder
        self.prefix = prefix
        self._roots = [f"{posixpath.normpath(path)}/" for path in (str(root.absolute()), str(root.resolve()))]

    def open(self, key: str) -> bytes:
        """The bytes of a regular file.

        Raises:
            OSError: it cannot be read now. FileError: it is no regular file, or too large.
        """
        return read_bytes(self.root / key, MAX_BYTES)

    def stat(self, key: str) -> tuple[int, int]:
        """Size in bytes and modification time in ns; (-1, -1) where the file cannot be looked at."""
        return stamp_of(self.root / key)

    def describe(self, key: str) -> str:
        """The path of the file."""
        return str(self.root / key)

    def local(self, name: str) -> str:
        """An image's name relative to the root where it is a path to a file below it, and without the prefix."""
        for start in (self.prefix, *self._roots):
            if start and name.startswith(start):
                return name[len(start) :]
        return name

    def resolve(self, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str | None]]:
        """The key of each name, and why a name is left out, or None.

        A file whose name differs in case, Unicode form or blanks is taken where it is the only one; several names may
        mean it. One that has a suffix where the name has none is taken where, besides, no other name means it.
        """
        files: dict[str, str] = {}
        reasons: dict[str, str | None] = {}
        candidates_of: dict[str, list[str]] = {}
        near = NearNames(self)
        for name in dict.fromkeys(names):
            files[name] = name
            reasons[name] = why_no_path(name) or self.why_unreadable(name)
            if reasons[name] == ABSENT:
                candidates_of[name] = near.files(name)
        claims = Counter(file for candidates in candidates_of.values() for file in candidates)
        for name, candidates in candidates_of.items():
            only = candidates[0] if len(candidates) == 1 else None
            if only is not None and (_is_near(name, only) or (claims[only] == 1 and only not in reasons)):
                files[name] = only
                reasons[name] = None
            else:
                hint = f" (near is {shown(candidates[0])})" if candidates else ""
                reasons[name] = f"{NO_SUCH_IMAGE} in {self.folder}/{hint}"
        keys = {name: posixpath.normpath(posixpath.join(self.folder, file)) for name, file in files.items()}
        return keys, reasons

    def images_beside(self, keys: set[str], exclude: Sequence[str] = ()) -> list[Failure]:
        """A failure for each image in the folder that is not among ``keys``, and for each folder that is unreadable."""
        listing = self.listing(exclude)
        failures = listing.failures
        for name in sorted(listing.names):
            key = posixpath.normpath(posixpath.join(self.folder, name))
            if is_image(name) and key not in keys:
                failures.append(Failure(name, "dataset", NO_CAPTIONS))
        return failures

    def has_any(self, names: Iterable[str]) -> bool:
        """Whether one of the names is that of a readable file in the folder, letter for letter."""
        return any(not why_no_path(name) and not self.why_unreadable(name) for name in names)

    def has_near(self, names: Iterable[str]) -> bool:
        """Whether one of the names is near that of a file in the folder."""
        near = NearNames(self)
        return any(not why_no_path(name) and near.files(name) for name in names)

    def why_unreadable(self, name: str) -> str | None:
        """Why a name is that of no readable file in the folder, or None."""
        return why_unreadable(self.root / self.folder / name)

    def names_in(self, parent: str) -> list[str]:
        """The names in a folder below the folder, sorted; none where it is no folder or cannot be read."""
        try:
            return sorted(entry.name for entry in (self.root / self.folder / parent).iterdir())
        except (OSError, ValueError):
            return []

    def listing(self, exclude: Sequence[str] = ()) -> Listing:
        """All files in the folder and below it, as ``listing.list_files`` lists them."""
        return list_files(self.root / self.folder, exclude)


class NearNames:
    """The files in a source's folder that a name may mean, although it is written in another way.

    They equal the name up to case, Unicode form and outer blanks; else the name without the quoting of addresses
    (``a%20b.jpg``); else, where the name has no image's suffix, the name with one, or with the same number.
    """

    def __init__(self, images: FolderImages):
        self._images = images
        self._listed: dict[str, dict[str, list[str]]] = {}

    def files(self, name: str) -> list[str]:
        """The regular files that ``name`` may mean; where they are several, it is not known which."""
        forms: list[Callable[[str], str]] = [_near_form]
        if not is_image(name):
            forms += [_stem_form, _number_form]
        for written in dict.fromkeys((name, unquote(name))):
            for form in forms:
                files = self._files(written, form)
                if files:
                    return files
        return []

    def _files(self, name: str, form: Callable[[str], str]) -> list[str]:
        """The regular files whose names equal ``name`` in a form."""
        *folders, last = name.split("/")
        parents = [""]
        for part in folders:
            entries = [self._entries(parent, _near_form).get(_near_form(part), []) for parent in parents]
            parents = [entry for same in entries for entry in same]
        files = [file for parent in parents for file in self._entries(parent, form).get(form(last), [])]
        return [file for file in files if is_text(file) and not self._images.why_unreadable(file)]

    def _entries(self, parent: str, form: Callable[[str], str]) -> dict[str, list[str]]:
        """The paths of the files and folders in a folder, by a form of their names."""
        key = f"{form.__name__}:{parent}"
        if key not in self._listed:
            entries: dict[str, list[str]] = {}
            for entry in self._images.names_in(parent):
                if form is _near_form:
                    entries.setdefault(form(entry), []).append(posixpath.join(parent, entry))
                elif is_image(entry):
                    stem = form(PurePosixPath(entry).stem)
                    entries.setdefault(stem, []).append(posixpath.join(parent, entry))
            self._listed[key] = entries
        return self._listed[key]


def _near_form(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.strip()).casefold())


def _is_near(name: str, other: str) -> bool:
    """Whether two paths are equal up to case, Unicode form and blanks about their parts."""
    return [*map(_near_form, name.split("/"))] == [*map(_near_form, other.split("/"))]


def _stem_form(stem: str) -> str:
    return _near_form(stem)


def _number_form(stem: str) -> str:
    """A number without the zeros before it, which a table may have lost, and without ``.0``; others as they are."""
    number = stem.removesuffix(".0")
    return number.lstrip("0") or "0" if number.isdecimal() else stem


def why_unreadable(path: Path) -> str | None:
    """Why a path is no regular file, or None."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ABSENT
    except OSError as error:
        return error.strerror
    except ValueError:
        return "a name with a NUL character"
    return None if stat.S_ISREG(mode) else "no regular file"
