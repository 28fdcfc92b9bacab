"""Shards: small HDF5 files of finished rows, and rows by their keys wherever they lie, in shards or in a store."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from onceover.base.files import write_once
from onceover.base.formats import STORE_FORMAT
from onceover.base.hdf5 import fill, hdf5_bytes, open_hdf5, write_column
from onceover.extract.ledger import Failure
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
_SHARD = re.compile(r"(image|text)-[0-9a-f]{12}-\d{5,}\.h5")


def kept_folder(path: str | Path) -> Path:
    """Where features lie, as shards, of rows that a store had and its dataset has no more."""
    return Path(f"{path}.kept")


def shard_files(parts: Path, kind: str = "") -> list[Path]:
    """The shards in the folder of an unfinished store, of one kind or of both, in their order."""
    if not parts.is_dir():
        return []
    return sorted(file for file in parts.iterdir() if _SHARD.fullmatch(file.name) and file.name.startswith(kind))


class RowSources:
    """Rows of one kind that were computed before, found by key, in shards and an earlier store.

    Only files whose features carry ``fingerprint`` and that hold all ``columns`` are used.

    Attributes:
        copied: the names of all columns that ``copy`` writes.
    """

    def __init__(self, kind: str, fingerprint: str, columns: tuple[str, ...]):
        self.kind = kind
        self.fingerprint = fingerprint
        self.columns = columns
        self.copied = ("features", *columns, *LATER_COLUMNS[kind])
        self._paths: list[Path] = []
        self._files: list[_RowFile] = []
        self._where: dict[str, tuple[int, int]] = {}
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
        with readable(path), open_hdf5(path) as file:
            group = file.get(self.kind)
            if group is None or group["features"].attrs["fingerprint"] != self.fingerprint:
                return
            self.failures |= {failure.id: failure for failure in read_failures(file) if failure.stage == self.kind}
            if not len(group["features"]) or any(name not in group for name in self.columns):
                return
            rows = _RowFile(path, group, self.copied)
            for row, key in enumerate(strings(group[KEYS[self.kind]])):
                self._where.setdefault(key, (len(self._files), row))
            if self.kind == "image":
                stats = zip(strings(group["id"]), group["size"][:].tolist(), group["mtime_ns"][:].tolist(), strict=True)
                self.keys_by_stat |= dict(zip(stats, strings(group["sha256"]), strict=True))
            self._files.append(rows)

    def copy(self, keys: list[str], group: h5py.Group) -> None:
        """Writes the columns of the rows with ``keys``, in their order, into new datasets of ``group``."""
        if not keys and not self._files:  # a store of the other kind alone
            group["features"] = np.zeros((0, 0, 0) if self.kind == "image" else (0, 0), np.float32)
            group["truncated"] = np.zeros(0, bool)
            return
        for name in self.copied:
            shape, dtype = self._files[0].columns[name]
            group.create_dataset(name, (len(keys), *shape), dtype=dtype)
        for rows in row_blocks(len(keys)):
            for name, values in self.gather(self.copied, keys[rows]).items():
                fill(group[name], rows, values)

    def gather(self, names: Sequence[str], keys: list[str]) -> dict[str, np.ndarray]:
        """The values of some columns in the rows with ``keys``, by the columns' names.

        One file is open at a time: there can be more than a process may open.
        """
        places = np.array([self._where[key] for key in keys])
        blocks: dict[str, np.ndarray] = {}
        for number in np.unique(places[:, 0]):
            chosen = np.flatnonzero(places[:, 0] == number)
            rows, inverse = np.unique(places[chosen, 1], return_inverse=True)
            for name, values in self._files[number].read(names, rows).items():
                if name not in blocks:
                    blocks[name] = np.empty((len(keys), *values.shape[1:]), dtype=values.dtype)
                blocks[name][chosen] = values[inverse]
        return blocks


def _row_sources(kind: str, fingerprint: str, columns: tuple[str, ...], paths: list[Path]) -> RowSources:
    """The rows of some files; sources are pickled as their files' paths."""
    sources = RowSources(kind, fingerprint, columns)
    for path in paths:
        sources.add(path)
    return sources


class _RowFile:
    """A shard, which is checked whole when it is added, or a store, whose rows are checked as they are read.

    A shard is opened anew for each read: there can be more of them than a process may have open.

    Attributes:
        columns: by name, the shape of a row and the dtype.
    """

    def __init__(self, path: Path, group: h5py.Group, copied: Sequence[str]):
        """``copied``: the names of its columns; what it lacks is not counted in it."""
        self.columns: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for name in copied:
            column = group.get(name)
            self.columns[name] = ((), np.dtype(np.int32)) if column is None else (column.shape[1:], column.dtype)
        self._path = Path(path)
        self._kind = group.name.strip("/")
        self._store: FeatureStore | None = None
        if group.file.attrs.get("format") == STORE_FORMAT:
            self._store = FeatureStore(path)

    def read(self, names: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows of some columns, in ascending order, by the columns' names."""
        values = {}
        with readable(self._path), open_hdf5(self._path, again=True) as file:
            group = file[self._kind]
            for name in names:
                if self._store is not None and name == "features":
                    values[name] = self._store.features(self._kind)[rows]
                elif name in group:
                    values[name] = group[name][rows]
                else:
                    values[name] = np.full(len(rows), NOT_COUNTED, np.int32)
        return values


def write_shard(path: Path, kind: str, columns: dict, recipe: dict, failures: Iterable[Failure]) -> None:
    """Writes finished rows as one small HDF5 file, whole or not at all; one that is there already stays.

    ``columns``: name -> array or list, among them ``features``, which gets the recipe. Zero rows are allowed: a shard
    whose records all failed keeps their ledger.
    """

    def fill_file(file: h5py.File) -> None:
        group = file.create_group(kind)
        for name, values in columns.items():
            write_column(group, name, values)
        stamp(group["features"], recipe, {})
        write_failures(file, failures)

    write_once(path, hdf5_bytes(fill_file))  # not by HDF5, so that a full disk fails in a plain write


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
