"""Parquet files: opened, their columns known, their captions as rows.

The only importer of pyarrow, which is needed where Parquet is read and nowhere else (the extra ``parquet``).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from onceover.base.addresses import is_address
from onceover.base.errors import OnceoverError
from onceover.base.extras import Extra
from onceover.base.files import check_regular
from onceover.extract.containers import POINTER_FAULT, is_pointer
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.cells import captions_of
from onceover.extract.dataset.columns import Columns, choose_columns
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row

_PYARROW = Extra("parquet", "pyarrow", "pyarrow")
BATCH = 1024  # rows that are read at a time where no images are among the columns
_BLOCK_BYTES = 2**23  # of a block of rows with images, about
_MAX_REASON = 200  # characters of another library's message


def load_pyarrow() -> Any:
    """The module ``pyarrow``, with those of its parts that are used.

    Raises:
        MissingPackageError: it is not installed.
    """
    _PYARROW.imported("Parquet")
    import pyarrow.compute
    import pyarrow.parquet

    return pyarrow


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Gives the ``ParquetFile`` of a path or an address, of which parts are read when they are asked for.

    Raises:
        DatasetError: pyarrow is missing, the file is no regular one, or what is read of it is damaged.
        OSError: not there, or not to be read.
    """
    pa = load_pyarrow()
    if not is_address(path):
        check_regular(path)
        with damage_told(path), pa.parquet.ParquetFile(str(path), memory_map=True) as file:
            yield file  # mapped, so that a row group is not held whole
        return
    with path.open("rb") as source, damage_told(path), pa.parquet.ParquetFile(source) as file:
        yield file


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises on a damaged file into an error of one line.

    Raises:
        DatasetError: it is damaged, or no Parquet.
    """
    pa = load_pyarrow()
    try:
        yield
    except OnceoverError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; pyarrow's own have none
            raise
        with contextlib.suppress(OSError), path.open("rb") as start:
            if is_pointer(start.read(64)):
                raise DatasetError(f"{path}: {POINTER_FAULT}") from error
        reason = " ".join(next(iter(str(error).splitlines()), "").split()) or type(error).__name__
        raise DatasetError(f"{path} is damaged, or not what its name says ({reason:.{_MAX_REASON}})") from error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns an error of the disk or the network into a ``DatasetError``.

    Raises:
        DatasetError: the file cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error


def parquet_rows(path: Path, options: ReadOptions, image: str | None = None) -> Iterator[Row]:
    """The rows of a table whose images are named in a column, a row for each caption.

    Args:
        image: the column, or a part of one (``image.path``), where it is known; else by its usual name.

    Raises:
        DatasetError: unreadable, or without the columns.
    """
    with readable(path), open_parquet(path) as file:
        columns = columns_of(file.schema_arrow, options, path, with_images=image is None)
        image = image or columns.image or ""
        for record in records(file, path, columns, [image]):
            name = record[image] or ""
            for text in record.captions:
                yield Row(name, text, record.split)


def columns_of(schema: Any, options: ReadOptions, path: Path, with_images: bool) -> Columns:
    """The columns to read of a table; one that is called as splits are and holds no text is left alone.

    Raises:
        DatasetError: a column that the user names is not there, or none has a usual name.
    """
    columns = choose_columns(schema.names, options, path, with_images)
    if columns.split is not None and options.split_column is None and not is_text_type(type_of(schema, columns.split)):
        return replace(columns, split=None)
    return columns


class Record:
    """A row of a Parquet table: its captions, its split, and the text in other columns by their names."""

    def __init__(self, captions: list[str], split: str, others: dict[str, str | None]):
        self.captions = captions
        self.split = split
        self._others = others

    def __getitem__(self, column: str) -> str | None:
        return self._others.get(column)


def records(file: Any, path: Path, columns: Columns, others: list[str]) -> Iterator[Record]:
    """The rows of an open file, without its images.

    Args:
        path: the file, for errors. others: further columns with text, or parts of columns (``image.path``).

    Raises:
        DatasetError: a column that holds no text.
    """
    texts = [name for name in (columns.split, *others) if name is not None]
    for name in columns.captions:
        _check_captions(file, path, name)
    for name in texts:
        check_text(file, path, name, or_numbers=name != columns.split)
    wanted = list(dict.fromkeys([*columns.captions, *texts]))
    for batch in file.iter_batches(BATCH, columns=wanted, use_threads=False):
        values = {name: values_in(batch, name) for name in wanted}
        for row in range(len(batch)):
            captions: list[str] = []
            for name in columns.captions:
                captions += captions_of(values[name][row], f"{path}, column {name}")
            split = values[columns.split][row] if columns.split is not None else None
            yield Record(captions, split or "", {name: _text(values[name][row]) for name in others})


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, int) else value


def values_in(batch: Any, name: str) -> list[Any]:
    """The values of a column, or of a part of one, in a batch."""
    if name in batch.schema.names:
        return list(batch.column(name).to_pylist())
    column, _, part = name.rpartition(".")
    return [value and value[part] for value in batch.column(column).to_pylist()]


def check_text(file: Any, path: Path, name: str, or_numbers: bool) -> None:
    """Refuses a column that holds no text, nor whole numbers where these will do, as ids are.

    Raises:
        DatasetError: it holds something else.
    """
    column_type = type_of(file.schema_arrow, name)
    if not is_text_type(column_type) and not (or_numbers and load_pyarrow().types.is_integer(column_type)):
        raise DatasetError(f"{path}: the column {name} holds {column_type}; text is needed")


def _check_captions(file: Any, path: Path, name: str) -> None:
    """Refuses a column of numbers, or of lists of numbers, as one of captions.

    Raises:
        DatasetError: it holds numbers.
    """
    types = load_pyarrow().types
    column_type = type_of(file.schema_arrow, name)
    element_type = column_type.value_type if hasattr(column_type, "value_type") else column_type
    if types.is_primitive(element_type):
        raise DatasetError(f"{path}: the column {name} holds {column_type}; text is needed")


def type_of(schema: Any, name: str) -> Any:
    """The type of a column, or of a part of one."""
    if name in schema.names:
        return schema.field(name).type
    column, _, part = name.rpartition(".")
    return schema.field(column).type.field(part).type


def is_text_type(column_type: Any) -> bool:
    """Whether a type of pyarrow is text, perhaps as numbers of a dictionary."""
    types = load_pyarrow().types
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    is_view = hasattr(types, "is_string_view") and types.is_string_view(column_type)  # since pyarrow 16
    return bool(
        is_view or types.is_string(column_type) or types.is_large_string(column_type) or types.is_null(column_type)
    )


def is_bytes_type(column_type: Any) -> bool:
    """Whether a type of pyarrow is bytes."""
    types = load_pyarrow().types
    is_view = hasattr(types, "is_binary_view") and types.is_binary_view(column_type)  # since pyarrow 16
    return bool(is_view or types.is_binary(column_type) or types.is_large_binary(column_type))


def group_starts(file: Any) -> list[int]:
    """The first row of each row group of an open file, and the number of all rows."""
    starts = [0]
    for group in range(file.metadata.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    return starts


def block_rows(file: Any, column: str, group: int) -> int:
    """How many rows of a column of bytes in a row group make a block."""
    group_of_rows = file.metadata.row_group(group)
    size = _chunk(group_of_rows, column).total_uncompressed_size
    return max(1, int(group_of_rows.num_rows * _BLOCK_BYTES / max(size, 1)))


def null_rows(file: Any, column: str) -> set[int]:
    """The rows of an open file that have no bytes in a column; blocks are read only where the file counts some."""
    nulls: set[int] = set()
    for group, start in enumerate(group_starts(file)[:-1]):
        group_of_rows = file.metadata.row_group(group)
        statistics = _chunk(group_of_rows, column).statistics
        if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
            continue
        if statistics is not None and statistics.has_null_count and statistics.null_count == group_of_rows.num_rows:
            nulls.update(range(start, start + group_of_rows.num_rows))
            continue
        for batch in file.iter_batches(
            block_rows(file, column, group), row_groups=[group], columns=[column], use_threads=False
        ):
            nulls.update(start + row for row, value in enumerate(values_in(batch, column)) if not value)
            start += len(batch)
    return nulls


def _chunk(group_of_rows: Any, column: str) -> Any:
    """The metadata of a column, or of a part of one, in a row group."""
    for number in range(group_of_rows.num_columns):
        chunk = group_of_rows.column(number)
        if chunk.path_in_schema == column:
            return chunk
    raise DatasetError(f"a Parquet file has no column {column} among its row groups")
