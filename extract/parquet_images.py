"""Images that lie in Parquet files as bytes, read a block of rows at a time."""

import bisect
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from errno import ENOENT
from pathlib import Path
from typing import Any

from onceover.base.files import FileError
from onceover.extract.containers import check_unchanged, stamp_of
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.parquet import block_rows, damage_told, group_starts, open_parquet
from onceover.extract.image_source import ImageSource
from onceover.extract.ledger import NO_SUCH_IMAGE
from onceover.extract.pictures import MAX_BYTES

_MOST_BLOCKS = 12  # that a process keeps
_MOST_CURSORS = 8  # row groups that a process is within


class ParquetImages(ImageSource):
    """Images in a column of Parquet files, by ``file.parquet/row``. A copy in another process opens the files anew.

    Args:
        root: the folder of the files. files: their names. column: the column of the bytes, perhaps part of another.
        keys: of the images, by their names. rows: the number of rows in each file.
    """

    def __init__(self, root: Path, files: Sequence[str], column: str, keys: dict[str, str], rows: Sequence[int]):
        self._root = root
        self._files = list(files)
        self._column = column
        self._keys = keys
        self._names = {key: name for name, key in keys.items()}
        self._counts = dict(zip(files, rows, strict=True))
        self._stamps = {file: stamp_of(root / file) for file in files}
        self._blocks: dict[int, _Blocks] = {}  # by process: a fork does not take over what its parent has open

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_blocks": {}}

    def open(self, key: str) -> bytes:
        """The bytes of an image.

        Raises:
            OSError: it cannot be read now, or the file was changed. FileError: there are none, too many, or they are
                damaged.
        """
        file, row = self._position(key)
        path = self._root / file
        check_unchanged(path, self._stamps[file])
        blocks = self._blocks.setdefault(os.getpid(), _Blocks())
        try:
            data = blocks.value(path, self._column, row)
        except DatasetError as error:
            raise FileError(str(error)) from error
        if not data:
            raise FileError(f"no image in row {row:,} (counted from 0) of {path}")
        if len(data) > MAX_BYTES:
            raise FileError(f"{self.describe(key)} has {len(data):,} bytes; at most {MAX_BYTES:,} are read")
        return data

    def stat(self, key: str) -> tuple[int, int]:
        """The size and modification time of the file that the image lies in: its own size is known once it is read."""
        try:
            file, _ = self._position(key)
        except FileNotFoundError:
            return -1, -1
        return self._stamps[file]

    def describe(self, key: str) -> str:
        """The path of the file, the row, and the image's name."""
        name = self._names.get(key, key)
        return str(self._root / key) if name == key else f"{self._root / key} ({name})"

    def resolve(self, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str | None]]:
        """The key of each name, and why a name is left out, or None."""
        keys: dict[str, str] = {}
        reasons: dict[str, str | None] = {}
        for name in names:
            keys[name] = self._keys.get(name, name)
            reasons[name] = None if name in self._keys else NO_SUCH_IMAGE
        return keys, reasons

    def _position(self, key: str) -> tuple[str, int]:
        """The file and row of a key.

        Raises:
            FileNotFoundError: there is none.
        """
        file, _, row = key.rpartition("/")
        if row.isdecimal() and len(row) < 20 and int(row) < self._counts.get(file, 0):
            return file, int(row)
        raise FileNotFoundError(ENOENT, NO_SUCH_IMAGE, key)


class _Blocks:
    """The blocks of rows that a process has read last, in memory, since images are mostly read in their order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[Path, int], Any] = OrderedDict()  # by file and first row
        self._cursors: OrderedDict[tuple[Path, int], _Cursor] = OrderedDict()  # by file and row group
        self._starts: dict[Path, list[int]] = {}  # the first row of each row group, and the number of rows

    def value(self, path: Path, column: str, row: int) -> bytes | None:
        """The bytes in a row of a column.

        Raises:
            DatasetError: damaged. OSError: it cannot be read now.
        """
        with self._lock:
            start, block = self._find(path, row) or self._read(path, column, row)
            value: Any = block[row - start].as_py()
        return value[column.rpartition(".")[2]] if isinstance(value, dict) else value

    def _find(self, path: Path, row: int) -> tuple[int, Any] | None:
        """The block with a row and its first row, where it is kept."""
        for key in reversed(self._blocks):
            start = key[1]
            if key[0] == path and start <= row < start + len(self._blocks[key]):
                self._blocks.move_to_end(key)
                return start, self._blocks[key]
        return None

    def _read(self, path: Path, column: str, row: int) -> tuple[int, Any]:
        """Reads on in a row group to the block that has the row, from the group's start where that was passed."""
        if path not in self._starts:
            with open_parquet(path) as file:
                self._starts[path] = group_starts(file)
        starts = self._starts[path]
        group = bisect.bisect_right(starts, row) - 1
        cursor = self._cursors.pop((path, group), None)
        if cursor is None or cursor.row > row:
            cursor = _Cursor(path, column, group, starts[group])
        while cursor.row <= row:
            start = cursor.row
            block = cursor.read()
            self._blocks[path, start] = block
            while len(self._blocks) > _MOST_BLOCKS:
                self._blocks.popitem(last=False)
        if cursor.row < starts[group + 1]:
            self._cursors[path, group] = cursor
        while len(self._cursors) > _MOST_CURSORS:
            self._cursors.popitem(last=False)
        return start, block


class _Cursor:
    """A reader of one column in a row group. ``row``: the next row, counted from the start of the file."""

    def __init__(self, path: Path, column: str, group: int, first: int):
        self.row = first
        self._path = path
        self._open = ExitStack()
        file = self._open.enter_context(open_parquet(path))
        rows = block_rows(file, column, group)
        self._batches = file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False)

    def read(self) -> Any:
        """The next block of rows.

        Raises:
            DatasetError: damaged, or with fewer rows than it says. OSError: it cannot be read now.
        """
        with damage_told(self._path):
            batch = next(self._batches, None)
            if batch is None or not len(batch):
                raise DatasetError(f"{self._path} has fewer rows than it says; fetch it again")
        self.row += len(batch)
        return batch.column(0)
