"""Addresses such as ``s3://bucket/data``, which fsspec reads, with the methods of a path.

An ``Address`` has those methods that reading needs (``/``, ``is_dir``, ``glob``, ``open`` …), so that the same code
reads from paths and addresses. ``base.drivers`` asks fsspec, and turns its errors into ours.
"""

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import total_ordering
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast
from urllib.parse import quote, unquote

from onceover.base.drivers import AddressError, ask, check_driver, forget, host_of, kind_of, read_part
from onceover.base.entries import Entry, entry_of, number_of

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BUFFER = 2**22  # bytes that are read at once of a file that is opened
_WEB = ("http", "https")  # whose servers list no files, and whose addresses are quoted


_listed: dict[str, "dict[str, Entry]"] = {}  # the files below the address that was listed last


def is_address(name: "str | Path") -> bool:
    """Whether a name is an address, and no path of this machine."""
    return _ADDRESS.match(str(name)) is not None


def path_of(name: str | Path) -> Path:
    """The path or the address that a user names; ``file://`` gives a path. Listings of earlier calls are forgotten.

    An ``Address`` counts as a ``Path`` for the type checker, since it has the methods that are needed.

    Raises:
        AddressError: an address of an unknown kind, or one whose driver is not installed.
    """
    text = str(name)
    if not is_address(text):
        return Path(name)
    if kind_of(text) in ("file", "local"):
        return Path(text.partition("://")[2])
    if "::" in text:
        raise AddressError(f"{text} is an address within another one, which is not read; download and unpack it")
    check_driver(text)
    forget(text)
    _listed.clear()
    return cast(Path, Address(text))


def read_range(path: str | Path, offset: int, size: int) -> bytes:
    """At most ``size`` bytes of a file from ``offset`` on; of an address no more than these are downloaded.

    Raises:
        OSError: not there, or not to be read. AddressError: it cannot be reached.
    """
    if is_address(path):
        return read_part(str(path), offset, size)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


class AddressStat(NamedTuple):
    """The kind, size and modification time of an address, under the names that ``Path.stat`` gives them."""

    st_mode: int
    st_size: int
    st_mtime_ns: int
    st_ino: int
    st_dev: int = 0


@total_ordering
class Address:
    """An address of a file or folder, with a path's methods; it can be pickled, and used in threads and after a fork.

    Attributes:
        lists: whether folders of its kind can be listed, which web servers' cannot.
    """

    def __init__(self, text: str):
        self._host = host_of(text)
        path = text[len(self._host) :]
        self.lists = kind_of(text) not in _WEB
        self._query = ""
        if not self.lists:
            path, mark, query = path.partition("?")
            self._query = mark + query
        self._path = path.strip("/")

    def __str__(self) -> str:
        path = f"/{self._path}" if self._path else ""
        return f"{self._host}{path}{self._query}"

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __reduce__(self) -> tuple[type["Address"], tuple[str]]:
        return Address, (str(self),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and str(self) == str(other)

    def __lt__(self, other: "Address") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: object) -> "Address":
        text = str(name)
        if text in ("", "."):
            return self
        if is_address(text):
            return Address(text)
        return self._at(f"{self._path}/{text if self.lists else quote(text)}")

    def _at(self, path: str) -> "Address":
        """Another path of the same host."""
        return Address(f"{self._host}/{path.lstrip('/')}{self._query}")

    @property
    def name(self) -> str:
        """The last part."""
        last = self._path.rpartition("/")[2]
        return last if self.lists else unquote(last)

    @property
    def suffix(self) -> str:
        """The last suffix of the name."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> "Address":
        """The folder that it lies in."""
        return self._at(self._path.rpartition("/")[0])

    def with_name(self, name: str) -> "Address":
        """Its neighbour of that name."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "Address":
        """Its neighbour of the same stem and another suffix."""
        return self.with_name(f"{self.stem}{suffix}")

    def relative_to(self, folder: "Address") -> PurePosixPath:
        """The path that leads here from a folder.

        Raises:
            ValueError: it does not lie below it.
        """
        here, there = (path._path if self.lists else unquote(path._path) for path in (self, folder))
        return PurePosixPath(here).relative_to(there)

    def resolve(self) -> "Address":
        """The same address: it is complete, and there are no links."""
        return self

    def absolute(self) -> "Address":
        """The same address: it is complete."""
        return self

    def entry(self) -> Entry:
        """The entry of the file or folder at the address.

        Raises:
            FileNotFoundError: nothing is there. OSError: it cannot be told. AddressError: it cannot be reached.
        """
        return entry_of(ask(str(self), lambda driver: driver.info(driver._strip_protocol(str(self)))))

    def stat(self) -> AddressStat:
        """Kind, size and modification time; a time that is not told is a number that goes with the content, or 0.

        Raises:
            FileNotFoundError: nothing is there. OSError: it cannot be told. AddressError: it cannot be reached.
        """
        entry = self.entry()
        mode = stat.S_IFDIR if entry.is_folder else stat.S_IFREG
        return AddressStat(mode, entry.size or 0, entry.mtime_ns, number_of(str(self)))

    def exists(self) -> bool:
        """Whether anything is there.

        Raises:
            AddressError: access is refused, so that it cannot be told.
        """
        try:
            self.entry()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise AddressError(f"{self}: {error.strerror}") from error
        return True

    def is_file(self) -> bool:
        """Whether it is a file; one that may not be looked at, or is not there, is none."""
        return self._is(folder=False)

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self._is(folder=True)

    def _is(self, folder: bool) -> bool:
        try:
            return self.entry().is_folder == folder
        except (FileNotFoundError, PermissionError):  # S3 refuses what is not there to who may not list
            return False

    def entries(self) -> dict[str, Entry]:
        """The files and folders in the folder, by name.

        Raises:
            FileNotFoundError: no such folder. OSError: it cannot be listed. AddressError: it cannot be reached.
        """
        listed = self._listing("ls")
        return {name: entry for name, entry in listed.items() if "/" not in name}

    def files(self) -> dict[str, Entry]:
        """All files below the folder, by their paths from it; one listing, kept until ``path_of`` is called again.

        Raises:
            FileNotFoundError: no such folder. OSError: it cannot be listed. AddressError: it cannot be reached.
        """
        key = str(self)
        if key not in _listed:
            files = {name: entry for name, entry in self._listing("find").items() if not entry.is_folder}
            _listed.clear()
            _listed[key] = files
            return files
        return _listed[key]

    def _listing(self, method: str) -> dict[str, Entry]:
        """The files and folders that a driver's method (``ls``, ``find``) lists, by their paths from the folder."""
        text = str(self) if self.lists else f"{self._host}/{self._path}/{self._query}"

        def listed(driver: Any) -> tuple[str, list[dict[str, Any]]]:
            path = driver._strip_protocol(text)
            infos = getattr(driver, method)(path, detail=True)
            return path, list(infos.values()) if isinstance(infos, dict) else infos

        base, infos = ask(text, listed)
        start = base.rstrip("/") + "/"
        entries = {}
        for info in infos:
            name = info["name"].removeprefix(start) if info["name"].startswith(start) else ""
            name = name if self.lists else unquote(name)
            if name and not name.endswith("/"):  # a folder's own entry, as some programs write it
                entries[name] = entry_of(info)
        return entries

    def iterdir(self) -> Iterator["Address"]:
        """The addresses of the files and folders in the folder.

        Raises:
            FileNotFoundError: no such folder. OSError: it cannot be listed. AddressError: it cannot be reached.
        """
        for name in sorted(self.entries()):
            yield self / name

    def glob(self, pattern: str) -> Iterator["Address"]:
        """The files and folders below that a pattern matches: ``*.tar``, ``a/*``, ``**/*.csv``.

        Raises:
            AddressError: a folder cannot be listed. A web server's folder matches nothing.
        """
        first, _, rest = pattern.partition("/")
        if first == "**" and rest:
            yield from self.glob(rest)
        try:
            entries = self.entries()
        except FileNotFoundError:
            return
        except OSError as error:
            raise AddressError(f"{self}: {error.strerror}") from error
        for name in sorted(entries):
            if first == "**":
                if entries[name].is_folder:
                    yield from (self / name).glob(pattern)
            elif fnmatchcase(name, first):
                if not rest:
                    yield self / name
                elif entries[name].is_folder:
                    yield from (self / name).glob(rest)

    def open(self, mode: str = "r", encoding: str | None = None) -> IO[Any]:
        """Opens the file for reading, ``rb`` or ``r``; it can be sought in, and only what is read is downloaded.

        Raises:
            FileNotFoundError: no file. OSError: not to be read. AddressError: it cannot be reached.
        """
        if mode not in ("r", "rb", "rt"):
            raise OSError(errno.EROFS, "addresses are only read", str(self))
        entry = self.entry()
        if entry.is_folder:
            raise IsADirectoryError(errno.EISDIR, "a folder", str(self))
        file = io.BufferedReader(_Parts(str(self), entry.size or 0), _BUFFER)
        return file if mode == "rb" else io.TextIOWrapper(file, encoding)

    def read_bytes(self) -> bytes:
        """The whole content; ``base.files.read_bytes`` has a bound."""
        with self.open("rb") as file:
            return cast(bytes, file.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole content as text."""
        return self.read_bytes().decode(encoding)


class _Parts(io.RawIOBase):
    """A file at an address, each part of which is downloaded when it is read."""

    def __init__(self, text: str, size: int):
        self.name = text
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        position = starts[whence] + offset
        if position < 0:
            raise OSError(errno.EINVAL, "a position before the beginning", self.name)
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        part = read_part(self.name, self._position, wanted)
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)
