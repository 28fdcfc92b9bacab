"""Columns whose values are read or made when they are asked for."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, overload

Value = TypeVar("Value")


class LazyColumn(Sequence[Value]):
    """A column that reads like a list (``column[3]``, ``column[10:20]``), whose values come from ``values_of``."""

    @overload
    def __getitem__(self, row: int) -> Value: ...

    @overload
    def __getitem__(self, row: slice) -> list[Value]: ...

    def __getitem__(self, row: int | slice) -> Value | list[Value]:
        numbers = range(len(self))[row]
        if isinstance(numbers, range):
            return list(self.values_of(numbers))
        return next(self.values_of((numbers,)))

    def __iter__(self) -> Iterator[Value]:
        return self.values_of(range(len(self)))

    @abstractmethod
    def values_of(self, rows: Iterable[int]) -> Iterator[Value]:
        """The values of rows that are given by their numbers, from 0; all of them have to be there."""
