"""Images at an address: listed folder by folder, or looked up one by one where folders cannot be listed."""

import contextlib
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from onceover.base.addresses import Address
from onceover.base.entries import Entry
from onceover.base.progress import tracked
from onceover.base.threads import ahead
from onceover.extract.image_source import ABSENT, FolderImages
from onceover.extract.ledger import Failure
from onceover.extract.listing import Listing, files_at, visible_files
from onceover.extract.names import why_no_path

_FEW = 16  # files of a folder that are looked up one by one before it is listed
_AT_ONCE = 16  # requests
_SAMPLE = 32  # names by which a folder is chosen that cannot be listed


def image_folder(root: Path, folder: str = ".", prefix: str = "") -> FolderImages:
    """The source of images in a folder, on this machine or at an address; as ``FolderImages`` has its arguments."""
    if isinstance(root, Address):
        return AddressImages(root, folder, prefix)
    return FolderImages(root, folder, prefix)


def may_be_folder(path: Path) -> bool:
    """Whether there is such a folder, or there may be, since web servers do not tell."""
    return path.is_dir() or (isinstance(path, Address) and not path.lists)


class AddressImages(FolderImages):
    """Files below a folder at an address, which are looked up once, in few requests.

    A folder is listed where many of its files are asked for. Web servers list none, and object stores only to those
    who may list: then each file is asked for by itself, and names have to agree letter for letter.
    """

    def __init__(self, root: Address, folder: str = ".", prefix: str = ""):
        super().__init__(cast(Path, root), folder, prefix)
        self._address = root
        self._lists = root.lists
        self._listed: dict[str, dict[str, Entry]] = {}  # by folder, relative to the root
        self._looked_up: dict[str, Entry | None] = {}  # by key
        self._asked: Counter[str] = Counter()  # single files, by folder

    def __getstate__(self) -> dict:
        nothing: dict[str, Any] = {"_listed": {}, "_looked_up": {}, "_asked": Counter()}
        return self.__dict__ | nothing  # processes only open files

    def reads(self, keys: Sequence[str]) -> Iterator[Callable[[], bytes]]:
        """For each image a call that gives its bytes, as ``open`` does; several are downloaded at a time."""

        def begin(key: str) -> Callable[[], Callable[[], bytes]]:
            future = pool.submit(self.open, key)
            return lambda: future.result

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from ahead(begin, keys, _AT_ONCE)

    def stat(self, key: str) -> tuple[int, int]:
        """Size in bytes and modification time in ns; (-1, -1) where no such file can be looked at.

        Raises:
            AddressError: the address cannot be reached.
        """
        entry = self._entry(key)
        if entry is not None and entry.size is None:  # listed by a server that does not tell
            entry = self._look_up(key)
        if entry is None or entry.is_folder:
            return -1, -1
        return entry.size or 0, entry.mtime_ns

    def resolve(self, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str | None]]:
        """The key of each name, and why a name is left out, or None, as ``FolderImages`` has it.

        Raises:
            AddressError: the address cannot be reached.
        """
        names = list(names)
        self._prepare(names)
        return super().resolve(names)

    def has_any(self, names: Iterable[str]) -> bool:
        """Whether one of the names is that of a file in the folder, letter for letter."""
        names = list(names)
        if not self._lists:
            names = names[:_SAMPLE]
        self._prepare(names)
        return super().has_any(names)

    def why_unreadable(self, name: str) -> str | None:
        """Why a name is that of no file in the folder, or None."""
        entry = self._entry(self._key(name))
        if entry is None:
            return ABSENT
        return "no regular file" if entry.is_folder else None

    def names_in(self, parent: str) -> list[str]:
        """The names in a folder below the folder, sorted; none where it cannot be listed."""
        return sorted(self._folder(self._key(parent)) or {})

    def images_beside(self, keys: set[str], exclude: Sequence[str] = ()) -> list[Failure]:
        """A failure for each image in the folder that is not among ``keys``; none where it cannot be listed."""
        return super().images_beside(keys, exclude) if self._lists else []

    def listing(self, exclude: Sequence[str] = ()) -> Listing:
        """All files in the folder and below it.

        Raises:
            ImageSourceError: it cannot be listed. AddressError: the address cannot be reached.
        """
        start = self._key("")
        files = files_at(self._address / start)
        for name, entry in files.items():
            parent, _, last = posixpath.join(start, name).rpartition("/")
            self._listed.setdefault(parent, {})[last] = entry
        return visible_files(files, exclude)

    def _key(self, name: str) -> str:
        """The key of a name in the folder; "" is that of the root."""
        key = posixpath.normpath(posixpath.join(self.folder, name))
        return "" if key == "." else key

    def _prepare(self, names: list[str]) -> None:
        """Looks names up that will be asked for: their folders where they are few, else each by itself."""
        keys = dict.fromkeys(self._key(name) for name in names if not why_no_path(name))
        counts = Counter(posixpath.dirname(key) for key in keys)
        if len(counts) <= max(_FEW, len(keys) // _FEW):
            _at_once(self._folder, [folder for folder in counts if folder not in self._listed], "folders")
        alone = [key for key in keys if posixpath.dirname(key) not in self._listed and key not in self._looked_up]
        _at_once(self._look_up, alone, "images")

    def _entry(self, key: str) -> Entry | None:
        """The entry of a file; its folder is listed once many of its files were asked for."""
        folder, name = posixpath.split(key)
        if key in self._looked_up:
            return self._looked_up[key]
        if folder not in self._listed:
            self._asked[folder] += 1
            if self._asked[folder] <= _FEW or self._folder(folder) is None:
                return self._look_up(key)
        return self._listed[folder].get(name)

    def _look_up(self, key: str) -> Entry | None:
        """Asks for a single file; None where it is not there or may not be looked at."""
        entry = None
        with contextlib.suppress(OSError):
            entry = (self._address / key).entry()
        self._looked_up[key] = entry
        return entry

    def _folder(self, folder: str) -> dict[str, Entry] | None:
        """The entries of a folder, which is listed once; None where it cannot be listed."""
        if folder not in self._listed and self._lists:
            try:
                self._listed[folder] = (self._address / folder).entries()
            except FileNotFoundError:
                self._listed[folder] = {}
            except OSError:  # who may read may not list
                self._lists = False
        return self._listed.get(folder)


def _at_once(work: Callable[[str], Any], keys: list[str], unit: str) -> None:
    """Has ``work`` done for each key, several at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = [pool.submit(work, key) for key in keys]
        try:
            for future in tracked(futures, "looking up", unit):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
