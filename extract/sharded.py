"""Features and thumbnails of a store that is a folder: they lie in its shards, which are mapped when rows are read.

A shard is compared with its checksum in the manifest when it is first opened; it never changes afterwards.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import h5py
import numpy as np

from onceover.base.hdf5 import Hdf5Error, RowsOnDisk, check_bytes, open_hdf5, stated_checksum, which_file

MAPPED = 64  # shards that are mapped at a time; each holds a file open
BLOCK = 1024  # rows that are read at a time where all are passed over


class ShardTable(NamedTuple):
    """What a manifest says of its shards: their file names, numbers of rows, sizes in bytes, and checksums."""

    names: list[str]
    rows: np.ndarray
    sizes: np.ndarray
    checksums: list[str]


class Places(NamedTuple):
    """Where the rows of one kind lie: the number of the shard and the row in it, int32 (N,) both."""

    shards: np.ndarray
    rows: np.ndarray

    def by_shard(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Some rows, shard by shard: its number, which of ``rows`` lie there, and where in it."""
        shards = self.shards[rows]
        places = self.rows[rows]
        order = np.argsort(shards, kind="stable")
        for chosen in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(chosen):
                yield int(shards[chosen[0]]), chosen, places[chosen]


class _Layout(NamedTuple):
    """Where features lie in the file of a shard, in bytes from its beginning, and how they look."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class ShardFiles:
    """The shards of a folder, opened and checked when they are first needed. From several threads at will.

    Raises:
        Hdf5Error: of every access: a shard that is damaged, or another file in its place. OSError: it is gone.
    """

    def __init__(self, folder: Path, table: ShardTable):
        self.folder = folder
        self.table = table
        self._lock = threading.RLock()
        self._checked: dict[int, tuple[int, int, int, int]] = {}
        self._layouts: dict[int, _Layout] = {}
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._open: tuple[int, h5py.File] | None = None

    def __len__(self) -> int:
        return len(self.table.names)

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / self.table.names[number]

    def missing(self) -> list[str]:
        """The names of shards that are not there."""
        present = {entry.name for entry in self.folder.iterdir()}
        return [name for name in self.table.names if name not in present]

    def close(self) -> None:
        """Closes what is open; arrays that were read stay."""
        with self._lock:
            self._maps.clear()
            if self._open is not None:
                self._open[1].close()
            self._open = None

    def features(self, number: int, kind: str) -> np.ndarray:
        """The features in a shard, mapped and read-only."""
        with self._lock:
            self._check(number)
            if number not in self._maps:
                layout = self._layout(number, kind)
                self._maps[number] = np.memmap(self.path(number), layout.dtype, "r", layout.offset, layout.shape)
                if len(self._maps) > MAPPED:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(number)
            return self._maps[number]

    def _layout(self, number: int, kind: str) -> _Layout:
        """Where the features lie in a shard, which is looked up once."""
        if number not in self._layouts:
            with open_hdf5(self.path(number), again=True) as file:
                features = file[kind]["features"]
                layout = _Layout(features.id.get_offset(), features.shape, features.dtype)
            if layout.offset is None or layout.shape[0] != self.table.rows[number]:
                raise Hdf5Error(f"{self.path(number)} does not hold its features in one piece; extract again")
            self._layouts[number] = layout
        return self._layouts[number]

    def column(self, number: int, kind: str, name: str, rows: np.ndarray) -> list[np.ndarray]:
        """Some values of a column of bytes in a shard, which stays open until another one is needed."""
        with self._lock:
            self._check(number)
            if self._open is None or self._open[0] != number:
                if self._open is not None:
                    self._open[1].close()
                self._open = (number, open_hdf5(self.path(number), again=True))
            column = self._open[1][kind][name]
            if len(rows) == 1:
                return [column[int(rows[0])]]
            values = column[:]
            return [values[row] for row in rows]

    def texts(self, number: int, kind: str, name: str) -> list[str]:
        """The values of a column of text in a shard."""
        with self._lock:
            self._check(number)
            with open_hdf5(self.path(number), again=True) as file:
                values: list[str] = file[kind][name].asstr()[:].tolist()
                return values

    def _check(self, number: int) -> None:
        """Sees that a shard is the one that the manifest names, and did not change since it was last looked at."""
        path = self.path(number)
        if path.is_symlink():
            raise Hdf5Error(f"{path} is a link that leads out of the store; it is not read")
        status = which_file(path.stat())
        if self._checked.get(number) == status:
            return
        if number in self._checked:
            raise Hdf5Error(f"{path} was changed while it was in use; run the command again")
        if status[2] != self.table.sizes[number] or stated_checksum(path) != self.table.checksums[number]:
            raise Hdf5Error(
                f"{path} is not the shard that the manifest names; put that back, or remove this one and extract again"
            )
        check_bytes(path)
        self._checked[number] = status


class ShardedRows(RowsOnDisk):
    """The features of a kind in the shards of a folder, in the order of the store's rows."""

    def __init__(self, files: ShardFiles, kind: str, places: Places, row: tuple[int, ...], dtype: np.dtype):
        """``row``: the shape of a row."""
        super().__init__((len(places.shards), *row), dtype)
        self._files = files
        self._kind = kind
        self._places = places

    @property
    def is_checked(self) -> bool:
        """Always: a shard is compared with its checksum when it is first opened."""
        return True

    def _run(self, start: int, stop: int) -> np.ndarray:
        """Neighbouring rows."""
        return self._gathered(np.arange(start, stop))

    def _gathered(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, those of a shard together."""
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for number, chosen, places in self._places.by_shard(rows):
            mapped = self._files.features(number, self._kind)
            if mapped.shape[1:] != self.shape[1:] or mapped.dtype != self.dtype:
                raise Hdf5Error(f"{self._files.path(number)} holds features of another shape or type than the others")
            if chosen[-1] - chosen[0] + 1 == len(chosen):  # neighbours, which are copied once
                np.take(mapped, places, axis=0, out=values[chosen[0] : chosen[-1] + 1], mode="clip")
            else:
                values[chosen] = mapped[places]
        return values


class ShardedColumn(Sequence[bytes]):
    """Rows of bytes in the shards of a folder, in the order of the store's rows; read when they are asked for."""

    def __init__(self, files: ShardFiles, kind: str, name: str, places: Places):
        self._files = files
        self._kind = kind
        self._name = name
        self._places = places

    def __len__(self) -> int:
        return len(self._places.shards)

    @overload
    def __getitem__(self, row: int) -> bytes: ...

    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...

    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        if isinstance(row, slice):
            return self._values(np.arange(len(self))[row])
        return self._values(np.array([range(len(self))[row]]))[0]

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self), BLOCK):
            yield from self._values(np.arange(start, min(start + BLOCK, len(self))))

    def _values(self, rows: np.ndarray) -> list[bytes]:
        return [value.tobytes() for value in self.arrays(rows)]

    def arrays(self, rows: np.ndarray) -> np.ndarray:
        """Some rows as arrays of uint8, in an array of objects."""
        values = np.empty(len(rows), object)
        for number, chosen, places in self._places.by_shard(rows):
            read = self._files.column(number, self._kind, self._name, places)
            for place, value in zip(chosen.tolist(), read, strict=True):
                values[place] = value
        return values
