"""Temporary files for what need not be in memory; the system removes them with the process, however it ends."""

import contextlib
import errno
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from io import FileIO
from typing import Any

import numpy as np

from onceover.base.errors import OnceoverError

IN_MEMORY = 2**18  # bytes of a column that may be in memory, usually; a longer one lies in a temporary file
_BLOCK = 8192  # rows that are copied at a time
_ZEROS = bytes(2**20)
_SEEKING = threading.Lock()  # where a file's place is shared by threads (Windows)


class TemporaryFileError(OnceoverError):
    """A temporary file that cannot be written."""


class TemporaryBytes:
    """Bytes to which more are added: in memory while they are few, else in a temporary file.

    Threads and forks of the process may read them while none are added.

    Attributes:
        size: how many there are.
    """

    def __init__(self, in_memory: int):
        """``in_memory``: how many may be in memory."""
        self.size = 0
        self._in_memory = in_memory
        self._memory = bytearray()
        self._file: FileIO | None = None

    def add(self, data: Any) -> None:
        """Adds the bytes of an array, or others.

        Raises:
            TemporaryFileError: there is no room for them.
        """
        view = memoryview(data).cast("B")
        if self._file is None and self.size + len(view) <= self._in_memory:
            self._memory += view
        else:
            with _errors_told():
                if self._file is None:
                    # without a buffer, since one that cannot be written would fail again when the file is closed
                    self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed when nobody needs it
                    weakref.finalize(self, self._file.close).atexit = False
                    _write(self._file, memoryview(self._memory), 0)
                    self._memory = bytearray()
                _write(self._file, view, self.size)
        self.size += len(view)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes between two places."""
        if self._file is None:
            return bytes(self._memory[start:stop])
        data = bytearray(stop - start)
        view = memoryview(data)
        while len(view):
            count = read_at(self._file.fileno(), view, stop - len(view))
            if not count:
                raise OSError(errno.EIO, "a temporary file ends before its bytes do")
            view = view[count:]
        return bytes(data)

    def array(self, dtype: Any) -> np.ndarray:
        """All bytes as an array, read-only; mapped where they are in a file."""
        if self._file is None:
            return np.frombuffer(bytes(self._memory), dtype)
        return np.memmap(self._file, dtype, "r", shape=(self.size // np.dtype(dtype).itemsize,))


def _write(file: FileIO, view: memoryview, place: int) -> None:
    """Writes all bytes at a place in a file."""
    file.seek(place)
    while len(view):
        view = view[file.write(view) :]


def temporary_array(shape: tuple[int, ...], dtype: Any, in_memory: int) -> np.ndarray:
    """An array to be filled: in memory, or mapped from a temporary file where it has more than ``in_memory`` bytes.

    The file's room is reserved, since a mapped file without room ends the process.

    Raises:
        TemporaryFileError: there is no room.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= in_memory:
        return np.empty(shape, dtype)
    with _errors_told(), tempfile.TemporaryFile(buffering=0) as file:
        _reserve(file, size)
        return np.memmap(file, dtype, "r+", shape=shape)


def temporary_rows(values: np.ndarray, rows: np.ndarray, dtype: Any, in_memory: int) -> np.ndarray:
    """Some rows of an array, which are read block by block, as ``temporary_array`` lays them out.

    Raises:
        TemporaryFileError: there is no room.
    """
    chosen = temporary_array((len(rows), *values.shape[1:]), dtype, in_memory)
    for start in range(0, len(rows), _BLOCK):
        chosen[start : start + _BLOCK] = values[rows[start : start + _BLOCK]]
    return chosen


def _reserve(file: FileIO, size: int) -> None:
    """Makes a file so many bytes long, all of them on the disk."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        left = size
        while left:
            left -= file.write(_ZEROS[:left])


@contextlib.contextmanager
def _errors_told() -> Iterator[None]:
    """Turns the system's errors into one with a way out.

    Raises:
        TemporaryFileError: there is no room for a file, or no folder that can be written to.
    """
    try:
        yield
    except OSError as error:
        where = f" in {tempfile.tempdir}" if tempfile.tempdir else ""
        raise TemporaryFileError(
            f"a temporary file cannot be written{where} ({error.strerror or error}); make room there, or name another "
            "folder in the environment variable TMPDIR"
        ) from error


def read_at(descriptor: int, view: memoryview, place: int) -> int:
    """Reads from a place in a file into ``view``; gives how many bytes came. From several threads at will."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], place)
    with _SEEKING:
        os.lseek(descriptor, place, os.SEEK_SET)
        data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)
