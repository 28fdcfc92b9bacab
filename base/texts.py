"""Columns of text that take little memory: Python strings in a list take three times as much, short ones ten times."""

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class TextColumn(Sequence[str]):
    """A column of text that reads like a list of strings (``column[3]``, ``column[10:20]``), and equals such a list.

    Half characters, as names of files that are no UTF-8 have them, are kept.
    """

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        numbers = range(len(self))[row]
        if isinstance(numbers, range):
            return list(self.values_of(numbers))
        return next(self.values_of((numbers,)))

    def __iter__(self) -> Iterator[str]:
        return self.values_of(range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TextColumn | list):
            return NotImplemented
        return len(self) == len(other) and all(own == value for own, value in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})"

    @abstractmethod
    def values_of(self, rows: Iterable[int]) -> Iterator[str]:
        """The values of rows that are given by their numbers, from 0; all of them have to be there."""


class Texts(TextColumn):
    """A column of text as the UTF-8 bytes of all values, one after the other, and the place where each ends."""

    def __init__(self, values: Iterable[str] = ()):
        self._bytes = bytearray()
        self._ends = array("q")
        self.extend(values)

    def extend(self, values: Iterable[str]) -> None:
        """Adds values at the end."""
        for value in values:
            self._bytes += value.encode("utf-8", "surrogatepass")
            self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def values_of(self, rows: Iterable[int]) -> Iterator[str]:
        """The values of rows that are given by their numbers, from 0."""
        for row in rows:
            start = self._ends[row - 1] if row else 0
            yield self._bytes[start : self._ends[row]].decode("utf-8", "surrogatepass")


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
