"""Delimited text -> rows of cells, with commas, tabs, semicolons, bars or blanks between them, quoted or not.

Published tables break the rules of quoting. A row that does not follow them is taken as it stands, where there is one
way to read it; else it is an error that names its line.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onceover.base.files import MAX_TEXT
from onceover.extract.dataset import DatasetError
from onceover.extract.formats import IMAGE_SUFFIXES
from onceover.extract.names import shown

#: the delimiters in the order in which they are tried, each with the name of such a table
KINDS = {"\t": "TSV", "|": "table with bars", ";": "table with semicolons", ",": "CSV", " ": "text with blanks"}
_CALLED = {"\t": "tabs", "|": "bars", ";": "semicolons", ",": "commas", " ": "blanks"}
_MAX_RECORD = 2**17  # characters of a record of several lines; a quote that is open for longer was never closed
_SUFFIXES = f"({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES, reverse=True)))})"
_NUMBER_AND_CAPTION = re.compile(r"\s*(\d+)\s+(\S.*)")
csv.field_size_limit(MAX_TEXT - 1)  # a long cell is a matter for the ledger (``MAX_CAPTION``), not for the parser


@dataclass(frozen=True)
class Delimited:
    """How a table is written.

    Attributes:
        delimiter: what stands between cells. names: the columns' names, one for each cell of a row.
        caption: the position of the only column with captions; None where there are several.
        number: the position of a column that counts an image's captions, if there is one.
        quoted: whether quotes about a cell are marks of the table, not of its text.
    """

    delimiter: str
    names: Sequence[str]
    caption: int | None = None
    number: int | None = None
    quoted: bool = True

    def rows(self, lines: Sequence[str], start: int, source: Path) -> Iterator[list[str]]:
        """The cells of each row from the line ``start`` (from 0) on; blank lines are passed over.

        Raises:
            DatasetError: a row with another number of cells.
        """
        position = start
        while position < len(lines):
            if not lines[position].strip():
                position += 1
                continue
            cells, taken = self.record(lines, position)
            if cells is None or len(cells) != len(self.names):
                cells = self._as_it_stands(lines[position])
                taken = 1
            if cells is None:
                raise DatasetError(self._why_uneven(lines[position], f"{source}, line {position + 1}"))
            yield cells
            position += taken

    def _why_uneven(self, line: str, where: str) -> str:
        """Why a line is no row, and what to do."""
        expected = f"{where}: expected {len(self.names)} fields ({shown(','.join(self.names))})"
        count = line.count(self.delimiter) + 1
        if count >= len(self.names):
            return f"{expected}; quote captions that contain {_CALLED[self.delimiter]}"
        return f"{expected}, and there are {count}: {line!r:.80}; each row needs all of them, with a caption"

    def record(self, lines: Sequence[str], position: int) -> tuple[list[str] | None, int]:
        """The cells of the row that starts at ``position`` and the lines it takes; None where quoting is broken.

        Only a quote that is left open makes a row run over a line's end, and never into a line that looks like a row.
        """
        record = lines[position]
        if not self.quoted or '"' not in record:
            return record.split(self.delimiter), 1
        taken = 1
        blanks = self.delimiter == ","  # image, "caption"
        while True:
            try:
                reader = csv.reader([record], delimiter=self.delimiter, skipinitialspace=blanks, strict=True)
                return next(reader, []), taken
            except csv.Error as error:
                if "unexpected end of data" not in str(error):
                    return None, 1
            following = self._to_closing_quote(lines, position + taken)
            if following is None or len(record) + len(following) > _MAX_RECORD:
                return None, 1
            taken += following.count("\n") + 1
            record += f"\n{following}"

    def _to_closing_quote(self, lines: Sequence[str], position: int) -> str | None:
        """The lines from ``position`` to the first that can close a quote, which has an odd number of them.

        None where none comes soon, or one before it looks like a row.
        """
        size = 0
        for end in range(position, len(lines)):
            size += len(lines[end]) + 1
            if size > _MAX_RECORD or self._looks_like_a_row(lines[end]):
                return None
            if lines[end].count('"') % 2:
                return "\n".join(lines[position : end + 1])
        return None

    def _looks_like_a_row(self, line: str) -> bool:
        """Whether a line is a row of its own: a cell names an image, or it has a row's tabs, which captions lack."""
        if self.delimiter in "\t|;" and line.count(self.delimiter) == len(self.names) - 1:
            return True
        return self._image_cell.search(line) is not None

    @cached_property
    def _image_cell(self) -> re.Pattern[str]:
        """Finds a cell that is an image's name."""
        mark = re.escape(self.delimiter)
        return re.compile(rf'(^|{mark})"?[^"{mark}]+{_SUFFIXES}(#\d+)?"?({mark}|$)', re.IGNORECASE)

    def _as_it_stands(self, line: str) -> list[str] | None:
        """The cells of a row that breaks the rules of quoting; None where it can be read in several ways.

        Commas and quotes occur in captions, so that a CSV of three columns and more is read so only without quotes.
        """
        last = len(self.names) - 1
        cells = line.split(self.delimiter)
        missing = len(self.names) - len(cells)
        if missing == 1 and self.number is not None and self.caption == self.number + 1:
            mended = _NUMBER_AND_CAPTION.fullmatch(cells[self.number])
            if mended is not None:  # as a row of Flickr30k, which lacks the bar between number and caption
                return [*cells[: self.number], mended[1], mended[2], *cells[self.caption :]]
        if self.delimiter == "," and last > 1 and '"' in line:
            return None
        if missing == 0:
            return cells
        if missing < 0 and self.caption == last:
            return line.split(self.delimiter, last)
        if missing < 0 and self.caption == 0:
            return line.rsplit(self.delimiter, last)
        return None
