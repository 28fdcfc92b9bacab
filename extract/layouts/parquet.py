"""Parquet files with images inside, as Hugging Face's datasets and img2dataset write them, or with images' names."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from onceover.base.extras import MissingPackageError
from onceover.base.files import FileError
from onceover.base.progress import ProgressBar
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.columns import IMAGE_NAMES, Columns
from onceover.extract.dataset.examples import ExampleImage, by_split
from onceover.extract.dataset.image_folders import FOLDERS
from onceover.extract.dataset.parquet import (
    columns_of,
    is_bytes_type,
    is_text_type,
    load_pyarrow,
    null_rows,
    open_parquet,
    parquet_rows,
    readable,
    records,
    values_in,
)
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row, image_name
from onceover.extract.dataset.samples import SUCCESS, why_not_downloaded
from onceover.extract.dataset.shard_files import ShardFiles, shard_files
from onceover.extract.dataset.splits import named_splits
from onceover.extract.formats import format_of
from onceover.extract.layouts import UnreadDataset, beside
from onceover.extract.parquet_images import ParquetImages

NAME = "parquet"
PRIORITY = 36
LOOKED_FOR = "a .parquet with the columns image (bytes, or names) and caption"
EXAMPLE = "train.parquet\ndatasets.load_dataset(NAME)['train'].to_parquet('train.parquet')"
HOLDS = ("captions", "splits")
SUFFIXES = (".parquet", ".arrow")
_FIRST = 8  # rows by which it is known whether bytes are images
_BYTES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img", "bytes", *IMAGE_NAMES)  # usual names, in order


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """A Parquet file, a pattern, or a folder of them, whose first has images or their names, and captions.

    Raises:
        DatasetError: no column is known to hold what is needed, a pattern that no file matches, or files of
            ``save_to_disk``. MissingPackageError: pyarrow is missing.
    """
    files = shard_files(data, ".parquet", options)
    if files is None:
        _refuse_arrow(data)
        return None
    try:
        return _found(data, files, options)
    except (DatasetError, FileError, MissingPackageError):
        if data.is_dir():
            return None  # features, say, beside captions in another form; ``near`` tells why
        raise


def near(data: Path, options: ReadOptions) -> str | None:
    """Why the first Parquet file in a folder is not taken; None where there is none."""
    files = shard_files(data, ".parquet", options) if data.is_dir() else None
    if files is None:
        return None
    try:
        _found(data, files, options)
    except (DatasetError, FileError, MissingPackageError) as error:
        return str(error)
    return None


def _found(data: Path, files: ShardFiles, options: ReadOptions) -> UnreadDataset:
    """The dataset in Parquet files.

    Raises:
        DatasetError: damaged, or no column is known to hold what is needed. MissingPackageError: pyarrow is missing.
    """
    first = files.root / files.names[0]
    with readable(first), open_parquet(first) as file:
        schema = file.schema_arrow
        column = _bytes_column(file, first, options)
        path_column = _path_column(schema, column)
        if column is not None and len(null_rows(file, column)) == file.metadata.num_rows and path_column is not None:
            column = None  # only the paths were written
    captions = data if data.exists() else files.root
    if column is not None:
        columns = columns_of(schema, _without_image(options), first, with_images=False)
        table = _Table(files, column, path_column, columns)
        return UnreadDataset(files.root, captions, table.rows, table.images, table.form())
    columns = columns_of(schema, options, first, with_images=path_column is None)
    named = _NamedImages(files, options, path_column)
    return beside(captions, files.root, named.rows, FOLDERS, options, columns.describe("Parquet"))


def _refuse_arrow(data: Path) -> None:
    """Refuses what ``save_to_disk`` of Hugging Face's datasets writes, and says how to convert it.

    Raises:
        DatasetError: ``data`` was written so.
    """
    folder = data if data.is_dir() else data.parent
    has_splits = (folder / "dataset_dict.json").is_file()
    if data.suffix.lower() == ".arrow" or (data.is_dir() and (has_splits or (data / "state.json").is_file())):
        split = "['train']" if has_splits else ""
        raise DatasetError(
            f"{data} was written by save_to_disk of Hugging Face's datasets; convert each of its splits: "
            f"datasets.load_from_disk({str(folder)!r}){split}.to_parquet('train.parquet')"
        )


def _bytes_column(file: Any, path: Path, options: ReadOptions) -> str | None:
    """The column that holds images as bytes, or the part of one; None where there is none.

    Raises:
        DatasetError: there are several.
    """
    columns = {}
    for field in file.schema_arrow:
        if is_bytes_type(field.type):
            columns[field.name] = field.name
        elif load_pyarrow().types.is_struct(field.type) and "bytes" in [part.name for part in field.type]:
            columns[field.name] = f"{field.name}.bytes"
    if options.image_column is not None:
        return columns.get(options.image_column)
    usual = [name for name in _BYTES if name in columns]
    if usual:
        return columns[usual[0]]
    if any(is_text_type(field.type) and field.name in IMAGE_NAMES for field in file.schema_arrow):
        columns = {name: column for name, column in columns.items() if _has_images(file, column)}  # others: hashes, say
    if len(columns) > 1:
        raise DatasetError(
            f"{path} has several columns with bytes ({', '.join(columns)}); say which holds the images with "
            "--image-column"
        )
    return next(iter(columns.values()), None)


def _has_images(file: Any, column: str) -> bool:
    """Whether one of the first values in a column of bytes begins as an image does."""
    batch = next(file.iter_batches(_FIRST, columns=[column], use_threads=False), None)
    values = [] if batch is None else values_in(batch, column)
    return any(format_of(value) is not None for value in values if value)


def _path_column(schema: Any, column: str | None) -> str | None:
    """The part of an image's column that holds its path."""
    name, _, part = (column or "").rpartition(".")
    if part != "bytes" or name not in schema.names:
        return None
    paths = [field for field in schema.field(name).type if field.name == "path" and is_text_type(field.type)]
    return f"{name}.path" if paths else None


def _without_image(options: ReadOptions) -> ReadOptions:
    """The options for the columns beside the image's, which is known."""
    return ReadOptions(caption_columns=options.caption_columns, split_column=options.split_column)


class _NamedImages:
    """Tables whose images are files, named in a column."""

    def __init__(self, files: ShardFiles, options: ReadOptions, path_column: str | None):
        self._files = files
        self._options = options
        self._path_column = path_column

    def rows(self) -> Iterator[Row]:
        """The rows of all tables in their order."""
        yield from _missing_files(self._files)
        for name, split in zip(self._files.names, named_splits(self._files.names), strict=True):
            for row in parquet_rows(self._files.root / name, self._options, self._path_column):
                yield row._replace(split=row.split or split)


def _missing_files(files: ShardFiles) -> Iterator[Row]:
    for name in files.missing:
        yield Row(name, "", "", "no such file")


class _Entry(NamedTuple):
    """A row of a table: the image's key, its path or "", its captions and split, and why it cannot be used, or ""."""

    key: str
    path: str
    captions: list[str]
    split: str
    fault: str


class _Table:
    """Tables with images inside."""

    def __init__(self, files: ShardFiles, column: str, path_column: str | None, columns: Columns):
        self._files = files
        self._column = column
        self._path_column = path_column
        self._columns = columns
        self._counts: list[int] = []
        self._keys: dict[str, str] = {}

    def form(self) -> str:
        """How the tables are read, for the user."""
        count = f"{len(self._files.names):,} file{'s' if len(self._files.names) > 1 else ''}"
        name = self._column.removesuffix(".bytes")
        return self._columns.describe(f"Parquet, {count}, images in `{name}`")

    def rows(self) -> Iterator[Row]:
        """The captions of all tables in their order."""
        yield from _missing_files(self._files)
        names = self._files.names
        entries: list[_Entry] = []
        self._counts = []
        with ProgressBar("reading tables", "files", total=len(names)) as bar:
            for name, split in zip(names, named_splits(names), strict=True):
                before = len(entries)
                entries += self._entries(name, split)
                self._counts.append(len(entries) - before)
                bar.update()
        ids = self._ids(entries)
        self._keys = {}
        for entry, name in zip(entries, ids, strict=True):
            if not entry.fault:
                self._keys.setdefault(name, entry.key)
            for caption in entry.captions:
                yield Row(name, caption, entry.split, entry.fault)

    def images(self, rows: Sequence[Row]) -> ParquetImages:
        """The images of all tables."""
        if not self._counts:
            list(self.rows())
        return self._source(self._keys)

    def _source(self, keys: dict[str, str]) -> ParquetImages:
        return ParquetImages(self._files.root, self._files.names, self._column, keys, self._counts)

    def _entries(self, name: str, split: str) -> Iterator[_Entry]:
        """The rows of one table.

        Raises:
            DatasetError: it has other columns than the first.
        """
        path = self._files.root / name
        texts = [self._path_column] if self._path_column is not None else []
        with readable(path), open_parquet(path) as file:
            columns = file.schema_arrow.names
            needed = {*self._columns.captions, self._column.removesuffix(".bytes"), self._columns.split}
            if not needed <= {*columns, None}:
                raise DatasetError(
                    f"{path} has other columns than {self._files.names[0]}; name the files of one kind: "
                    "--data 'FOLDER/train-*.parquet'"
                )
            if "status" in columns and "key" in columns:  # img2dataset's
                texts += [column for column in ("status", "error_message") if column in columns]
            nulls = null_rows(file, self._column)
            for row, record in enumerate(records(file, path, self._columns, texts)):
                of_image = record[self._path_column] or "" if self._path_column is not None else ""
                fault = ""
                if record["status"] not in (None, SUCCESS):
                    fault = why_not_downloaded(record["status"], record["error_message"])
                elif row in nulls:
                    only = f": only the path {of_image:.80}" if of_image else ""
                    fault = f"no image in the file{only}"
                yield _Entry(f"{name}/{row}", of_image, record.captions, record.split or split, fault)

    def _ids(self, entries: list[_Entry]) -> list[str]:
        """The images' paths, where each image has one of its own; else the file and row of each.

        Rows with the same path are one image with several captions where their bytes are the same, too.
        """
        keys = [entry.key for entry in entries]
        paths = [image_name(Row(entry.path, "")) for entry in entries]
        if any(not entry.path for entry in entries):
            return keys
        counts = Counter(path for path, entry in zip(paths, entries, strict=True) if not entry.fault)
        repeated = [row for row, path in enumerate(paths) if counts[path] > 1 and not entries[row].fault]
        digests: dict[str, str] = {}
        source = self._source({})
        for row in repeated:
            try:
                digest = hashlib.sha256(source.open(keys[row])).hexdigest()
            except (OSError, FileError) as error:
                raise DatasetError(f"the image of row {keys[row]} cannot be read: {error}") from error
            if digests.setdefault(paths[row], digest) != digest:
                return keys
        return paths


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """A table for each split, with the images inside."""
    pa = load_pyarrow()
    for split, chosen in by_split(images).items():
        inside = [{"bytes": image.content, "path": image.name} for image in chosen]
        captions = [list(image.captions) for image in chosen]
        table = pa.table({"image": inside, "caption": captions})
        pa.parquet.write_table(table, folder / f"{split or 'data'}-00000-of-00001.parquet")
    return folder
