"""HDF5 files: opened safely, written whole on disks that may fill up, and rows read with a check of each block.

A file may come from anywhere, so that one which reaches outside itself, or claims more than it holds, is refused. A
file written here carries a checksum of every dataset, and of each block of its large ones. Behind its end, where HDF5
does not look, stands a checksum of all its other bytes: damaged ones can make the HDF5 library crash or run for ever,
so that they are compared before it sees them (docs/store-format.md).
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import struct
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from onceover.base.errors import OnceoverError, first_line
from onceover.base.files import ForgivingFile, check_regular, digest, forgiving_file, open_regular, parse_json
from onceover.base.temporary import read_at

CHECKSUM = "sha256"  # the attribute of a dataset that holds the checksum of its values
ATTRIBUTES_CHECKSUM = "attributes_sha256"  # the file's attribute that holds the checksum of all others
BLOCK_CHECKSUMS = "checksums"  # the group that holds the checksums of blocks, by the name of the dataset
BLOCK_BYTES = 2**20  # of rows that have one checksum; a single row where that is larger
ROWS = 1024  # rows hashed at a time
MAX_OBJECTS = 10_000  # groups and datasets; a tokenizer's files are the most of them
MAX_DEPTH = 8
MAX_RATIO = 64  # times the bytes that lie in the file, what a compressed dataset may unpack to
#: the kinds of errors that h5py and decoders raise on damaged files
DAMAGE = (OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError)
_END = b"onceover"  # the last bytes of a file with a checksum behind its end
_LENGTH = struct.Struct("<I")
_MAX_TRAILER = 4096  # bytes
TRAILER_BYTES = _MAX_TRAILER + _LENGTH.size + len(_END)  # at the end of a file, in which its checksum stands
_TEXTS = 8192  # written at a time: where bytes lie in a file depends on it
_STRING = h5py.string_dtype()
_BYTES = h5py.vlen_dtype(np.uint8)


class Hdf5Error(OnceoverError):
    """An HDF5 file that is not to be trusted, is damaged, or was changed while it was read."""


def raise_passing(error: OnceoverError, path: Path) -> None:
    """Raises the system's error where it was no damage that kept a file from being read; such an error may pass.

    HDF5's own errors are of the same type, but have no number.

    Args:
        error: what was raised from the cause.

    Raises:
        OSError: the system's error, with the file's name.
    """
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def open_hdf5(path: str | Path, again: bool = False, max_objects: int = MAX_OBJECTS) -> h5py.File:
    """Opens a file for reading, if it is a regular one, as it was written, and all that it holds lies in it.

    Args:
        again: it was opened before, and its bytes need not be compared with their checksum another time.
        max_objects: groups and datasets that it may hold.

    Raises:
        FileError: no regular file. OSError: not there, or no HDF5 file.
        Hdf5Error: damaged, or with links, external storage, virtual datasets, or datasets that claim more than they
            hold.
    """
    check_regular(path)
    if not again:
        check_bytes(path)
    file = h5py.File(path, "r", locking=False)
    try:
        _refuse_strange_objects(file, Path(path), max_objects)
    except BaseException as error:
        file.close()
        if isinstance(error, OnceoverError) or not isinstance(error, DAMAGE):
            raise
        raise Hdf5Error(f"{path} is damaged ({first_line(error)})") from error
    return file


def _refuse_strange_objects(file: h5py.File, path: Path, max_objects: int) -> None:
    """Looks at every object by HDF5's own calls: h5py's objects for them cost three times the time."""
    waiting: list[tuple[h5py.h5g.GroupID, str, int]] = [(file.id, "", 0)]
    objects = 0
    while waiting:
        group, parent, depth = waiting.pop()
        for name in group:
            objects += 1
            where = f"{parent}/{name.decode(errors='backslashreplace')}"
            if objects > max_objects or depth > MAX_DEPTH:
                raise Hdf5Error(f"{path} holds more groups and datasets than any file of this program; it is not read")
            if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
                raise Hdf5Error(f"{path} reaches elsewhere: {where} is a link; it is not read")
            item = h5py.h5o.open(group, name)
            if isinstance(item, h5py.h5g.GroupID):
                waiting.append((item, where, depth + 1))
            elif isinstance(item, h5py.h5d.DatasetID):
                _refuse_strange_dataset(item, where, path)
            else:
                raise Hdf5Error(f"{path} holds {where}, which is neither a group nor a dataset; it is not read")


def _refuse_strange_dataset(dataset: h5py.h5d.DatasetID, where: str, path: Path) -> None:
    creation = dataset.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL or creation.get_external_count():
        raise Hdf5Error(f"{path} reaches elsewhere: {where} has its values in another file; it is not read")
    dtype = dataset.dtype
    is_text = h5py.check_string_dtype(dtype) is not None
    is_bytes = h5py.check_vlen_dtype(dtype) == np.uint8
    if dataset.rank < 1 or dtype.kind not in "biufO" or (dtype.kind == "O" and not (is_text or is_bytes)):
        raise Hdf5Error(f"{path}: {where} holds no rows of numbers, text or bytes; it is not read")
    shape = dataset.shape
    if math.prod(shape) * dtype.itemsize > MAX_RATIO * max(dataset.get_storage_size(), 1):
        raise Hdf5Error(f"{path}: {where} claims the shape {shape}, and holds no values for it; it is not read")


def check_bytes(path: str | Path) -> bool:
    """Compares a file's bytes, large arrays aside, with the checksum behind its end; whether there is one.

    Raises:
        Hdf5Error: they differ.
    """
    with open_regular(path) as file:
        stated = _read_trailer(file)
        if stated is None:
            return False
        if _digest_of(file, stated["size"], stated["left_out"]) != stated["sha256"]:
            raise Hdf5Error(f"{path} is damaged: its bytes do not match their checksum; remove it and make it again")
    return True


def stated_checksum(path: str | Path) -> str | None:
    """The checksum that stands behind a file's end, by which one file is told from another; None without one."""
    with open_regular(path) as file:
        return checksum_behind(file)


def checksum_behind(file: BinaryIO) -> str | None:
    """The checksum that stands behind the end of an open file; None without one."""
    stated = _read_trailer(file)
    return None if stated is None else stated["sha256"]


def _read_trailer(file: BinaryIO) -> dict[str, Any] | None:
    """The checksum behind a file's end: ``size`` of the HDF5 file, ``left_out`` (start, size) of it, ``sha256``."""
    end = len(_END) + _LENGTH.size
    size = file.seek(0, os.SEEK_END)
    if size < end:
        return None
    file.seek(-end, os.SEEK_END)
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
    if file.read() != _END or length > min(size - end, _MAX_TRAILER):
        return None
    file.seek(size - end - length)
    try:
        stated = parse_json(file.read(length))
        left_out = [[int(start), int(length)] for start, length in stated["left_out"]]
        return {"size": int(stated["size"]), "sha256": str(stated["sha256"]), "left_out": left_out}
    except (ValueError, TypeError, KeyError):
        return None


def _digest_of(file: BinaryIO, size: int, left_out: list[list[int]]) -> str:
    """SHA-256 of the first ``size`` bytes without those that are left out."""
    state = hashlib.sha256()
    place = 0
    for start, length in [*sorted(left_out), [size, 0]]:
        file.seek(place)
        remaining = start - place
        while remaining > 0 and (data := file.read(min(remaining, BLOCK_BYTES))):
            state.update(data)
            remaining -= len(data)
        place = start + length
    return state.hexdigest()


def _write_trailer(raw: BinaryIO, left_out: list[list[int]]) -> None:
    """Writes the checksum of a complete HDF5 file behind its end."""
    size = raw.seek(0, os.SEEK_END)
    sha256 = _digest_of(raw, size, left_out)
    payload = json.dumps({"size": size, "left_out": left_out, "sha256": sha256}).encode()
    raw.seek(size)
    raw.write(payload + _LENGTH.pack(len(payload)) + _END)


def sign_hdf5(path: str | Path, blocks_of: tuple[str, ...] = ()) -> None:
    """Makes all checksums of a file right for what it holds, as after a change that was meant."""
    strip_checksum(path)
    with h5py.File(path, "r+") as file:
        left_out = add_checksums(file, blocks_of)
    with open(path, "rb+") as file:
        _write_trailer(file, left_out)


def strip_checksum(path: str | Path) -> None:
    """Takes the checksum behind a file's end away, if there is one; what other programs change has none."""
    with open(path, "rb") as file:
        stated = _read_trailer(file)
    if stated is not None:
        os.truncate(path, stated["size"])


class Hdf5Writer:
    """An HDF5 file under way: ``file`` is open for writing, ``path`` is where it lies until it is complete."""

    def __init__(self, path: Path, raw: ForgivingFile, file: h5py.File):
        self.path = path
        self.file = file
        self._raw = raw

    def check(self) -> None:
        """Raises the first error of writing, if there was one: a full disk, for example."""
        self._raw.check()


@contextlib.contextmanager
def write_hdf5(path: str | Path, blocks_of: tuple[str, ...] = ()) -> Iterator[Hdf5Writer]:
    """Writes an HDF5 file whole or not at all, with checksums of all that it holds.

    Args:
        blocks_of: names of the large datasets, whose blocks get checksums of their own.

    Raises:
        OSError: what writing ended with; the file that was at ``path`` is still there.
    """
    with forgiving_file(path) as raw:
        with h5py.File(raw, "w") as file:
            writer = Hdf5Writer(Path(raw.name), raw, file)
            yield writer
            writer.check()
            left_out = add_checksums(file, blocks_of)
        writer.check()
        _write_trailer(raw, left_out)


def hdf5_bytes(fill_file: Callable[[h5py.File], None]) -> bytes:
    """A small HDF5 file with all its checksums, as bytes; ``fill_file`` is given it to write to."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill_file(file)
        left_out = add_checksums(file)
    _write_trailer(buffer, left_out)
    return buffer.getvalue()


def add_checksums(file: h5py.File, blocks_of: tuple[str, ...] = ()) -> list[list[int]]:
    """Gives every dataset a checksum, blocks of some datasets one each, and the attributes of all together one.

    Returns:
        Where in the file arrays lie whose blocks have checksums of their own: (start, size in bytes) of each.
    """
    if BLOCK_CHECKSUMS in file:
        del file[BLOCK_CHECKSUMS]
    for name in blocks_of:
        if name in file:
            file.create_dataset(f"{BLOCK_CHECKSUMS}/{name}", data=_block_checksums(file[name]))
    datasets = _datasets(file)
    for dataset in datasets.values():
        dataset.attrs[CHECKSUM] = checksum(dataset)
    file.attrs[ATTRIBUTES_CHECKSUM] = _attributes_checksum(file, datasets)
    arrays = [datasets[name] for name in blocks_of if name in datasets and datasets[name].id.get_offset() is not None]
    return [[array.id.get_offset(), array.nbytes] for array in arrays]


def rows_per_block(dataset: h5py.Dataset) -> int:
    """How many rows have one checksum together."""
    row_bytes = int(dataset.nbytes) // max(1, len(dataset))
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def _block_checksums(dataset: h5py.Dataset) -> np.ndarray:
    """CRC-32 of each block of rows: uint32."""
    size = rows_per_block(dataset)
    starts = range(0, len(dataset), size)
    return np.array([_crc32(np.ascontiguousarray(dataset[start : start + size])) for start in starts], np.uint32)


def _crc32(values: np.ndarray) -> int:
    """CRC-32 of a contiguous array's bytes."""
    return zlib.crc32(values.data)


def checksum(dataset: h5py.Dataset) -> str:
    """SHA-256 over a dataset's values, with lengths before values of variable length."""
    state = hashlib.sha256(str(dataset.shape).encode())
    for start in range(0, len(dataset), ROWS):
        block = dataset[start : start + ROWS]
        if block.dtype != object:
            state.update(np.ascontiguousarray(block).data)
            continue
        for value in block:
            data = value if isinstance(value, bytes) else value.tobytes()
            state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def _attributes_checksum(file: h5py.File, datasets: dict[str, h5py.Dataset]) -> str:
    """SHA-256 over the file's and every dataset's attributes, this one aside."""
    values = {}
    for holder, item in {"/": file, **datasets}.items():
        values[holder] = {key: str(value) for key, value in item.attrs.items() if key != ATTRIBUTES_CHECKSUM}
    return digest(values)


def _datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """All datasets in a file, by name."""
    datasets: dict[str, h5py.Dataset] = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            datasets[name] = item

    file.visititems(note)
    return datasets


def damaged_parts(file: h5py.File, but: tuple[str, ...] = ()) -> list[str]:
    """A line for whatever does not match its checksum, ``but`` for datasets that are checked elsewhere.

    A file without any checksum, as earlier versions wrote some, has nothing to be compared with.
    """
    if ATTRIBUTES_CHECKSUM not in file.attrs:
        return []
    datasets = _datasets(file)
    wrong = []
    for name, dataset in datasets.items():
        if name not in but and dataset.attrs.get(CHECKSUM) != checksum(dataset):
            wrong.append(f"/{name} does not match its checksum")
    if file.attrs[ATTRIBUTES_CHECKSUM] != _attributes_checksum(file, datasets):
        wrong.append("the attributes do not match their checksum")
    return wrong


def write_column(group: h5py.Group, name: str, values: Any) -> None:
    """Writes an array, strings or bytes as a dataset."""
    if isinstance(values, np.ndarray):
        group.create_dataset(name, data=values)
    elif len(values) and isinstance(values[0], bytes):
        column = create_bytes_column(group, name, len(values))
        fill(column, slice(0, len(values)), (np.frombuffer(data, dtype=np.uint8) for data in values))
    else:
        column = group.create_dataset(name, (len(values),), dtype=_STRING)
        for start in range(0, len(values), _TEXTS):
            block = values[start : start + _TEXTS]
            column[start : start + len(block)] = np.array(block, dtype=object)


def create_bytes_column(group: h5py.Group, name: str, rows: int) -> h5py.Dataset:
    """Makes a dataset for rows of bytes of any length."""
    return group.create_dataset(name, (rows,), dtype=_BYTES)


def fill(target: h5py.Dataset, rows: slice, block: Any) -> None:
    """Writes a block of rows into a dataset."""
    if h5py.check_vlen_dtype(target.dtype) == np.uint8:  # h5py's own way takes equally long values for a matrix
        values = np.empty(rows.stop - rows.start, dtype=object)
        for place, data in zip(range(len(values)), block, strict=True):
            values[place] = data
        space = target.id.get_space()
        space.select_hyperslab((rows.start,), values.shape)
        target.id.write(h5py.h5s.create_simple(values.shape), space, values, h5py.h5t.py_create(target.dtype))
    else:
        target[rows] = block


def which_file(status: os.stat_result) -> tuple[int, int, int, int]:
    """Numbers that differ between two files at one path, and between a file before and after it was written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class RowsOnDisk(ABC):
    """Rows of numbers on the disk, read when they are asked for.

    ``rows[5]``, ``rows[10:20]``, ``rows[[3, 7, 8]]`` and ``rows[:, 0]`` give new arrays, for which whole rows are read.

    Attributes:
        shape, ndim, dtype, nbytes: of the whole.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.shape = shape
        self.ndim = len(shape)
        self.dtype = dtype
        self.nbytes = math.prod(shape) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, tuple):
            numbers, *entries = rows
            values: np.ndarray = self[numbers]
            of_each = np.arange(len(values)) if isinstance(entries[0], np.ndarray) else slice(None)
            return values[(of_each, *entries)]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            return self._run(start, max(start, stop))
        if isinstance(rows, int | np.integer):
            row: np.ndarray = self[np.array([rows])][0]
            return row
        return self._gathered(self._numbers(np.asarray(rows)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        """Rows that are given by number, from the end too, or by a mask: int64.

        Raises:
            IndexError: there is no such row.
        """
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        rows = np.where(rows < 0, rows + len(self), rows)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"row {int(rows.max())} of {len(self)}")
        return rows

    @property
    @abstractmethod
    def is_checked(self) -> bool:
        """Whether rows are compared with checksums as they are read."""

    @abstractmethod
    def _run(self, start: int, stop: int) -> np.ndarray:
        """Neighbouring rows."""

    @abstractmethod
    def _gathered(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, int64, all of which there are."""


class StoredRows(RowsOnDisk):
    """The rows of a dataset that lies in its file in one piece.

    A block of rows is compared with its checksum when it is first read. The file is the one that was open, whatever
    lies at its path.

    Raises:
        Hdf5Error: of every access: a block that is damaged, or a file that was written to in the meantime.
    """

    def __init__(self, dataset: h5py.Dataset, path: str | Path, leading: int = 1):
        """``path``: of the dataset's file, which has to be the one that is open.

        ``leading``: how many of its first axes are counted together as rows.
        """
        super().__init__((math.prod(dataset.shape[:leading]), *dataset.shape[leading:]), dataset.dtype)
        self._path = Path(path)
        self._name: str = dataset.name
        self._row_bytes = self.nbytes // max(1, len(self))
        self._offset = dataset.id.get_offset()
        # empty, or written by others in chunks
        self._whole: np.ndarray | None = dataset[:].reshape(self.shape) if self._offset is None else None
        sums = dataset.file.get(f"{BLOCK_CHECKSUMS}{dataset.name}")
        self._sums: np.ndarray | None = None if sums is None else sums[:]
        self._block_rows = rows_per_block(dataset) * math.prod(dataset.shape[1:leading])
        self._checked = np.zeros(0 if self._sums is None else len(self._sums), bool)
        if self._sums is not None and len(self._sums) != -(-len(self) // self._block_rows):
            raise Hdf5Error(f"{self._path} is damaged: {self._name} has no checksum for each of its blocks")
        self._descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._file = which_file(os.fstat(self._descriptor))
        if self._file != which_file(os.fstat(dataset.file.id.get_vfd_handle())):
            raise Hdf5Error(f"{self._path} was replaced while it was being opened; run the command again")

    def __getitem__(self, rows: Any) -> np.ndarray:
        if which_file(os.fstat(self._descriptor)) != self._file:
            raise Hdf5Error(f"{self._path} was changed while it was in use; run the command again")
        return super().__getitem__(rows)

    @property
    def is_checked(self) -> bool:
        """Whether there are checksums of blocks; files of earlier versions have none."""
        return self._sums is not None

    def _gathered(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, stretches of neighbours in one go."""
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not len(rows):
            return values
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, end in zip([0, *ends], [*ends, len(rows)], strict=True):
            values[start:end] = self._run(int(rows[start]), int(rows[start]) + end - start)
        return values

    def _run(self, start: int, stop: int) -> np.ndarray:
        """Neighbouring rows."""
        if self._whole is not None:
            return self._whole[start:stop]
        if self._sums is not None:
            for block in range(start // self._block_rows, -(-stop // self._block_rows)):
                if not self._checked[block]:
                    self._check(block)
        return self._read(start, stop)

    def _check(self, block: int) -> None:
        first = block * self._block_rows
        values = self._read(first, min(first + self._block_rows, len(self)))
        if self._sums is not None and _crc32(values) != self._sums[block]:
            raise Hdf5Error(f"{self._path} is damaged: rows from {first:,} of {self._name} do not match their checksum")
        self._checked[block] = True

    def _read(self, start: int, stop: int) -> np.ndarray:
        values = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = memoryview(values.reshape(-1).view(np.uint8).data) if values.nbytes else memoryview(b"")
        place = self._offset + start * self._row_bytes
        while len(view):
            count = read_at(self._descriptor, view, place)
            if not count:
                raise OSError(errno.EIO, f"{self._path} ends before the rows of {self._name} do")
            view = view[count:]
            place += count
        return values


def memory_mapped(dataset: h5py.Dataset, path: str | Path | None = None) -> np.ndarray:
    """The values of a dataset that lies in its file in one piece, mapped and read-only: they take up no memory.

    Args:
        path: of the file, where it is being written; else the file that is open is mapped, whatever lies at its path.
    """
    offset = dataset.id.get_offset()
    if offset is None:  # nothing in it, or written by others in chunks
        values: np.ndarray = dataset[:]
        return values
    if path is not None:
        return np.memmap(path, mode="r", offset=offset, shape=dataset.shape, dtype=dataset.dtype)
    with os.fdopen(os.dup(dataset.file.id.get_vfd_handle()), "rb") as file:
        return np.memmap(file, mode="r", offset=offset, shape=dataset.shape, dtype=dataset.dtype)
