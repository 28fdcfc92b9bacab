"""Columns of text, however long, in little memory: what is long lies in a temporary file."""

import functools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np

from onceover.base.columns import LazyColumn
from onceover.base.temporary import IN_MEMORY, TemporaryBytes

_CHUNK = 1024  # rows
_READ = 8  # chunks of a column that stay in memory: those that were read last


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


@dataclass(frozen=True)
class _Chunk:
    """Some rows as UTF-8: their bytes one after the other, and where in them each row ends."""

    data: bytearray
    ends: "array[int]"

    def add(self, values: list[bytes]) -> None:
        """Adds rows."""
        self.ends.extend(islice(accumulate(map(len, values), initial=len(self.data)), 1, None))
        self.data.extend(b"".join(values))

    def values(self, first: int, stop: int) -> Iterator[str]:
        """The values of neighbouring rows."""
        start = self.ends[first - 1] if first else 0
        for end in self.ends[first:stop]:
            yield self.data[start:end].decode("utf-8", "surrogatepass")
            start = end


class Texts(TextColumn):
    """A column of text, in chunks of rows: in memory while they are few, else in a temporary file.

    Several threads may read it once all values are added, and so may forks of the process.
    """

    def __init__(self, values: Iterable[str] = ()):
        self._complete = TemporaryBytes(IN_MEMORY)
        self._starts = array("q", [0])  # where in these bytes each complete chunk starts, and where the next one will
        self._read = functools.lru_cache(_READ)(functools.partial(_read_chunk, self._complete))
        self._last = _new_chunk()  # which need not be complete
        self.extend(values)

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_chunks, ([self._chunk(number) for number in range(len(self._starts))],)

    def extend(self, values: Iterable[str]) -> None:
        """Adds values at the end.

        Raises:
            TemporaryFileError: there is no room for them.
        """
        waiting = iter(values)
        while True:
            if len(self._last.ends) == _CHUNK:
                self._put_away()
            room = _CHUNK - len(self._last.ends)
            encoded = [value.encode("utf-8", "surrogatepass") for value in islice(waiting, room)]
            if not encoded:
                return
            self._last.add(encoded)

    def _put_away(self) -> None:
        """Puts the last chunk where complete ones lie, and begins a new one."""
        self._complete.add(self._last.ends.tobytes() + self._last.data)
        self._starts.append(self._complete.size)
        self._last = _new_chunk()

    def _chunk(self, number: int) -> _Chunk:
        """A chunk by its number."""
        if number == len(self._starts) - 1:
            return self._last
        return self._read(self._starts[number], self._starts[number + 1])

    def __len__(self) -> int:
        return (len(self._starts) - 1) * _CHUNK + len(self._last.ends)

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


def _read_chunk(content: TemporaryBytes, start: int, stop: int) -> _Chunk:
    """Reads the complete chunk that lies between two places."""
    data = content.read(start, stop)
    ends = array("I")
    size = ends.itemsize * _CHUNK
    ends.frombytes(data[:size])
    return _Chunk(bytearray(data[size:]), ends)


def _from_chunks(chunks: list[_Chunk]) -> Texts:
    """The column of the rows of some chunks."""
    column = Texts()
    for chunk in chunks:
        column.extend(chunk.values(0, len(chunk.ends)))
    return column


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
