"""The form of a delimited table: its delimiter, its columns and whether it has a header, inferred from its beginning.

Known names in the first line make it a header. Without one, that delimiter is taken with which a column holds names of
images in nearly all rows; a column of texts then holds the captions. Checksums, numbers and classes are refused.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.cells import image_in
from onceover.extract.dataset.columns import (
    Columns,
    choose_columns,
    count_columns,
    number_column,
    with_file_names,
    with_texts,
)
from onceover.extract.dataset.delimited import KINDS, Delimited
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.splits import SPLIT_WORDS
from onceover.extract.names import shown

_MOST_LINES = 200  # by which the form of a table is inferred
_MOST = 0.8  # the share of cells that tells what a column holds
_SEPARATOR = re.compile(r"sep=(.)", re.IGNORECASE)  # Excel's first line
_NUMBERED = re.compile(r"#\d+$")
_SMALL_NUMBER = re.compile(r"#?\d{1,2}")
_CHECKSUM = re.compile(r"[0-9a-f]{32,128}", re.IGNORECASE)
_UNSPACED = "\u0e00"  # Thai; from here on lie the scripts that write no blanks between words

AreThere = Callable[[Sequence[str]], bool]


class UnknownColumns(DatasetError):
    """A table with a header that names images and has a column of texts, of which no name is known."""


class NoCaptions(DatasetError):
    """A table without a header that names images, and beside them checksums, numbers or single words."""


@dataclass(frozen=True)
class TableForm:
    """The form of a delimited table: how it is written, its columns, and the line at which its rows begin."""

    delimited: Delimited
    columns: Columns
    start: int

    @property
    def kind(self) -> str:
        """The name of such a table, by its delimiter: CSV, TSV, …"""
        return KINDS.get(self.delimited.delimiter, "table")


def infer_form(lines: Sequence[str], path: Path, options: ReadOptions, are_there: AreThere) -> TableForm:
    """The form of the table that begins with these lines.

    Args:
        are_there: whether one of some names is an image's; it is asked where names have no suffix and the table no
            header.

    Raises:
        DatasetError: no form fits.
    """
    lines = lines[:_MOST_LINES]
    start = 0
    delimiters = list(KINDS)
    separator = _SEPARATOR.fullmatch(lines[0].strip(" \r"))
    if separator is not None:
        start = 1
        delimiters = [separator[1]]
    while start < len(lines) - 1 and not lines[start].strip():
        start += 1
    if "\r" in lines[start]:  # line ends of two kinds
        delimiters = []
    header = _header(lines[start : start + 1], delimiters, options)
    if header is not None:
        delimiter, names = header
        rows = [row for row in _cells(lines[start + 1 :], delimiter) if len(row) == len(names)]
        columns = _named_columns(names, _stripped_columns(rows), options, path)
        cells = {name: [row[position] for row in rows] for position, name in enumerate(names)}
        columns = with_texts(columns, cells, options)
        columns = with_file_names(columns, cells, options)
        return TableForm(_delimited(delimiter, names, columns), columns, start + 1)
    refused: NoCaptions | None = None
    for form_of in (_without_header, partial(_of_ids, are_there=are_there)):
        for delimiter in delimiters:
            try:
                form = form_of(lines[start:], delimiter, start, path, options)
            except NoCaptions as error:
                refused = refused or error
                continue
            if form is not None:
                return form
    if refused is not None:
        raise refused
    first = lines[start] if lines else ""
    raise DatasetError(f"{path} needs a first line with the columns image,caption[,split]; it has {first!r:.80}")


def _named_columns(names: Sequence[str], cells: Sequence[Sequence[str]], options: ReadOptions, path: Path) -> Columns:
    """The columns of a table with a header, of which these are the cells.

    Raises:
        UnknownColumns: no name is known, and a column holds texts. DatasetError: as ``choose_columns`` raises it.
    """
    try:
        return choose_columns(names, options, path)
    except DatasetError as error:
        if any(_is_text([cell for cell in column if image_in(cell) is None]) for column in cells):
            raise UnknownColumns(str(error)) from error
        raise


def _delimited(delimiter: str, names: Sequence[str], columns: Columns) -> Delimited:
    """How a table with these columns is written."""
    caption = names.index(columns.captions[0]) if len(columns.captions) == 1 else None
    number = number_column(names)
    return Delimited(delimiter, names, caption, None if number is None else names.index(number))


def _header(lines: Sequence[str], delimiters: Sequence[str], options: ReadOptions) -> tuple[str, list[str]] | None:
    """The delimiter with which the first line has the most known names, and its cells; None where it has none."""
    best: tuple[str, list[str]] | None = None
    most = 0
    for delimiter in delimiters:
        if delimiter == " ":
            continue  # a sentence
        cells = [cell.strip() for row in _cells(lines, delimiter) for cell in row]
        if len(cells) < 2 or any(map(image_in, cells)):
            continue
        known = count_columns(cells, options)
        if known > most:
            best = (delimiter, cells)
            most = known
    return best


def _cells(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """The cells of the rows in these lines; a line that breaks the rules of quoting is split at each delimiter."""
    written = Delimited(delimiter, ())
    rows = []
    position = 0
    while position < len(lines):
        cells, taken = written.record(lines, position)
        if lines[position].strip():
            cells = lines[position].split(delimiter) if cells is None else cells
            rows.append(cells)
        position += taken
    return rows


def _in_sentences(rows: Sequence[Sequence[str]]) -> bool:
    """Whether commas seem to be those of captions: blanks follow them, and no row ends with a split."""
    if len(rows[0]) == 2 or _is_split([row[-1].strip() for row in rows]):
        return False
    return any(cell.startswith(" ") or not cell for row in rows for cell in row[1:])


def _without_header(
    lines: Sequence[str], delimiter: str, start: int, path: Path, options: ReadOptions
) -> TableForm | None:
    """The form of a table without a header one of whose columns holds names of images, by their suffixes."""
    rows = _cells(lines, delimiter)
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    even = [row for row in rows if len(row) == width]
    uneven = width < 2 or len(even) < _MOST * len(rows)
    if uneven or delimiter == " " or (delimiter == "," and _in_sentences(even)):
        even = _caption_with_delimiters(rows, delimiter)
    columns = _stripped_columns(even)
    for image in range(len(columns)):
        cells = columns[image]
        named = sum(image_in(cell) is not None for cell in cells)
        if named < _MOST * len(cells[1:]) or named == 0:
            continue
        if image_in(cells[0]) is None and len(cells) > 1:
            _named_columns(*_header_and_cells(columns), options, path)  # the error lists the names
            return None
        return _by_position(columns, image, delimiter, start, path, options)
    return None


def _caption_with_delimiters(rows: Sequence[Sequence[str]], delimiter: str) -> list[list[str]]:
    """Rows of an image, perhaps a number, and an unquoted caption, whose parts between delimiters are joined."""
    wide = [row for row in rows if len(row) > 1]
    if not wide or len(wide) < _MOST * len(rows):
        return []
    if sum(image_in(row[0]) is not None for row in wide) >= _MOST * len(wide):
        numbered = sum(_SMALL_NUMBER.fullmatch(row[1].strip()) is not None for row in wide)
        ahead = 2 if numbered >= _MOST * len(wide) else 1
        return [[*row[:ahead], delimiter.join(row[ahead:])] for row in wide]
    return [[delimiter.join(row[:-1]), row[-1]] for row in wide]


def _of_ids(
    lines: Sequence[str], delimiter: str, start: int, path: Path, options: ReadOptions, are_there: AreThere
) -> TableForm | None:
    """The form of a table without a header whose images' names have no suffix: ids beside captions."""
    rows = _cells(lines, delimiter)
    widths = {len(row) for row in rows}
    if delimiter == "," and len(widths) > 1 and 1 not in widths:
        rows = [[row[0], ",".join(row[1:])] for row in rows]  # commas in captions
        widths = {2}
    if delimiter == " " or widths not in ({2}, {3}):
        return None
    columns = _stripped_columns(rows)
    words = [position for position, cells in enumerate(columns) if not _is_text(cells) and not _is_number(cells)]
    words = words or [position for position, cells in enumerate(columns) if not _is_text(cells)]
    image = next((position for position in words if are_there(list(filter(None, columns[position])))), None)
    if image is None:
        return None
    texts = [position for position, cells in enumerate(columns) if position != image and _is_text(cells[1:])]
    if texts and len(rows) > 1 and not _is_text(columns[texts[0]][:1]):
        _named_columns(*_header_and_cells(columns), options, path)  # the error lists the names
        return None
    return _by_position(columns, image, delimiter, start, path, options)


def _header_and_cells(columns: Sequence[Sequence[str]]) -> tuple[list[str], list[Sequence[str]]]:
    """The first cell of each column, and the cells below it."""
    return [cells[0] for cells in columns], [cells[1:] for cells in columns]


def _stripped_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The columns of rows of equal length, without blanks about the cells."""
    columns = []
    for cells in zip(*rows, strict=True):
        columns.append([cell.strip() for cell in cells])
    return columns


def _is_text(cells: Sequence[str]) -> bool:
    """Whether a column's cells are of several words."""
    return bool(cells) and sum(" " in cell for cell in cells) >= _MOST * len(cells)


def _is_number(cells: Sequence[str]) -> bool:
    """Whether a column counts the captions of an image."""
    return all(_SMALL_NUMBER.fullmatch(cell) for cell in cells)


def _is_split(cells: Sequence[str]) -> bool:
    """Whether a column holds splits."""
    return all(cell and cell.lower() in SPLIT_WORDS for cell in cells)


def _no_captions(cells: Sequence[str]) -> str:
    """What nearly all cells of a column are, where they are no captions: checksums, numbers, single words; else ""."""
    cells = [cell for cell in cells if cell]
    most = _MOST * len(cells)
    if not cells:
        return ""
    if sum(_CHECKSUM.fullmatch(cell) is not None for cell in cells) >= most:
        return "checksums"
    if sum(not any(letter.isalpha() for letter in cell) for cell in cells) >= most:
        return "numbers"
    if sum(re.fullmatch(r"[\w.-]+", cell) is not None and max(cell) < _UNSPACED for cell in cells) >= most:
        return "single words, such as classes"
    return ""


def _by_position(
    columns: Sequence[Sequence[str]], image: int, delimiter: str, start: int, path: Path, options: ReadOptions
) -> TableForm | None:
    """The form of a table without a header, where the column of the images is known.

    Raises:
        NoCaptions: the column that is left holds no captions. DatasetError: the user names a column that is not
            there.
    """
    names = [f"column {position + 1}" for position in range(len(columns))]
    others = [position for position in range(len(columns)) if position != image]
    number = next((position for position in others if _is_number(columns[position])), None) if len(others) > 1 else None
    others = [position for position in others if position != number]
    split = next((position for position in others if _is_split(columns[position])), None) if len(others) > 1 else None
    others = [position for position in others if position != split]
    captions = [position for position in others if _is_text(columns[position])]
    if not captions and len(others) == 1:
        captions = others
    given = ReadOptions(
        options.image_column and _called(options.image_column),
        tuple(map(_called, options.caption_columns)),
        options.split_column and _called(options.split_column),
    )
    if not captions and not given.caption_columns:
        return None
    for name in (given.image_column, *given.caption_columns, given.split_column):
        if name is not None and name not in names:
            raise DatasetError(
                f"{path} has no header, and no column {name!r:.80}; name its columns by number: 1 to {len(names)}"
            )
    first = captions[0] if captions else 0
    captions = [position for position in captions if not _no_captions(columns[position])]
    if not captions and not given.caption_columns:
        instead = f"{_no_captions(columns[first])} ({shown(columns[first][0])})"
        raise NoCaptions(
            f"{path} has no header, and its {names[first]}, beside the images' names, holds {instead}, no captions; "
            f"if they are to be the captions, say so with --caption-column {first + 1}"
        )
    chosen = Columns(
        given.image_column or names[image],
        given.caption_columns or tuple(names[position] for position in captions),
        given.split_column or (None if split is None else names[split]),
        headed=False,
    )
    caption = names.index(chosen.captions[0]) if len(chosen.captions) == 1 else None
    quoted = not any(_NUMBERED.search(cell) for cell in columns[image])  # Flickr8k and Flickr30k as published
    return TableForm(Delimited(delimiter, names, caption, number, quoted), chosen, start)


def _called(name: str) -> str:
    """The name of a column of a table without a header, where the user gives its number."""
    return f"column {name}" if name.isdecimal() else name
