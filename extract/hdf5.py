"""HDF5 files: opened safely, written whole on disks that may fill up, and rows read with a check of each block.

A file may come from anywhere, so that one which reaches outside itself, or claims more than it holds, is refused. A
file written here carries a checksum of every dataset, and of each block of its large ones (docs/store-format.md).
"""

import contextlib
import errno
import hashlib
import io
import os
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from configs import OnceoverError
from extract.files import check_regular, digest, whole_file

CHECKSUM = "sha256"  # the attribute of a dataset that holds the checksum of its values
ATTRIBUTES_CHECKSUM = "attributes_sha256"  # the file's attribute that holds the checksum of all others
BLOCK_CHECKSUMS = "checksums"  # the group that holds the checksums of blocks, by the name of the dataset
BLOCK_BYTES = 2**20  # of rows that have one checksum; a single row where that is larger
ROWS = 1024  # rows hashed at a time
MAX_OBJECTS = 10_000  # groups and datasets; a tokenizer's files are the most of them
MAX_DEPTH = 8
MAX_RATIO = 64  # times the bytes that lie in the file, what a compressed dataset may unpack to
_STRING = h5py.string_dtype()
_BYTES = h5py.vlen_dtype(np.uint8)


class Hdf5Error(OnceoverError):
    """An HDF5 file that is not to be trusted, is damaged, or was changed while it was read."""


def open_hdf5(path: str | Path) -> h5py.File:
    """Opens a file for reading, if it is a regular one and all that it holds lies in it.

    Raises:
        FileError: no regular file. OSError: not there, or no HDF5 file.
        Hdf5Error: links, external storage, virtual datasets, or datasets that claim more than they hold.
    """
    check_regular(path)
    file = h5py.File(path, "r", locking=False)
    try:
        _refuse_strange_objects(file, Path(path))
    except BaseException:
        file.close()
        raise
    return file


def _refuse_strange_objects(file: h5py.File, path: Path) -> None:
    waiting: list[tuple[h5py.Group, int]] = [(file, 0)]
    objects = 0
    while waiting:
        group, depth = waiting.pop()
        for name in group:
            objects += 1
            where = f"{group.name.rstrip('/')}/{name}"
            if objects > MAX_OBJECTS or depth > MAX_DEPTH:
                raise Hdf5Error(f"{path} holds more groups and datasets than any file of this program; it is not read")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise Hdf5Error(f"{path} reaches elsewhere: {where} is a link; it is not read")
            item = group[name]
            if isinstance(item, h5py.Group):
                waiting.append((item, depth + 1))
            elif isinstance(item, h5py.Dataset):
                _refuse_strange_dataset(item, where, path)
            else:
                raise Hdf5Error(f"{path} holds {where}, which is neither a group nor a dataset; it is not read")


def _refuse_strange_dataset(dataset: h5py.Dataset, where: str, path: Path) -> None:
    if dataset.is_virtual or dataset.external:
        raise Hdf5Error(f"{path} reaches elsewhere: {where} has its values in another file; it is not read")
    if dataset.shape is None or dataset.dtype.kind not in "biufO" or dataset.ndim < 1:
        raise Hdf5Error(f"{path}: {where} holds no rows of numbers, text or bytes; it is not read")
    if dataset.dtype.kind == "O" and h5py.check_string_dtype(dataset.dtype) is None and _vlen(dataset) != np.uint8:
        raise Hdf5Error(f"{path}: {where} holds no rows of numbers, text or bytes; it is not read")
    if dataset.nbytes > MAX_RATIO * max(dataset.id.get_storage_size(), 1):
        raise Hdf5Error(f"{path}: {where} claims the shape {dataset.shape}, and holds no values for it; it is not read")


def _vlen(dataset: h5py.Dataset):
    return h5py.check_vlen_dtype(dataset.dtype)


class _ForgivingFile(io.FileIO):
    """A file that remembers the first error of writing and pretends to go on.

    HDF5 cannot give up a file that it cannot write: what it still holds, it tries to write when the file is closed,
    which ends in a crash. So it is told that all is well, and ``error`` tells the truth.
    """

    error: OSError | None = None

    def write(self, data) -> int:
        """Writes all of ``data``; after an error nothing."""
        view = memoryview(data).cast("B")
        try:
            while self.error is None and len(view):
                view = view[super().write(view) :]
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None) -> int:
        """Sets the size, unless there was an error."""
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
        return size or 0

    def readinto(self, buffer) -> int:
        """Reads what is there; after an error, zeros for what could not be written."""
        count = super().readinto(buffer) or 0
        if self.error is not None:
            view = memoryview(buffer).cast("B")
            view[count:] = bytes(len(view) - count)
            return len(view)
        return count


class Hdf5Writer:
    """An HDF5 file under way: ``file`` is open for writing, ``path`` is where it lies until it is complete."""

    def __init__(self, path: Path, raw: _ForgivingFile, file: h5py.File):
        self.path = path
        self.file = file
        self._raw = raw

    def check(self) -> None:
        """Raises the first error of writing, if there was one: a full disk, for example."""
        if self._raw.error is not None:
            raise self._raw.error


@contextlib.contextmanager
def write_hdf5(path: str | Path, blocks_of: tuple[str, ...] = ()) -> Iterator[Hdf5Writer]:
    """Writes an HDF5 file whole or not at all, with checksums of all that it holds.

    Args:
        blocks_of: names of the large datasets, whose blocks get checksums of their own.

    Raises:
        OSError: what writing ended with; the file that was at ``path`` is still there.
    """
    with whole_file(path) as aside, _ForgivingFile(aside, "w+b") as raw:
        try:
            with h5py.File(raw, "w") as file:
                writer = Hdf5Writer(aside, raw, file)
                yield writer
                writer.check()
                add_checksums(file, blocks_of)
        except Exception as error:
            if raw.error is None or error is raw.error:
                raise
            raise raw.error from error
        writer.check()


def add_checksums(file: h5py.File, blocks_of: tuple[str, ...] = ()) -> None:
    """Gives every dataset a checksum, blocks of some datasets one each, and the attributes of all together one."""
    for name in blocks_of:
        sums = _block_checksums(file[name])
        file.create_dataset(f"{BLOCK_CHECKSUMS}/{name}", data=sums)
    for name in dataset_names(file):
        file[name].attrs[CHECKSUM] = checksum(file[name])
    file.attrs[ATTRIBUTES_CHECKSUM] = attributes_checksum(file)


def rows_per_block(dataset: h5py.Dataset) -> int:
    """How many rows have one checksum together."""
    return max(1, BLOCK_BYTES // max(1, dataset.nbytes // max(1, len(dataset))))


def _block_checksums(dataset: h5py.Dataset) -> np.ndarray:
    size = rows_per_block(dataset)
    sums = [zlib.crc32(np.ascontiguousarray(dataset[start : start + size])) for start in range(0, len(dataset), size)]
    return np.array(sums, np.uint32)


def checksum(dataset: h5py.Dataset) -> str:
    """SHA-256 over a dataset's values, with lengths before values of variable length."""
    state = hashlib.sha256(str(dataset.shape).encode())
    for start in range(0, len(dataset), ROWS):
        block = dataset[start : start + ROWS]
        if block.dtype != object:
            state.update(np.ascontiguousarray(block))
            continue
        for value in block:
            data = value if isinstance(value, bytes) else value.tobytes()
            state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def attributes_checksum(file: h5py.File) -> str:
    """SHA-256 over the file's and every dataset's attributes, this one aside."""
    holders = {"/": file, **{name: file[name] for name in dataset_names(file)}}
    values = {}
    for holder, item in holders.items():
        values[holder] = {key: str(value) for key, value in item.attrs.items() if key != ATTRIBUTES_CHECKSUM}
    return digest(values)


def dataset_names(file: h5py.File) -> list[str]:
    """The names of all datasets in a file."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def damaged_parts(file: h5py.File, but: tuple[str, ...] = ()) -> list[str]:
    """What does not match its checksum: ``attributes``, and names of datasets, ``but`` those checked elsewhere.

    A file without any checksum, as earlier versions wrote some, has nothing to be compared with.
    """
    if ATTRIBUTES_CHECKSUM not in file.attrs:
        return []
    wrong = [] if file.attrs[ATTRIBUTES_CHECKSUM] == attributes_checksum(file) else ["attributes"]
    for name in dataset_names(file):
        if name not in but and file[name].attrs.get(CHECKSUM) != checksum(file[name]):
            wrong.append(name)
    return wrong


def write_column(group: h5py.Group, name: str, values) -> None:
    """Writes an array, strings or bytes as a dataset."""
    if isinstance(values, np.ndarray):
        group.create_dataset(name, data=values)
    elif len(values) and isinstance(values[0], bytes):
        column = group.create_dataset(name, (len(values),), dtype=_BYTES)
        fill(column, slice(0, len(values)), (np.frombuffer(data, dtype=np.uint8) for data in values))
    else:
        group.create_dataset(name, data=np.array(values, dtype=object), shape=(len(values),), dtype=_STRING)


def fill(target: h5py.Dataset, rows: slice, block) -> None:
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
    """What tells one file from another at the same path, and from itself once it was written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class StoredRows:
    """The rows of a dataset that lies in its file in one piece, read when they are asked for.

    ``rows[5]``, ``rows[10:20]`` and ``rows[[3, 7, 8]]`` give new arrays. A block of rows is compared with its checksum
    when it is first read. The file is the one that was open, whatever lies at its path by now.

    Attributes:
        shape, ndim, dtype, nbytes: of the whole.

    Raises:
        Hdf5Error: of every access: a block that is damaged, or a file that was written to in the meantime.
    """

    def __init__(self, dataset: h5py.Dataset, path: str | Path):
        """``path``: of the dataset's file, which has to be the one that is open."""
        self.shape: tuple[int, ...] = dataset.shape
        self.ndim: int = dataset.ndim
        self.dtype: np.dtype = dataset.dtype
        self.nbytes: int = dataset.nbytes
        self._path = Path(path)
        self._name: str = dataset.name
        self._row_bytes = self.nbytes // max(1, len(dataset))
        self._offset = dataset.id.get_offset()
        self._whole = dataset[:] if self._offset is None else None  # empty, or written by others in chunks
        sums = dataset.file.get(f"{BLOCK_CHECKSUMS}{dataset.name}")
        self._sums = None if sums is None else sums[:]
        self._block_rows = rows_per_block(dataset)
        self._checked = np.zeros(0 if self._sums is None else len(self._sums), bool)
        self._lock = threading.Lock()
        if self._sums is not None and len(self._sums) != -(-len(dataset) // self._block_rows):
            raise Hdf5Error(f"{self._path} is damaged: {self._name} has no checksum for each of its blocks")
        self._descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._file = which_file(os.fstat(self._descriptor))
        if self._file != which_file(os.fstat(dataset.file.id.get_vfd_handle())):
            raise Hdf5Error(f"{self._path} was replaced while it was being opened; run the command again")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | np.ndarray | list) -> np.ndarray:
        if isinstance(rows, tuple):
            raise TypeError("rows are chosen by one number, slice or array; choose columns of what is returned")
        if which_file(os.fstat(self._descriptor)) != self._file:
            raise Hdf5Error(f"{self._path} was changed while it was in use; run the command again")
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            return self._run(start, max(start, stop))
        if isinstance(rows, int | np.integer):
            return self[np.array([rows])][0]
        return self._gathered(np.asarray(rows))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    @property
    def is_checked(self) -> bool:
        """Whether there are checksums of blocks; files of earlier versions have none."""
        return self._sums is not None

    def _gathered(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, or by a mask, stretches of neighbours in one go."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        rows = np.where(rows < 0, rows + len(self), rows)
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not len(rows):
            return values
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"row {int(rows.max())} of {len(self)}")
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
        if zlib.crc32(values) != self._sums[block]:
            raise Hdf5Error(f"{self._path} is damaged: rows from {first:,} of {self._name} do not match their checksum")
        self._checked[block] = True

    def _read(self, start: int, stop: int) -> np.ndarray:
        values = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = memoryview(values.reshape(-1).view(np.uint8)) if values.nbytes else memoryview(b"")
        place = self._offset + start * self._row_bytes
        while len(view):
            count = os.preadv(self._descriptor, [view], place)
            if not count:
                raise OSError(errno.EIO, f"{self._path} ends before the rows of {self._name} do")
            view = view[count:]
            place += count
        return values
