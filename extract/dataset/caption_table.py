"""Tables of captions in any usual form: CSV, TSV, semicolons, bars, with a header or without, JSON lines and lists."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.cells import captions_in, rows_of
from onceover.extract.dataset.json_table import open_json
from onceover.extract.dataset.reading import DEFAULT, ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.table_form import AreThere, TableForm, infer_form
from onceover.extract.dataset.text import lines_of, read_head, read_lines

#: files that may be tables of captions
SUFFIXES = (".csv", ".tsv", ".tab", ".psv", ".txt", ".token", ".json", ".jsonl", ".ndjson")
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class CaptionTable:
    """A table whose form is known.

    Attributes:
        path: the file. form: how it is read, for the user. rows: reads it; raises DatasetError.
        named: whether its columns are known by their names, and not by what they hold.
    """

    path: Path
    form: str
    rows: Callable[[], Iterator[Row]]
    named: bool = True


def open_table(path: Path, options: ReadOptions = DEFAULT, are_there: AreThere = any) -> CaptionTable:
    """Opens a table of captions, whose form is inferred from its beginning.

    Args:
        are_there: whether one of some names is an image's; it is asked where names have no suffix and the table no
            header.

    Raises:
        DatasetError: an unreadable file, or no table of captions; the error says what is lacking.
    """
    head, whole = read_head(path)
    if head.lstrip()[:1] in ("[", "{"):
        opened = open_json(path, head, options)
        if opened is not None:
            return CaptionTable(path, *opened)
    if path.suffix.lower() in _JSON_SUFFIXES:
        raise DatasetError(
            f"{path} is no list of captions that is understood; it needs objects such as "
            '{"image": "a.jpg", "caption": "A dog runs ."}, one a line or in a list'
        )
    lines = lines_of(head)
    if not whole and len(lines) > 1:
        lines.pop()  # cut off
    form = infer_form(lines, path, options, are_there)
    return CaptionTable(path, form.columns.describe(form.kind), partial(_rows, path, form), form.columns.headed)


def _rows(path: Path, form: TableForm) -> Iterator[Row]:
    """The rows of a delimited table, a row for each caption.

    Raises:
        DatasetError: unreadable, or a row with another number of cells.
    """
    names = form.delimited.names
    image = names.index(form.columns.image)
    captions = [names.index(name) for name in form.columns.captions]
    split = None if form.columns.split is None else names.index(form.columns.split)
    for cells in form.delimited.rows(read_lines(path), form.start, path):
        word = "" if split is None else cells[split]
        texts = [caption for position in captions for caption in captions_in(cells[position])]
        yield from rows_of(cells[image], texts, word)
