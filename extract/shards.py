"""Shards: small HDF5 files of finished rows, and rows by their keys wherever they lie, in shards or in a store."""

import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from onceover.base.addresses import Address, is_address
from onceover.base.files import write_once
from onceover.base.formats import STORE_FORMAT
from onceover.base.hdf5 import hdf5_bytes, open_hdf5, stated_checksum, write_column
from onceover.base.temporary import IN_MEMORY, temporary_array
from onceover.base.texts import ChosenTexts, Texts, text_column
from onceover.extract.key_index import KeyIndex
from onceover.extract.ledger import Failure
from onceover.extract.sharded import Places, alike
from onceover.extract.store import (
    KEYS,
    KINDS,
    NOT_COUNTED,
    FeatureStore,
    read_failures,
    readable,
    row_blocks,
    rows_of,
    stamp,
    strings,
    write_failures,
)

#: columns of whole numbers that files of earlier versions lack, by kind; a row of such a file has ``NOT_COUNTED`` there
LATER_COLUMNS = {"image": (), "text": ("unknown", "tokens")}
_COUNT = ((), np.dtype(np.int32))  # the row shape and type of such a column
_PLACED = 2**14  # rows whose places are found at a time
_SHARD = re.compile(r"(image|text)-[0-9a-f]{12}-\d{5,}\.h5")


def kept_folder(path: str | Path) -> Path:
    """Where features lie, as shards, of rows that a store had and its dataset has no more."""
    return Path(f"{path}.kept")


def shard_files(parts: Path, kind: str = "") -> list[Path]:
    """The shards in the folder of an unfinished store, of one kind or of both, in their order."""
    if not parts.is_dir():
        return []
    return sorted(file for file in parts.iterdir() if _SHARD.fullmatch(file.name) and file.name.startswith(kind))


class KeptShard(NamedTuple):
    """A shard that is there already; ``checksum`` is the one behind its end, None of a shard of an earlier version."""

    file: Path | Address
    rows: int
    size: int
    checksum: str | None


class PlacedRows(NamedTuple):
    """The shard of each row that lies in one already; where there are many rows, the arrays lie in temporary files.

    Attributes:
        shards: those that hold any of them, by number. used: how many different ones each shard holds, int64.
        positions: of each row, int64.
        numbers: of the shard of each row, −1 of one that lies in a store of one file. rows: of each row in its shard.
            Both are int32.
    """

    shards: dict[int, KeptShard]
    used: np.ndarray
    positions: np.ndarray
    numbers: np.ndarray
    rows: np.ndarray


class RowSources:
    """Rows of one kind that were computed before, found by key, in shards and earlier stores.

    A row has a *position*: its number among the rows of all files, in the order in which files were added. Only files
    whose features carry ``fingerprint`` and that hold all ``columns`` are used.

    Attributes:
        copied: the names of all columns that ``blocks`` gives.
        contents: of images, the key at each position; of captions nothing.
        failures: the records of images that could not be encoded, by their ids.
    """

    def __init__(self, kind: str, fingerprint: str, columns: tuple[str, ...]):
        self.kind = kind
        self.fingerprint = fingerprint
        self.columns = columns
        self.copied = ("features", *columns, *LATER_COLUMNS[kind])
        self.contents = Texts()
        self.failures: dict[str, Failure] = {}
        self._paths: list[Path] = []
        self._files: list[_ShardRows | _StoreRows] = []
        self._starts = array("q", [0])  # the position of the first row of each file, and of the file that is added next
        self._by_key = KeyIndex()
        self._by_stat = KeyIndex()

    def __reduce__(self) -> tuple:
        return _row_sources, (self.kind, self.fingerprint, self.columns, self._paths)

    def __contains__(self, key: str) -> bool:
        return bool(self.find([key])[0] >= 0)

    def __len__(self) -> int:
        return len(self.positions())

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def add(self, path: Path) -> None:
        """Adds the rows of a shard or store, unless they are of other features.

        Raises:
            StoreError: a damaged file.
        """
        self._paths.append(path)
        rows = _rows_in(path, self.kind)
        if rows.fingerprint != self.fingerprint:
            return
        self.failures |= {failure.id: failure for failure in rows.failures if failure.stage == self.kind}
        if not len(rows.numbers) or any(name not in rows.columns for name in self.columns):
            return
        positions = self._starts[-1] + rows.numbers
        self._by_key.add(ChosenTexts(text_column(rows.keys), rows.numbers), positions)
        if self.kind == "image":
            ids = ChosenTexts(text_column(rows.ids), rows.numbers)
            self._by_stat.add(_stat_keys(ids, rows.stats[rows.numbers]), positions)
            self.contents.extend(rows.keys)
        rows.forget()
        if self._files and rows.columns == self._files[-1].columns:
            rows.columns = self._files[-1].columns  # one object for all shards
        self._files.append(rows)
        self._starts.append(self._starts[-1] + rows.count)

    def positions(self) -> np.ndarray:
        """The positions of all rows of different keys, int64 (n,), ascending: of each key the first."""
        return self._by_key.firsts()

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """The position of the row with each of some keys, int64 (n,), the first of several; −1 where there is none."""
        return self._by_key.first(keys)

    def find_by_stat(self, ids: Sequence[str], stats: np.ndarray) -> np.ndarray:
        """The position of each of some images by its id and its file's size and time, the last of several, or −1.

        Args:
            stats: int64 (n, 2), sizes and modification times.

        Returns:
            int64 (n,)
        """
        positions = np.full(len(ids), -1, np.int64)
        for rows in row_blocks(len(ids)):
            positions[rows] = self._by_stat.last(list(_stat_keys(ids[rows], stats[rows])))
        return positions

    def forget_stats(self) -> None:
        """Frees the memory of what ``find_by_stat`` finds rows by; it finds none any more."""
        self._by_stat = KeyIndex()

    def blocks(self, keys: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """The columns of the rows with ``keys``, in their order, a block at a time; an empty one for no rows.

        Raises:
            KeyError: there is no such row.
        """
        if not keys:
            yield {name: np.zeros((0, *shape), dtype) for name, (shape, dtype) in self.row_shapes().items()}
        for rows in row_blocks(len(keys)):
            yield self.gather(self.copied, self.find(keys[rows]))

    def nbytes(self, rows: int) -> int:
        """The bytes of the features of so many rows."""
        shape, dtype = self.row_shapes()["features"]
        return rows * math.prod(shape) * dtype.itemsize

    def row_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The shape of a row and the type of each column that ``blocks`` gives; of no width where there are no rows."""
        if self._files:
            return {name: self._files[0].columns.get(name, _COUNT) for name in self.copied}
        if self.kind == "image":  # a store of the other kind alone
            return {"features": ((0, 0), np.dtype(np.float32))}
        return {"features": ((0,), np.dtype(np.float32)), "truncated": ((), np.dtype(bool))}

    def gather(self, names: Sequence[str], positions: np.ndarray) -> dict[str, np.ndarray]:
        """The values of some columns in the rows at ``positions``, by the columns' names.

        One file is open at a time: there can be more than a process may open.

        Raises:
            KeyError: a position of −1.
        """
        blocks: dict[str, np.ndarray] = {}
        for number, chosen, in_file in self._by_file(positions):
            rows, inverse = np.unique(in_file, return_inverse=True)
            for name, values in self._files[number].read(names, rows).items():
                if name not in blocks:
                    blocks[name] = np.empty((len(positions), *values.shape[1:]), dtype=values.dtype)
                blocks[name][chosen] = values[inverse]
        return blocks

    def placed(self, keys: Sequence[str], place: Path | Address) -> PlacedRows:
        """Finds the shard of each row with ``keys``; only shards count that hold just the columns that are copied.

        ``place``: of the store that is written; the shards of another store are not shared.

        Raises:
            KeyError: there is no such row. TemporaryFileError: there is no room.
        """
        has_thumbnails = "thumbnail" in self.copied
        counts = []
        for file in self._files:
            is_like_these = ("thumbnail" in file.columns) == has_thumbnails
            counts.append(file.shard_count(place) if is_like_these else 0)
        firsts = np.cumsum([0, *counts])  # the number of the first shard of each file
        is_used = temporary_array((self._starts[-1],), bool, IN_MEMORY)
        is_used[:] = False
        used = np.zeros(firsts[-1], np.int64)
        all_positions = temporary_array((len(keys),), np.int64, IN_MEMORY)
        all_numbers = temporary_array((len(keys),), np.int32, IN_MEMORY)
        all_rows = temporary_array((len(keys),), np.int32, IN_MEMORY)
        for block in row_blocks(len(keys), _PLACED):
            positions = self.find(keys[block])
            numbers = np.full(len(positions), -1, np.int32)
            rows = np.zeros(len(positions), np.int32)
            for number, chosen, in_file in self._by_file(positions):
                if not counts[number]:
                    continue
                in_shards = self._files[number].places(in_file)
                numbers[chosen] = firsts[number] + in_shards.shards
                rows[chosen] = in_shards.rows
            is_new = (numbers >= 0) & ~is_used[positions]
            _, firsts_of_new = np.unique(positions[is_new], return_index=True)
            np.add.at(used, numbers[is_new][firsts_of_new], 1)
            is_used[positions] = True
            all_positions[block] = positions
            all_numbers[block] = numbers
            all_rows[block] = rows
        shards = {}
        for shard in np.flatnonzero(used).tolist():
            number = int(np.searchsorted(firsts, shard, "right")) - 1
            shards[shard] = self._files[number].kept_shard(shard - int(firsts[number]))
        return PlacedRows(shards, used, all_positions, all_numbers, all_rows)

    def _by_file(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Some positions, file by file: the file's number, which of ``positions`` are in it, and their rows there.

        Raises:
            KeyError: a position of −1.
        """
        if missing := np.count_nonzero(positions < 0):
            raise KeyError(f"{missing:,} {self.kind} rows are in no source")
        starts = np.frombuffer(self._starts, np.int64)
        for number, chosen in alike(np.searchsorted(starts, positions, "right") - 1):
            yield number, chosen, positions[chosen] - starts[number]


def _stat_keys(ids: Iterable[str], stats: np.ndarray) -> Iterator[str]:
    """What an image is found by without reading it: its id and its file's size and time, as one text."""
    for name, (size, mtime_ns) in zip(ids, stats, strict=True):
        yield f"{size} {mtime_ns} {name}"


def _row_sources(kind: str, fingerprint: str, columns: tuple[str, ...], paths: list[Path]) -> RowSources:
    """The rows of some files; sources are pickled as their files' paths."""
    sources = RowSources(kind, fingerprint, columns)
    for path in paths:
        sources.add(path)
    return sources


def _rows_in(path: Path, kind: str) -> "_ShardRows | _StoreRows":
    """The rows of a kind in a shard or a store.

    Raises:
        StoreError: a damaged file.
    """
    if is_address(path) or path.is_dir():
        return _StoreRows(path, kind)
    with readable(path), open_hdf5(path) as file:
        if file.attrs.get("format") != STORE_FORMAT:
            return _ShardRows(path, kind, file)
    return _StoreRows(path, kind)


class _ShardRows:
    """The rows of a shard, which was checked whole; it is opened anew for each read: there can be very many.

    Attributes:
        fingerprint: of its features; empty where it has none of the kind. failures: its part of the ledger.
        columns: by name, the shape of a row and the type.
        count: how many rows it has. numbers: of those that can be read, int64.
        keys: of all rows. ids, stats: of all images, their ids, and the sizes and times of their files, int64 (n, 2).
    """

    def __init__(self, path: Path, kind: str, file: h5py.File):
        """``file``: the shard, open for a moment."""
        self.path = path
        self._kind = kind
        self.fingerprint = ""
        self.count = 0
        self.failures: list[Failure] = []
        self.columns: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self.numbers = np.zeros(0, np.int64)
        self.keys: Sequence[str] = []
        self.ids: Sequence[str] = []
        self.stats = np.zeros((0, 2), np.int64)
        if kind not in file:
            return
        group = file[kind]
        self.fingerprint = group["features"].attrs["fingerprint"]
        self.failures = read_failures(file)
        self.columns = {name: (column.shape[1:], column.dtype) for name, column in group.items()}
        self.count = len(group["features"])
        self.numbers = np.arange(self.count)
        if self.count:
            self.keys = strings(group[KEYS[kind]])
        if self.count and kind == "image":
            self.ids = strings(group["id"])
            self.stats = np.stack([group["size"][:], group["mtime_ns"][:]], axis=1)

    def forget(self) -> None:
        """Frees what was only needed to find rows."""
        self.numbers = np.zeros(0, np.int64)
        self.keys = []
        self.ids = []
        self.stats = np.zeros((0, 2), np.int64)

    def shard_count(self, _place: Path | Address) -> int:
        """How many shards a store at a place can keep of this file: the file itself."""
        return 1

    def places(self, rows: np.ndarray) -> Places:
        """The shard of each of some rows, by its number in this file, and the row in it."""
        return Places(np.zeros(len(rows), np.int32), rows)

    def kept_shard(self, _number: int) -> KeptShard:
        """The shard, by its number in this file."""
        return KeptShard(self.path, self.count, self.path.stat().st_size, stated_checksum(self.path))

    def read(self, names: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows of some columns, in ascending order, by the columns' names; what it lacks was not counted in it."""
        values = {}
        with readable(self.path), open_hdf5(self.path, again=True) as file:
            group = file[self._kind]
            for name in names:
                values[name] = (
                    rows_of(group[name], rows) if name in group else np.full(len(rows), NOT_COUNTED, np.int32)
                )
        return values


class _StoreRows:
    """The rows of a store, with the attributes of a shard's; those of features are checked as they are read.

    Rows of shards that are missing cannot be read, so that they are encoded again.
    """

    def __init__(self, path: Path, kind: str):
        self.store = FeatureStore(path, mend=True)
        self._kind = kind
        self.fingerprint = self.store.fingerprints[kind]
        self.failures = self.store.failures
        self.columns = self.store.row_shapes(kind)
        self.keys: Sequence[str] = self.store.sha256 if kind == "image" else self.store.captions
        self.count = len(self.keys)
        self.numbers = np.arange(self.count)
        self.ids: Sequence[str] = []
        self.stats = np.zeros((0, 2), np.int64)
        if kind == "image":
            self.ids = self.store.image_ids
            self.stats = np.stack(self.store.image_stats(), axis=1)
        if self.store.missing_shards():
            self.numbers = self._present()

    def _present(self) -> np.ndarray:
        """The rows whose shards are there."""
        assert self.store.shards is not None
        missing = set(self.store.missing_shards())
        is_there = np.array([name not in missing for name in self.store.shards.table.names])
        return np.flatnonzero(is_there[self.store.places(self._kind).shards])

    def forget(self) -> None:
        """Frees what was only needed to find rows."""
        self.numbers = np.zeros(0, np.int64)
        self.keys = Texts()
        self.ids = []
        self.stats = np.zeros((0, 2), np.int64)
        self.store.forget()

    def shard_count(self, place: Path | Address) -> int:
        """How many shards a store at a place can keep of this store: all its own, where it is the same folder."""
        if self.store.shards is None or self.store.path != place:
            return 0
        return len(self.store.shards.table.names)

    def places(self, rows: np.ndarray) -> Places:
        """The shard of each of some rows, by its number in this store, and the row in it."""
        places = self.store.places(self._kind)
        return Places(places.shards[rows], places.rows[rows])

    def kept_shard(self, number: int) -> KeptShard:
        """A shard, by its number in this store."""
        assert self.store.shards is not None, "else it has none to keep"
        table = self.store.shards.table
        rows = int(table.rows[number])
        return KeptShard(self.store.path / table.names[number], rows, int(table.sizes[number]), table.checksums[number])

    def read(self, names: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows of some columns, by the columns' names; what it lacks was not counted in it."""
        return {name: self.store.column(self._kind, name, rows) for name in names}


def write_shard(path: Path, kind: str, columns: dict, recipe: dict, failures: Iterable[Failure]) -> None:
    """Writes a shard as ``shard_bytes`` makes it, whole or not at all; one that is there already stays."""
    write_once(path, shard_bytes(kind, columns, recipe, failures))


def shard_bytes(kind: str, columns: dict, recipe: dict, failures: Iterable[Failure]) -> bytes:
    """A shard of finished rows: a small HDF5 file, made in memory so that a full disk fails in a plain write.

    ``columns``: name -> array or list, among them ``features``, which gets the recipe. Zero rows are allowed: a shard
    whose records all failed keeps their ledger.
    """

    def fill_file(file: h5py.File) -> None:
        group = file.create_group(kind)
        for name, values in columns.items():
            write_column(group, name, values)
        stamp(group["features"], recipe, {})
        write_failures(file, failures)

    return hdf5_bytes(fill_file)


def describe_shard(path: Path) -> tuple[str, str, list[str]]:
    """A shard's kind, the fingerprint of its features, and the keys of its rows.

    Raises:
        StoreError: a damaged shard.
    """
    with readable(path), open_hdf5(path) as file:
        kind = next(kind for kind in KINDS if kind in file)
        group = file[kind]
        return kind, group["features"].attrs["fingerprint"], strings(group[KEYS[kind]])


def shard_failures(path: Path) -> list[Failure]:
    """The rows that could not be encoded when a shard was made.

    Raises:
        StoreError: a damaged shard.
    """
    with readable(path), open_hdf5(path) as file:
        return read_failures(file)
