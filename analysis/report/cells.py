"""Tables of a report: rows of text whose columns can be sorted by their numbers."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


class Cell(NamedTuple):
    """A cell, and the number that it is sorted by; None: by its text."""

    text: str
    number: float | None


class Table(NamedTuple):
    """A table with a title for those who cannot see it."""

    title: str
    header: list[str]
    rows: list[list[Cell]]


def table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """A table of text; the first row is its header."""
    header, *body = rows
    return Table(title, list(header), [[_cell(text) for text in row] for row in body])


def _cell(text: str) -> Cell:
    """A cell whose number is that at its beginning."""
    number = _NUMBER.match(text)
    return Cell(text, float(number.group().replace(",", "")) if number else None)
