"""Captions in JSON: objects, one a line or in a list; captions by image's name; columns, as pandas writes them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from onceover.base.files import parse_json
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.cells import captions_of, image_in, rows_of, text_of
from onceover.extract.dataset.columns import Columns, choose_columns, count_columns, with_file_names
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.splits import SPLIT_WORDS
from onceover.extract.dataset.text import read_lines, read_text
from onceover.extract.names import shown

_DECODER = json.JSONDecoder()
_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_LIST_OF_OBJECTS = re.compile(r'"([^"\\]*)"\s*:\s*\[\s*(?=\{)')  # {"version": 1, "annotations": [{
_MOST_OBJECTS = 100  # by which it is found out which columns there are

#: the form, and what reads the rows
Opened = tuple[str, Callable[[], Iterator[Row]]]


def open_json(path: Path, head: str, options: ReadOptions) -> Opened | None:
    """The form of the JSON file that begins with ``head``, and its rows; None where it is none of captions.

    Raises:
        DatasetError: objects without a column that is known.
    """
    text = head.lstrip()
    if text.startswith("["):
        return _list("JSON list", _objects(text, 1), path, options)
    first = _objects(text, 0)
    if len(first) > 1 or (first and _is_row(first[0], options)):
        columns = _choose(first, options, path)
        return columns.describe("JSON lines"), partial(_rows_of_lines, path, columns)
    key = _FIRST_KEY.match(text)
    if key is None:
        return None
    try:
        name = parse_json(key[1])
    except ValueError:  # a line break in it, or an escape that is none
        return None
    rows = _objects_by_key(text)
    if rows and name.isdecimal() and count_columns(_names(rows), options) > 1:
        columns = _choose(rows, options, path)
        return columns.describe("JSON objects by number"), partial(_rows_by_number, path, columns)
    if image_in(name) is not None or name.isdecimal():
        return "JSON object, captions by the image's name", partial(_rows_by_name, path)
    if text[key.end() :].startswith(("{", '["', "['")) and count_columns([name], options):
        names = list(_whole(path))
        columns = choose_columns(names, options, path)
        return columns.describe("JSON columns"), partial(_rows_of_columns, path, columns)
    for inner in _LIST_OF_OBJECTS.finditer(text):
        objects = _objects(text, inner.end())
        if count_columns(_names(objects), options) > 1:
            return _list(f"JSON list `{inner[1]:.80}`", objects, path, options, inner[1])
    first_list = _LIST_OF_OBJECTS.search(text)
    if first_list is None:
        return None
    return _list(f"JSON list `{first_list[1]:.80}`", _objects(text, first_list.end()), path, options, first_list[1])


def _list(
    kind: str, objects: Sequence[dict[str, Any]], path: Path, options: ReadOptions, name: str | None = None
) -> Opened | None:
    """A list that begins with these objects, which may be the value of ``name`` in an object; None where it has none.

    Raises:
        DatasetError: no column is known.
    """
    if not objects:
        return None
    columns = _choose(objects, options, path)
    if name is not None and SPLIT_WORDS.get(name.lower()):
        return f"{columns.describe('JSON lists')}, splits by list", partial(_rows_by_split, path, columns)
    return columns.describe(kind), partial(_rows_of_list, path, columns, name)


def _choose(objects: Sequence[dict[str, Any]], options: ReadOptions, path: Path) -> Columns:
    """The columns of objects that are rows.

    Raises:
        DatasetError: no column is known.
    """
    names = _names(objects)
    columns = choose_columns(names, options, path)
    return with_file_names(columns, {name: [str(entry.get(name)) for entry in objects] for name in names}, options)


def _objects(text: str, position: int) -> list[dict[str, Any]]:
    """The objects that follow each other in a text, as far as they go, with commas between them or without."""
    objects: list[dict[str, Any]] = []
    while len(objects) < _MOST_OBJECTS:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):  # the beginning ends within it, or it is no JSON
            break
        if not isinstance(value, dict):
            break
        objects.append(value)
    return objects


def _objects_by_key(text: str) -> list[dict[str, Any]]:
    """The first object in an object that begins a text, ``{"0": {...``; none where its first value is none."""
    key = _FIRST_KEY.match(text)
    return _objects(text, key.end())[:1] if key is not None else []


def _names(objects: Iterable[dict[str, Any]]) -> list[str]:
    """The names that occur in objects, in their order."""
    return list(dict.fromkeys(name for entry in objects for name in entry))


def _is_row(entry: dict[str, Any], options: ReadOptions) -> bool:
    """Whether an object that is alone in its file has an image and a caption, and is no table of columns."""
    if count_columns(list(entry), options) < 2:
        return False
    return any(isinstance(value, str) for value in entry.values())


def _whole(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        DatasetError: unreadable, or no JSON.
    """
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON as a whole ({error}); is the download complete?") from error


def _rows_of_list(path: Path, columns: Columns, name: str | None = None) -> Iterator[Row]:
    """The rows of a list of objects, which may be the value of ``name`` in an object."""
    value = _whole(path)
    entries = value if name is None else value.get(name)
    if not isinstance(entries, list):
        raise DatasetError(f"{path} has its list {name!r:.80} deeper within it; write the list alone into a file")
    for number, entry in enumerate(entries, 1):
        yield from _rows_of_object(entry, columns, f"{path}, entry {number}")


def _rows_by_split(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of an object that has a list of objects for each split; those of other lists go into the ledger."""
    for name, entries in _whole(path).items():
        if not isinstance(entries, list):
            continue
        is_split = bool(SPLIT_WORDS.get(name.lower()))
        fault = "" if is_split else f"in the list {shown(name)}, which is called after no split"
        for number, entry in enumerate(entries, 1):
            if is_split:
                for row in _rows_of_object(entry, columns, f"{path}, entry {number} of {name}"):
                    yield row._replace(split=row.split or name)
            elif isinstance(entry, dict) and columns.image in entry:
                yield Row(str(entry[columns.image]), "", "", fault)


def _rows_of_lines(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of objects one a line."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise DatasetError(f"{path}, line {number}: no JSON object ({error})") from error
        yield from _rows_of_object(entry, columns, f"{path}, line {number}")


def _rows_by_name(path: Path) -> Iterator[Row]:
    """The rows of an object that gives each image's name its caption, or a list of them."""
    for name, value in _whole(path).items():
        yield from rows_of(name, captions_of(value, f"{path}, {name:.80}"), "")


def _rows_by_number(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of an object that gives each row's number an object, as pandas' ``to_json(orient="index")`` does."""
    for number, entry in _whole(path).items():
        yield from _rows_of_object(entry, columns, f"{path}, {number:.80}")


def _rows_of_columns(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of an object of columns, each a list or an object by the row's number."""
    value = _whole(path)
    names = [name for name in (columns.image, *columns.captions, columns.split) if name is not None]
    cells = {}
    order = value[names[0]]
    for name in names:
        column = value[name]
        if isinstance(column, dict) and isinstance(order, dict) and column.keys() == order.keys():
            column = [column[key] for key in order]  # not every writer keeps one order
        cells[name] = column
    counts = {len(column) if isinstance(column, list) else -1 for column in cells.values()}
    if len(counts) > 1 or -1 in counts:
        listed = ", ".join(names)
        raise DatasetError(f"{path} has columns of different lengths or rows: {listed}; write a list of objects")
    for number in range(counts.pop()):
        entry = {name: cells[name][number] for name in names}
        yield from _rows_of_object(entry, columns, f"{path}, row {number + 1}")


def _rows_of_object(entry: Any, columns: Columns, where: str) -> Iterator[Row]:
    """A row for each caption of an object; one without a caption where there is none, for the ledger.

    Raises:
        DatasetError: no object, or something other than text in it.
    """
    if not isinstance(entry, dict):
        raise DatasetError(f"{where}: {entry!r:.80} is no object with an image and a caption")
    image = text_of(entry.get(columns.image), where)
    split = "" if columns.split is None else text_of(entry.get(columns.split), where)
    captions = [caption for name in columns.captions for caption in captions_of(entry.get(name), where)]
    yield from rows_of(image, captions, split)
