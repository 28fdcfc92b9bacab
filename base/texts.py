"""Columns of text, however long, in little memory: what is long lies in a temporary file."""

import functools
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np

from onceover.base.columns import LazyColumn
from onceover.base.temporary import temporary_files

_CHUNK = 1024  # rows
_IN_MEMORY = 8  # chunks of a column: its first ones, and as many of the others, those that were read last


class TextColumn(LazyColumn[str]):
    """A column of text that equals a list of the same strings.

    Half characters, as names of files that are no UTF-8 have them, are kept.
    """

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TextColumn | list):
            return NotImplemented
        return len(self) == len(other) and all(own == value for own, value in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})"


class _Chunk(NamedTuple):
    """Some rows as UTF-8: their bytes one after the other, and where in them each row ends."""

    data: bytes | bytearray
    ends: "array[int]"

    def values(self, first: int, stop: int) -> Iterator[str]:
        """The values of neighbouring rows."""
        start = self.ends[first - 1] if first else 0
        for end in self.ends[first:stop]:
            yield self.data[start:end].decode("utf-8", "surrogatepass")
            start = end


class Texts(TextColumn):
    """A column of text, in chunks of rows; from several threads at will, once all values are added.

    The first chunks lie in memory, the others in a temporary file.
    """

    def __init__(self, values: Iterable[str] = ()):
        self._first: list[_Chunk] = []
        self._others: _ChunkFile | None = None
        self._last = _new_chunk()  # which is not complete
        self.extend(values)

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (list(self),)

    def extend(self, values: Iterable[str]) -> None:
        """Adds values at the end.

        Raises:
            TemporaryFileError: there is no room for them.
        """
        waiting = iter(values)
        while True:
            data, ends = self._last
            encoded = [value.encode("utf-8", "surrogatepass") for value in islice(waiting, _CHUNK - len(ends))]
            if not encoded:
                return
            ends.extend(islice(accumulate(map(len, encoded), initial=len(data)), 1, None))
            data += b"".join(encoded)
            if len(ends) == _CHUNK:
                self._complete()

    def _complete(self) -> None:
        """Puts the last chunk where complete ones lie, and begins a new one."""
        if len(self._first) < _IN_MEMORY:
            data, ends = self._last
            self._first.append(_Chunk(bytes(data), ends[:]))  # without the room for more
        else:
            self._others = self._others or _ChunkFile()
            self._others.add(self._last)
        self._last = _new_chunk()

    def _chunk(self, number: int) -> _Chunk:
        """A chunk by its number."""
        if number < len(self._first):
            return self._first[number]
        number -= len(self._first)
        if self._others is not None and number < len(self._others):
            return self._others.read(number)
        return self._last

    def __len__(self) -> int:
        complete = len(self._first)
        if self._others is not None:
            complete += len(self._others)
        return complete * _CHUNK + len(self._last.ends)

    def values_of(self, rows: Iterable[int]) -> Iterator[str]:
        """The values of rows that are given by their numbers, from 0; quickest of neighbours, given as a range."""
        if isinstance(rows, range) and rows.step == 1:
            for number in range(rows.start // _CHUNK, -(-rows.stop // _CHUNK)):
                first = number * _CHUNK
                yield from self._chunk(number).values(max(0, rows.start - first), rows.stop - first)
            return
        for row in rows:
            place = row % _CHUNK
            yield from self._chunk(row // _CHUNK).values(place, place + 1)


class _ChunkFile:
    """Chunks in a temporary file, which the system removes with the process."""

    def __init__(self) -> None:
        with temporary_files():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when nobody needs the chunks any more
        weakref.finalize(self, self._file.close)
        self._starts = array("q", [0])  # where in the file each chunk starts, and where the next one will
        self._read = functools.lru_cache(_IN_MEMORY)(functools.partial(_read_chunk, self._file.fileno()))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, chunk: _Chunk) -> None:
        """Writes a chunk at the end.

        Raises:
            TemporaryFileError: there is no room for them.
        """
        ends = chunk.ends.tobytes()
        with temporary_files():
            self._file.write(ends)
            self._file.write(chunk.data)
            self._file.flush()
        self._starts.append(self._starts[-1] + len(ends) + len(chunk.data))

    def read(self, number: int) -> _Chunk:
        """A chunk by its number."""
        return self._read(self._starts[number], self._starts[number + 1])


def _read_chunk(descriptor: int, start: int, stop: int) -> _Chunk:
    """Reads the chunk that lies between two places of a file."""
    content = os.pread(descriptor, stop - start, start)
    ends = array("I")
    size = ends.itemsize * _CHUNK
    ends.frombytes(content[:size])
    return _Chunk(content[size:], ends)


def _new_chunk() -> _Chunk:
    """A chunk without rows."""
    return _Chunk(bytearray(), array("I"))


class ChosenTexts(TextColumn):
    """Rows of another column of text, in an order of their own, which are looked up when they are asked for."""

    def __init__(self, column: TextColumn, rows: np.ndarray):
        """``rows``: their numbers, integers from 0."""
        self._column = column
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def values_of(self, rows: Iterable[int]) -> Iterator[str]:
        """The values of rows that are given by their numbers, from 0."""
        return self._column.values_of(int(self._rows[row]) for row in rows)


def text_column(values: Sequence[str]) -> TextColumn:
    """Text in little memory: the values themselves where they are such a column already, else a copy."""
    return values if isinstance(values, TextColumn) else Texts(values)
