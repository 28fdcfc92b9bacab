"""Shards: small HDF5 files of finished rows, and rows by their keys wherever they lie, in shards or in a store."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from onceover.base.addresses import Address, is_address
from onceover.base.files import write_once
from onceover.base.formats import STORE_FORMAT
from onceover.base.hdf5 import hdf5_bytes, open_hdf5, stated_checksum, write_column
from onceover.extract.ledger import Failure
from onceover.extract.sharded import alike
from onceover.extract.store import (
    KEYS,
    KINDS,
    NOT_COUNTED,
    FeatureStore,
    read_failures,
    readable,
    row_blocks,
    stamp,
    strings,
    write_failures,
)

#: columns of whole numbers that files of earlier versions lack, by kind; a row of such a file has ``NOT_COUNTED`` there
LATER_COLUMNS = {"image": (), "text": ("unknown", "tokens")}
_COUNT = ((), np.dtype(np.int32))  # the row shape and type of such a column
_ROW_BITS = 36  # of a place, that count the row; the others count files
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
    """Where rows lie that are in shards already.

    Attributes:
        numbers: of the shard of each row, −1 of one that lies in a store of one file. rows: of each row in its shard.
    """

    shards: list[KeptShard]
    numbers: np.ndarray
    rows: np.ndarray


class RowSources:
    """Rows of one kind that were computed before, found by key, in shards and earlier stores.

    Only files whose features carry ``fingerprint`` and that hold all ``columns`` are used.

    Attributes:
        copied: the names of all columns that ``blocks`` gives.
    """

    def __init__(self, kind: str, fingerprint: str, columns: tuple[str, ...]):
        self.kind = kind
        self.fingerprint = fingerprint
        self.columns = columns
        self.copied = ("features", *columns, *LATER_COLUMNS[kind])
        self._paths: list[Path] = []
        self._files: list[_ShardRows | _StoreRows] = []
        self._where: dict[str, int] = {}  # the number of the file, and in the lower bits that of the row in it
        self.keys_by_stat: dict[tuple[str, int, int], str] = {}
        self.failures: dict[str, Failure] = {}

    def __reduce__(self) -> tuple:
        return _row_sources, (self.kind, self.fingerprint, self.columns, self._paths)

    def __contains__(self, key: str | None) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

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
        if not len(rows.keys) or any(name not in rows.columns for name in self.columns):
            return
        for row, key in zip(rows.numbers, rows.keys, strict=True):
            self._where.setdefault(key, len(self._files) << _ROW_BITS | row)
        self.keys_by_stat |= dict(zip(rows.stats, rows.keys, strict=False))
        rows.forget()
        self._files.append(rows)

    def blocks(self, keys: list[str]) -> Iterator[dict[str, np.ndarray]]:
        """The columns of the rows with ``keys``, in their order, a block at a time; an empty one for no rows."""
        if not keys:
            yield {name: np.zeros((0, *shape), dtype) for name, (shape, dtype) in self.row_shapes().items()}
        for rows in row_blocks(len(keys)):
            yield self.gather(self.copied, keys[rows])

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

    def gather(self, names: Sequence[str], keys: list[str]) -> dict[str, np.ndarray]:
        """The values of some columns in the rows with ``keys``, by the columns' names.

        One file is open at a time: there can be more than a process may open.
        """
        files, in_file = self._places(keys)
        blocks: dict[str, np.ndarray] = {}
        for number, chosen in alike(files):
            rows, inverse = np.unique(in_file[chosen], return_inverse=True)
            for name, values in self._files[number].read(names, rows).items():
                if name not in blocks:
                    blocks[name] = np.empty((len(keys), *values.shape[1:]), dtype=values.dtype)
                blocks[name][chosen] = values[inverse]
        return blocks

    def placed(self, keys: list[str], place: Path | Address) -> PlacedRows:
        """Where the rows with ``keys`` lie, as far as they are in shards that hold just the columns that are copied.

        ``place``: of the store that is written; the shards of another store are not shared.
        """
        files, in_file = self._places(keys)
        shards: list[KeptShard] = []
        numbers = np.full(len(keys), -1)
        rows = np.zeros(len(keys), np.int64)
        for number, chosen in alike(files):
            file = self._files[number]
            if ("thumbnail" in file.columns) != ("thumbnail" in self.copied):
                continue
            if isinstance(file, _ShardRows):
                numbers[chosen] = len(shards)
                rows[chosen] = in_file[chosen]
                shards.append(KeptShard(file.path, file.count, file.path.stat().st_size, stated_checksum(file.path)))
            elif file.store.shards is not None and file.store.path == place:
                in_store = file.store.places(self.kind)
                numbers[chosen] = len(shards) + in_store.shards[in_file[chosen]]
                rows[chosen] = in_store.rows[in_file[chosen]]
                table = file.store.shards.table
                described = zip(table.names, table.rows.tolist(), table.sizes.tolist(), table.checksums, strict=True)
                shards += [KeptShard(place / name, *values) for name, *values in described]
        return PlacedRows(shards, numbers, rows)

    def _places(self, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The number of the file of each key, and the row in it: int64 (n,) both."""
        places = np.fromiter((self._where[key] for key in keys), np.int64, len(keys))
        return places >> _ROW_BITS, places & (2**_ROW_BITS - 1)


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
        count: how many rows it has.
        numbers: of its rows; keys: of the same; stats: of images, their ids with the sizes and times of their files.
    """

    def __init__(self, path: Path, kind: str, file: h5py.File):
        """``file``: the shard, open for a moment."""
        self.path = Path(path)
        self._kind = kind
        self.fingerprint = ""
        self.count = 0
        self.failures: list[Failure] = []
        self.columns: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self.numbers: Sequence[int] = ()
        self.keys: list[str] = []
        self.stats: list[tuple[str, int, int]] = []
        if kind not in file:
            return
        group = file[kind]
        self.fingerprint = group["features"].attrs["fingerprint"]
        self.failures = read_failures(file)
        self.columns = {name: (column.shape[1:], column.dtype) for name, column in group.items()}
        self.count = len(group["features"])
        if self.count:
            self.keys = strings(group[KEYS[kind]])
            self.numbers = range(self.count)
        if self.count and kind == "image":
            columns = (strings(group["id"]), group["size"][:].tolist(), group["mtime_ns"][:].tolist())
            self.stats = list(zip(*columns, strict=True))

    def forget(self) -> None:
        """Frees what was only needed to find rows."""
        self.numbers = ()
        self.keys = []
        self.stats = []

    def read(self, names: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows of some columns, in ascending order, by the columns' names; what it lacks was not counted in it."""
        values = {}
        with readable(self.path), open_hdf5(self.path, again=True) as file:
            group = file[self._kind]
            for name in names:
                values[name] = group[name][rows] if name in group else np.full(len(rows), NOT_COUNTED, np.int32)
        return values


class _StoreRows:
    """The rows of a store, with the attributes of a shard's; those of features are checked as they are read.

    Rows of shards that are missing are left out, so that they are encoded again.
    """

    def __init__(self, path: Path, kind: str):
        self.store = FeatureStore(path, mend=True)
        self._kind = kind
        self.fingerprint = self.store.fingerprints[kind]
        self.failures = self.store.failures
        self.columns = self.store.row_shapes(kind)
        self.keys = self.store.sha256 if kind == "image" else self.store.captions
        self.stats: list[tuple[str, int, int]] = []
        if kind == "image":
            sizes, times = self.store.image_stats()
            self.stats = list(zip(self.store.image_ids, sizes.tolist(), times.tolist(), strict=True))
        self.numbers: Sequence[int] = range(len(self.keys))
        if self.store.missing_shards():
            self._leave_out_missing()

    def _leave_out_missing(self) -> None:
        """Leaves out the rows of shards that are missing."""
        assert self.store.shards is not None
        missing = set(self.store.missing_shards())
        is_there = np.array([name not in missing for name in self.store.shards.table.names])
        numbers = np.flatnonzero(is_there[self.store.places(self._kind).shards]).tolist()
        self.keys = [self.keys[number] for number in numbers]
        if self.stats:
            self.stats = [self.stats[number] for number in numbers]
        self.numbers = numbers

    def forget(self) -> None:
        """Frees what was only needed to find rows."""
        self.numbers = ()
        self.keys = []
        self.stats = []
        self.store.forget()

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
