"""Columns of text that take little memory: Python strings in a list take two to seven times as much."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice

import numpy as np

from onceover.base.columns import LazyColumn

_CHUNK = 1024  # rows


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


class Texts(TextColumn):
    """A column of text as UTF-8: the bytes of a chunk of rows one after the other, and where in them each row ends."""

    def __init__(self, values: Iterable[str] = ()):
        self._chunks: list[tuple[bytes | bytearray, array[int]]] = [_new_chunk()]
        self.extend(values)

    def extend(self, values: Iterable[str]) -> None:
        """Adds values at the end."""
        waiting = iter(values)
        while True:
            data, ends = self._chunks[-1]
            if len(ends) == _CHUNK:
                self._chunks[-1] = (bytes(data), ends[:])  # without the room for more
                data, ends = _new_chunk()
                self._chunks.append((data, ends))
            encoded = [value.encode("utf-8", "surrogatepass") for value in islice(waiting, _CHUNK - len(ends))]
            if not encoded:
                return
            ends.extend(islice(accumulate(map(len, encoded), initial=len(data)), 1, None))
            data += b"".join(encoded)

    def __len__(self) -> int:
        return (len(self._chunks) - 1) * _CHUNK + len(self._chunks[-1][1])

    def values_of(self, rows: Iterable[int]) -> Iterator[str]:
        """The values of rows that are given by their numbers, from 0; quickest of neighbours, given as a range."""
        if isinstance(rows, range) and rows.step == 1:
            yield from self._run(rows)
            return
        for row in rows:
            data, ends = self._chunks[row // _CHUNK]
            place = row % _CHUNK
            start = ends[place - 1] if place else 0
            yield data[start : ends[place]].decode("utf-8", "surrogatepass")

    def _run(self, rows: range) -> Iterator[str]:
        """The values of neighbouring rows."""
        for number in range(rows.start // _CHUNK, -(-rows.stop // _CHUNK)):
            data, ends = self._chunks[number]
            first = max(0, rows.start - number * _CHUNK)
            start = ends[first - 1] if first else 0
            for end in ends[first : rows.stop - number * _CHUNK]:
                yield data[start:end].decode("utf-8", "surrogatepass")
                start = end


def _new_chunk() -> tuple[bytearray, "array[int]"]:
    """A chunk without rows."""
    return bytearray(), array("I")


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
