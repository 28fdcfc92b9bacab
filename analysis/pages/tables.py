"""Tables of text as pages show them: numbers can be sorted, and stand with their decimal points below each other."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from onceover.base.terminal import Table

_NUMBER = re.compile(r"([-+]?\d[\d,]*)(?:\.\d+)?(?:e[-+]?\d+)?")
_DASH = "–"  # where there is no number
_MINUS = re.compile(r"(?<![\w.)])-(?=\d)")


class Cell(NamedTuple):
    """A cell.

    Attributes:
        number: that it is sorted by; None: it is sorted by its text.
        indent: by how many digits it is moved to the right, below the others of its column.
    """

    text: str
    number: float | None = None
    indent: int = 0


class PageTable(NamedTuple):
    """A table as the macro ``table`` draws it; the first cell of each row names the row."""

    title: str
    header: list[str]
    rows: list[list[Cell]]


def page_table(table: Table) -> PageTable:
    """A table of text for a page; the first row is its header."""
    header, *body = table.rows
    columns = [_cells(column) for column in zip(*body, strict=True)]
    return PageTable(table.title, list(header), [list(row) for row in zip(*columns, strict=True)])


def minus(text: str) -> str:
    """A text with true minus signs before its numbers."""
    return _MINUS.sub("−", text)


def _cells(column: Sequence[str]) -> list[Cell]:
    """The cells of a column: with numbers where all of them begin with one, or are a dash."""
    found = [_NUMBER.fullmatch(text.partition(" ")[0]) for text in column]
    numbers = [float(match.group().replace(",", "")) if match else None for match in found]
    is_text = any(match is None and text != _DASH for match, text in zip(found, column, strict=True))
    if is_text or not any(number is not None and math.isfinite(number) for number in numbers):
        return [Cell(text) for text in column]
    digits = [len(match.group(1)) if match else 1 for match in found]
    cells = []
    for text, number, count in zip(column, numbers, digits, strict=True):
        is_finite = number is not None and math.isfinite(number)
        cells.append(Cell(minus(text), number if is_finite else None, max(digits) - count))
    return cells
