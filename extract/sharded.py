"""Features and thumbnails of a store that is a folder: they lie in its shards, which are mapped when rows are read.

A shard is compared with its checksum in the manifest when it is first opened; it never changes afterwards. Of a store
at an address copies are read, which are fetched when they are first needed, and again where they were removed.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import h5py
import numpy as np

from onceover.base.cache import note_use
from onceover.base.columns import LazyColumn
from onceover.base.hdf5 import Hdf5Error, RowsOnDisk, check_bytes, open_hdf5, stated_checksum, which_file
from onceover.extract.remote import RemoteFolder

Result = TypeVar("Result")

MAPPED = 64  # shards that are mapped at a time; each holds a file open
_TRIES = 5  # to read a copy that other processes may remove
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
        places = self.rows[rows]
        for number, chosen in alike(self.shards[rows]):
            yield number, chosen, places[chosen]


def alike(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each different number, ascending, with the positions at which it stands."""
    order = np.argsort(numbers, kind="stable")
    for chosen in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        if len(chosen):
            yield int(numbers[chosen[0]]), chosen


class _Layout(NamedTuple):
    """Where features lie in the file of a shard, in bytes from its beginning, and how they look."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class ShardFiles:
    """The shards of a folder, opened and checked when they are first needed. From several threads at will.

    Raises:
        Hdf5Error: of every access: a shard that is damaged, or another file in its place. OSError: it is gone.
        AddressError, RemoteError: it cannot be fetched.
    """

    def __init__(self, folder: Path, table: ShardTable, remote: RemoteFolder | None = None):
        """``remote``: the folder at an address whose copies lie in ``folder``."""
        self.folder = folder
        self.table = table
        self._remote = remote
        self._lock = threading.RLock()
        self._checked: dict[int, tuple[int, int, int, int]] = {}
        self._layouts: dict[int, _Layout] = {}
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._open: tuple[int, h5py.File] | None = None

    def __len__(self) -> int:
        return len(self.table.names)

    @property
    def is_remote(self) -> bool:
        """Whether they lie at an address, and copies of them are read."""
        return self._remote is not None

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / self.table.names[number]

    def missing(self) -> list[str]:
        """The names of shards that are not there, as far as that can be told: a web server lists none."""
        if self._remote is None:
            present = {entry.name for entry in self.folder.iterdir()}
        elif self._remote.address.lists:
            present = set(self._remote.sizes())
        else:
            return []
        return [name for name in self.table.names if name not in present]

    def fetch(self, numbers: np.ndarray) -> None:
        """Fetches those of some shards that are not on this machine, several at a time."""
        assert self._remote is not None
        self._remote.fetch(self.table.names[number] for number in numbers)

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
            if self._remote is None or number not in self._maps:
                self._maps[number] = self._checked_first(number, lambda: self._mapped(number, kind))
                if len(self._maps) > MAPPED:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(number)
            return self._maps[number]

    def _mapped(self, number: int, kind: str) -> np.ndarray:
        if number in self._maps:
            return self._maps[number]
        layout = self._layout(number, kind)
        return np.memmap(self.path(number), layout.dtype, "r", layout.offset, layout.shape)

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
            if self._open is None or self._open[0] != number:
                opened = self._checked_first(number, lambda: open_hdf5(self.path(number), again=True))
                if self._open is not None:
                    self._open[1].close()
                self._open = (number, opened)
            elif self._remote is None:
                self._check(number)
            column = self._open[1][kind][name]
            if len(rows) == 1:
                return [column[int(rows[0])]]
            values = column[:]
            return [values[row] for row in rows]

    def texts(self, number: int, kind: str, name: str) -> list[str]:
        """The values of a column of text in a shard."""
        with self._lock:
            opened = self._checked_first(number, lambda: open_hdf5(self.path(number), again=True))
            with opened as file:
                values: list[str] = file[kind][name].asstr()[:].tolist()
                return values

    def _checked_first(self, number: int, work: Callable[[], Result]) -> Result:
        """The result of ``work`` on a shard that was checked; again, where a copy was removed in between."""
        for _ in range(_TRIES - 1):
            try:
                self._check(number)
                return work()
            except FileNotFoundError:
                if self._remote is None:
                    raise
        self._check(number)
        return work()

    def _check(self, number: int) -> None:
        """Sees that a shard is the one that the manifest names, and did not change since it was last looked at."""
        path = self.path(number)
        if path.is_symlink():
            raise Hdf5Error(f"{path} is a link that leads out of the store; it is not read")
        if self._remote is not None:
            self._check_copy(number, self._remote)
            return
        status = which_file(path.stat())
        if self._checked.get(number) == status:
            return
        if number in self._checked:
            raise Hdf5Error(f"{path} was changed while it was in use; run the command again")
        self._compare(path, number)
        self._checked[number] = status

    def _check_copy(self, number: int, remote: RemoteFolder) -> None:
        """The same of a copy, which is fetched where it is missing, and again where it is damaged."""
        name = self.table.names[number]
        path = self.path(number)
        remote.fetch([name])
        status = which_file(path.stat())
        if self._checked.get(number) == status:
            return
        note_use(path)
        try:
            self._compare(path, number)
        except Hdf5Error:
            remote.fetch_again(name)
            status = which_file(path.stat())
            try:
                self._compare(path, number)
            except Hdf5Error as error:
                raise Hdf5Error(
                    f"{remote.address / name} is damaged, or not the shard that the manifest names; remove it and "
                    "extract again"
                ) from error
        self._checked[number] = status

    def _compare(self, path: Path, number: int) -> None:
        """Compares a shard with what the manifest says of it."""
        status = which_file(path.stat())
        if status[2] != self.table.sizes[number] or stated_checksum(path) != self.table.checksums[number]:
            raise Hdf5Error(
                f"{path} is not the shard that the manifest names; put that back, or remove this one and extract again"
            )
        check_bytes(path)


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
        if self._files.is_remote:
            self._files.fetch(np.unique(self._places.shards[rows]))
        for number, chosen, places in self._places.by_shard(rows):
            mapped = self._files.features(number, self._kind)
            if mapped.shape[1:] != self.shape[1:] or mapped.dtype != self.dtype:
                raise Hdf5Error(f"{self._files.path(number)} holds features of another shape or type than the others")
            if chosen[-1] - chosen[0] + 1 == len(chosen):  # neighbours, which are copied once
                np.take(mapped, places, axis=0, out=values[chosen[0] : chosen[-1] + 1], mode="clip")
            else:
                values[chosen] = mapped[places]
        return values


class ShardedColumn(LazyColumn[bytes]):
    """Rows of bytes in the shards of a folder, in the order of the store's rows; read when they are asked for."""

    def __init__(self, files: ShardFiles, kind: str, name: str, places: Places):
        self._files = files
        self._kind = kind
        self._name = name
        self._places = places

    def __len__(self) -> int:
        return len(self._places.shards)

    def values_of(self, rows: Iterable[int]) -> Iterator[bytes]:
        """The values of rows that are given by their numbers, from 0."""
        waiting = iter(rows)
        while block := list(islice(waiting, BLOCK)):
            for value in self.arrays(np.array(block)):
                yield value.tobytes()

    def arrays(self, rows: np.ndarray) -> np.ndarray:
        """Some rows as arrays of uint8, in an array of objects."""
        values = np.empty(len(rows), object)
        for number, chosen, places in self._places.by_shard(rows):
            read = self._files.column(number, self._kind, self._name, places)
            for place, value in zip(chosen.tolist(), read, strict=True):
                values[place] = value
        return values
