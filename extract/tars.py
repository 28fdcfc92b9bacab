"""Tar archives that are read in place: the names and positions of their members are indexed, and nothing is unpacked.

Only plain tars can be read so. Links, sparse files and cut-off members are reported, never followed. The formats are
POSIX pax and ustar, and GNU's long names.
"""

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from errno import ENOENT
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from onceover.base.addresses import read_range
from onceover.base.errors import OnceoverError
from onceover.base.files import FileError
from onceover.extract.containers import POINTER_FAULT, check_unchanged, is_pointer, stamp_of
from onceover.extract.image_source import ImageSource
from onceover.extract.ledger import NO_CAPTIONS, NO_SUCH_IMAGE, Failure
from onceover.extract.listing import is_excluded
from onceover.extract.pictures import MAX_BYTES

_BLOCK = 512
_MAX_HEADER = 2**20  # bytes of a long name or of a pax header
_AFTER_END = 2**20  # bytes after the end mark that are looked at for a second tar
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"PK": "zip"}
_CUT = "the tar is cut off"
_AGAIN = "fetch it again"
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_HEADERS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)  # of the entry that follows


class TarError(OnceoverError):
    """A tar that is damaged, cut off, or packed."""


class Member(NamedTuple):
    """An entry of a tar: its name, the start and size of its content in bytes, and why it cannot be read, or ""."""

    name: str
    start: int
    size: int
    fault: str = ""


def members(file: BinaryIO) -> Iterator[Member]:
    """The entries of a tar but folders, in their order. The file may be read elsewhere between two of them.

    Raises:
        TarError: it is packed or no tar, or ends or breaks off before its end; all that is whole was given before.
    """
    end = file.seek(0, 2)
    start = 0
    long_name = ""
    extended: dict[str, str] = {}
    while True:
        header = _read(file, start, _BLOCK)
        if len(header) < _BLOCK:
            if start == 0 and (header[:2] in _PACKED or is_pointer(header)):
                raise TarError(_why_no_header(header, start))
            raise TarError(f"{_CUT}: it ends after {end:,} bytes without the end mark of a tar; {_AGAIN}")
        if not any(header):
            _check_end(file, start + _BLOCK)
            return
        try:
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise TarError(_why_no_header(header, start)) from error
        start += _BLOCK
        if entry.type == tarfile.GNUTYPE_SPARSE:
            start = _after_sparse_headers(file, header, start)
        has_content = entry.isreg() or entry.type not in tarfile.SUPPORTED_TYPES or entry.type in _HEADERS
        size = _size(extended.get("size"), entry.size) if has_content else 0
        name = extended.get("path") or long_name or entry.name
        _check_size(name, start, size, end)
        following = start + -(-size // _BLOCK) * _BLOCK
        if entry.type in _HEADERS:
            if size > _MAX_HEADER:
                reason = f"a header of {size:,} bytes at byte {start:,}; what follows is not read"
                raise TarError(f"the tar is damaged: {reason}")
            content = _read(file, start, size)
            if entry.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif entry.type in _PAX:
                extended = _pax(content, start)
        else:
            fault = _why_no_file(entry, extended)
            if fault is not None:
                yield Member(name, start, size, fault)
            long_name = ""
            extended = {}
        start = following


def _check_size(name: str, start: int, size: int, end: int) -> None:
    """Refuses an entry that does not lie within the tar, which ends after ``end`` bytes.

    Raises:
        TarError: a negative size, or one beyond the end.
    """
    if size < 0:
        raise TarError(f"the tar is damaged: {name:.80} has a negative size; what follows it is not read")
    if size > end - start:
        needed = f"within {name:.80}, which needs {start + size:,}"
        raise TarError(f"{_CUT}: it ends after {end:,} bytes, {needed}; {_AGAIN}")


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _check_end(file: BinaryIO, start: int) -> None:
    """Refuses what is not zero after the end mark: a second tar that was joined to the first.

    Raises:
        TarError: there is more.
    """
    if any(_read(file, start, _AFTER_END)):
        reason = f"what follows byte {start:,} is not read; split joined tars"
        raise TarError(f"the tar goes on after its end mark: {reason}")


def _why_no_header(header: bytes, start: int) -> str:
    if start == 0:
        packed = _PACKED.get(header[:2])
        if is_pointer(header):
            return POINTER_FAULT
        if packed is not None:
            return f"the tar is packed ({packed}), and only plain tars can be read in place; unpack it to a plain .tar"
        return "no tar, by its first bytes"
    return f"the tar is damaged: no header at byte {start:,}; what follows is not read; {_AGAIN}"


def _after_sparse_headers(file: BinaryIO, header: bytes, start: int) -> int:
    """Where the content of a sparse file of GNU's old format starts, after headers that tell of its holes."""
    more = header[482]
    while more:
        block = _read(file, start, _BLOCK)
        if len(block) < _BLOCK:
            return start  # the next header is missed, which tells of the cut
        more = block[504]
        start += _BLOCK
    return start


def _size(extended: str | None, size: int) -> int:
    """The size of an entry, which a pax header tells where it is large."""
    if extended is None:
        return size
    return int(extended) if extended.isdecimal() and len(extended) < 20 else -1


def _pax(content: bytes, start: int) -> dict[str, str]:
    """The records of a pax header, ``length key=value`` each.

    Raises:
        TarError: it has another form.
    """
    records: dict[str, str] = {}
    position = 0
    while position < len(content) and content[position] != 0:
        length, _, _ = content[position : position + 20].partition(b" ")
        end = position + int(length) if length.isdigit() else 0
        key, equals, value = content[position + len(length) + 1 : end - 1].partition(b"=")
        if not equals or not position < end <= len(content):
            raise TarError(f"the tar is damaged: a broken header at byte {start:,}; what follows is not read")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records


def _why_no_file(entry: tarfile.TarInfo, extended: dict[str, str]) -> str | None:
    """The reason why an entry is not read; "" for a file, which is read; None for a folder, which is passed over."""
    if entry.type == tarfile.DIRTYPE:
        return None
    if entry.issym() or entry.islnk():
        return "a link within a tar; pack the file itself: tar --dereference --hard-dereference"
    if entry.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in extended):
        return "a sparse file within a tar; pack it without --sparse"
    return "" if entry.isreg() else "no regular file"


class TarImages(ImageSource):
    """Images in tars, by ``shard.tar/member``.

    Args:
        root: the folder of the shards. shards: their names.
        keys: of the images. positions: int64 (N, 3), the shard, start and size of each.
        prefix: the beginning of a key that an image's name lacks: the only shard, or "".
    """

    def __init__(self, root: Path, shards: Sequence[str], keys: Sequence[str], positions: np.ndarray, prefix: str = ""):
        self._root = root
        self._shards = list(shards)
        self._rows = {key: row for row, key in enumerate(keys)}
        self._positions = positions
        self._prefix = prefix
        self._stamps = [stamp_of(root / shard) for shard in shards]

    def open(self, key: str) -> bytes:
        """The bytes of an image; the tar is opened anew, so that threads and processes share nothing.

        Raises:
            OSError: it cannot be read now, or the tar was changed. FileError: it is too large, or cut off.
        """
        if key not in self._rows:
            raise FileNotFoundError(ENOENT, NO_SUCH_IMAGE, key)
        shard, start, size = self._positions[self._rows[key]].tolist()
        path = self._root / self._shards[shard]
        if size > MAX_BYTES:
            raise FileError(f"{key} has {size:,} bytes; at most {MAX_BYTES:,} are read")
        check_unchanged(path, self._stamps[shard])
        data = read_range(path, start, size)
        if len(data) < size:
            raise FileError(f"{path} ends within {key}")
        return data

    def stat(self, key: str) -> tuple[int, int]:
        """The image's size, and the modification time of its tar."""
        if key not in self._rows:
            return -1, -1
        shard, _, size = self._positions[self._rows[key]].tolist()
        return size, self._stamps[shard][1]

    def describe(self, key: str) -> str:
        """The path of the tar, and the member."""
        return str(self._root / key)

    def resolve(self, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str | None]]:
        """The key of each name, and why a name is left out, or None."""
        keys = {name: f"{self._prefix}{name}" for name in names}
        reasons: dict[str, str | None] = {}
        for name, key in keys.items():
            reasons[name] = None if key in self._rows else NO_SUCH_IMAGE
        return keys, reasons

    def images_beside(self, keys: set[str], exclude: Sequence[str] = ()) -> list[Failure]:
        """A failure for each image of the tars that is not among ``keys``."""
        others = [key for key in self._rows if key not in keys and not is_excluded(key, exclude)]
        return [Failure(key.removeprefix(self._prefix), "dataset", NO_CAPTIONS) for key in others]
