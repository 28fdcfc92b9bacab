"""Tables as text: at most 100 columns wide, the same on a terminal, in a pipe and in a file.

A terminal that is not UTF-8 gets ASCII in place of arrows and lines. No number is ever cut.
"""

import codecs
import io
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

WIDTH = 100
_GAP = 2  # columns between two columns
PLAIN = "onceover.plain"  # an error handler of codecs: ASCII that reads alike, else an escape
_ALIKE = {
    "→": "->",
    "←": "<-",
    "±": "+-",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "·": "*",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "─": "-",
    "\u00a0": " ",
    "\u202f": " ",
}
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+%?|[–-]")


class Table(NamedTuple):
    """A table of text, with a title above it.

    Attributes:
        rows: the header first.
    """

    title: str
    rows: list[list[str]]


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replaces what an encoding lacks: by ASCII that reads alike, or by an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = []
    for character in error.object[error.start : error.end]:
        parts.append(_ALIKE.get(character) or character.encode("ascii", "backslashreplace").decode())
    return "".join(parts), error.end


codecs.register_error(PLAIN, _plain)


def shown(text: str, encoding: str) -> str:
    """A text as a stream of this encoding shows it."""
    return text.encode(encoding, PLAIN).decode(encoding)


def stdout_text(tables: Iterable[Table]) -> str:
    """Tables as text for stdout: a narrower terminal's width, bold headers on a terminal, characters that it has."""
    is_terminal = sys.stdout.isatty()
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if is_terminal else WIDTH
    return tables_text(tables, width=width, encoding=stdout_encoding(), is_styled=is_terminal)


def stdout_encoding() -> str:
    """The encoding of stdout."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def tables_text(
    tables: Iterable[Table], *, width: int = WIDTH, encoding: str = "utf-8", is_styled: bool = False
) -> str:
    """Tables as text, below each other.

    Cells that have no room are folded at blanks, and after underscores and slashes. What cannot be folded stays whole,
    so that a table may be wider than a narrow terminal.

    Args:
        width: columns at most. encoding: of the stream that the text is for. is_styled: with bold headers.
    """
    from rich.console import Console
    from rich.text import Text

    parts = []
    for table in tables:
        title = shown(table.title, encoding)
        rows = [[shown(cell, encoding) for cell in row] for row in table.rows]
        columns = [_aligned(column) for column in zip(*rows, strict=True)]
        widths = _widths(columns, width)
        drawn = _draw(columns, widths, shown("─", encoding))
        page = io.StringIO()
        console = Console(
            file=page,
            width=sum(widths) + _GAP * len(widths),
            color_system="standard" if is_styled else None,
            force_terminal=is_styled,
        )
        if title:
            console.print(Text(_folded(title, width), style="bold"), soft_wrap=True)
        console.print(drawn)
        parts.append("\n".join(line.rstrip() for line in page.getvalue().splitlines()))
    return "\n\n".join(parts)


def _draw(columns: list[list[str]], widths: list[int], rule: str) -> Any:
    """A table of rich, its header first, with a rule below it."""
    from rich.box import Box
    from rich.table import Table as RichTable
    from rich.text import Text

    blank = "    \n"
    box = Box(f"{blank}{blank} {rule}{rule} \n{blank * 5}", ascii=True)
    table = RichTable(box=box, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold")
    for column, width in zip(columns, widths, strict=True):
        table.add_column(Text(_folded(column[0], width)), no_wrap=True)
    for number in range(1, len(columns[0])):
        table.add_row(*(Text(_folded(column[number], width)) for column, width in zip(columns, widths, strict=True)))
    return table


def _aligned(column: Sequence[str]) -> list[str]:
    """The cells of a column, the numbers that they begin with right below each other where all begin with one."""
    if not _has_numbers(column):
        return list(column)
    numbers = [cell.partition(" ")[0] for cell in column[1:]]
    longest = max(map(len, numbers), default=0)
    cells = [" " * (longest - len(number)) + cell for cell, number in zip(column[1:], numbers, strict=True)]
    return [column[0], *cells]


def _widths(columns: list[list[str]], width: int) -> list[int]:
    """The widths of columns: as their cells are; where these have no room beside each other, cells are folded.

    Headers are folded first, then names, then numbers with their intervals.
    """
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in columns]
    folded = [max(cell_len(piece.strip()) for cell in column for piece in _pieces(cell)) for column in columns]
    header_folded = [
        max(least, *map(cell_len, column[1:])) if column[1:] else least
        for least, column in zip(folded, columns, strict=True)
    ]
    names_folded = []
    for column, least, otherwise in zip(columns, folded, header_folded, strict=True):
        names_folded.append(otherwise if _has_numbers(column) else least)
    over = sum(widths) + _GAP * (len(widths) - 1) - width
    for floors in (header_folded, names_folded):
        spare = [natural - floor for natural, floor in zip(widths, floors, strict=True)]
        for number in sorted(range(len(widths)), key=lambda number: -spare[number]):  # as few columns as will do
            cut = min(max(over, 0), spare[number])
            widths[number] -= cut
            over -= cut
    while over > 0 and widths != folded:
        spare_widths = [each for each, least in zip(widths, folded, strict=True) if each > least]
        widest = max(spare_widths)
        for number, least in enumerate(folded):  # intervals alike are folded alike
            if widths[number] == widest > least:
                widths[number] -= 1
                over -= 1
    return widths


def _has_numbers(column: Sequence[str]) -> bool:
    """Whether all cells of a column below its header begin with a number."""
    return all(_NUMBER.fullmatch(cell.split()[0] if cell.split() else cell) for cell in column[1:])


def _pieces(cell: str) -> list[str]:
    """The parts of a cell that are never folded: its words, names and paths cut after underscores and slashes."""
    return re.findall(r"\s*[^\s_/]*[_/]*\s*", cell)


def _folded(cell: str, width: int) -> str:
    """A cell over as many lines as it needs; an interval is kept whole below its number where it has room."""
    from rich.cells import cell_len

    number, bracket, interval = cell.partition(" [")
    if bracket and cell_len(cell) > width >= cell_len(interval) + 1 and cell_len(number) <= width:
        return f"{number}\n[{interval}"
    lines = [""]
    for piece in _pieces(cell):
        if lines[-1] and cell_len(lines[-1]) + cell_len(piece.rstrip()) > width and lines[-1].strip():
            lines[-1] = lines[-1].rstrip()
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
