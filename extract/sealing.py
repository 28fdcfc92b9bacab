"""Writes a finished store: one file, into which all rows are copied, or a folder that keeps the shards.

A store at an address is written as a folder of this machine first, without the shards that are at the address already.

Whatever was there stays until the new store is complete: a file appears by one rename, and a folder's manifest is
written last, in the same way. Memory stays at a block of rows beside the columns, however large the features.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from onceover.base.addresses import Address
from onceover.base.files import aside_of, sync_folder, whole_file, write_bytes
from onceover.base.formats import MANIFEST, STORE_FOLDER_FORMAT, STORE_FOLDER_VERSION, STORE_FORMAT, STORE_VERSION
from onceover.base.hdf5 import (
    checksum_behind,
    create_bytes_column,
    fill,
    stated_checksum,
    write_column,
    write_hdf5,
)
from onceover.base.temporary import IN_MEMORY, temporary_array
from onceover.base.texts import ChosenTexts, text_column
from onceover.extract.ledger import Failure
from onceover.extract.publishing import publish
from onceover.extract.shards import KeptShard, PlacedRows, RowSources, shard_bytes
from onceover.extract.store import (
    BLOCK,
    CHECKED_LATER,
    KEYS,
    KINDS,
    SHARD_NAME,
    dataset_fingerprint,
    row_blocks,
    stamp,
    write_failures,
)
from onceover.extract.store_form import FILE, FOLDER, Destination

_IN_SHARDS = ("features", "thumbnail")  # the columns that a folder's manifest leaves to its shards
_GATHERED = 2**16  # rows that are looked up at a time; a shard is opened anew for each of these blocks
_SHARD_COLUMNS = {"image": ("id", "sha256", "size", "mtime_ns"), "text": ("caption",)}  # as an extraction's have them


class Rows(Protocol):
    """Rows of one kind with their features, wherever they lie."""

    def blocks(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The columns of the rows with ``keys``, in their order, some rows at a time; an empty block for no rows."""


@dataclass(frozen=True)
class _Contents:
    """All that a store holds; ``columns`` are those of images and captions, by kind, that do not come from sources."""

    columns: dict[str, dict[str, Any]]
    sources: Mapping[str, Rows]
    recipes: dict[str, dict]
    provenance: dict
    failures: list[Failure]
    tokenizer_files: dict[str, bytes]

    def keys(self, kind: str) -> Sequence[str]:
        """The keys of the rows of a kind."""
        keys: Sequence[str] = self.columns[kind][KEYS[kind]]
        return keys


def seal(
    path: Path,
    *,
    images: dict,
    texts: dict,
    sources: Mapping[str, Rows],
    recipes: dict[str, dict],
    provenance: dict,
    failures: list[Failure],
    tokenizer_files: dict[str, bytes],
    form: str = FILE,
    destination: Destination | None = None,
) -> None:
    """Writes the finished store, whole or not at all.

    ``images`` holds the columns id, path, split, sha256, size, mtime_ns and ``texts`` caption, image_index; features
    and the other columns come from ``sources``, by key. ``form``: ``file`` or ``folder``; with a ``destination`` the
    folder is put there.
    """
    contents = _Contents({"image": images, "text": texts}, sources, recipes, provenance, failures, tokenizer_files)
    if destination is not None:
        _write_folder(path, contents, destination.address)
        publish(path, destination)
    elif form == FOLDER:
        _write_folder(path, contents, path)
    else:
        _write_file(path, contents)


def _write_file(path: Path, contents: _Contents) -> None:
    """Writes a store of one file."""
    with write_hdf5(path, CHECKED_LATER) as writer:
        _write_head(writer.file, STORE_FORMAT, STORE_VERSION, contents)
        for kind in KINDS:
            group = writer.file[kind]
            _copy(contents.sources[kind], contents.keys(kind), group)
            writer.check()
            stamp(group["features"], contents.recipes[kind], contents.provenance[kind])
        _write_rest(writer.file, contents)


def _write_head(file: h5py.File, name: str, version: int, contents: _Contents) -> None:
    """Writes the attributes of the file, and the columns of images and captions."""
    images = contents.columns["image"]
    texts = contents.columns["text"]
    file.attrs["format"] = name
    file.attrs["format_version"] = version
    file.attrs["dataset_fingerprint"] = dataset_fingerprint(
        images["id"], images["sha256"], images["split"], texts["caption"], texts["image_index"]
    )
    file.attrs["provenance"] = json.dumps(contents.provenance)
    for kind in KINDS:
        group = file.create_group(kind)
        for name, values in contents.columns[kind].items():
            write_column(group, name, values)


def _write_rest(file: h5py.File, contents: _Contents) -> None:
    """Writes the tokenizer and the ledger."""
    file.create_group("tokenizer")
    for name, data in contents.tokenizer_files.items():
        file.create_dataset(f"tokenizer/{name}", data=np.frombuffer(data, dtype=np.uint8))
    write_failures(file, contents.failures)


def _copy(source: Rows, keys: Sequence[str], group: h5py.Group) -> None:
    """Writes the columns of some rows into new datasets of a group, block by block."""
    start = 0
    for block in source.blocks(keys):
        stop = start + len(block["features"])
        for name, values in block.items():
            if name not in group:
                _create_column(group, name, values, len(keys))
            if stop > start:
                fill(group[name], slice(start, stop), values)
        start = stop


def _create_column(group: h5py.Group, name: str, values: Any, rows: int) -> None:
    """Makes a dataset for so many rows that are like ``values``."""
    if _is_bytes(values):
        create_bytes_column(group, name, rows)
    else:
        group.create_dataset(name, (rows, *values.shape[1:]), dtype=values.dtype)


def _is_bytes(values: Any) -> bool:
    """Whether values are rows of bytes of any length, and no array of numbers."""
    return not isinstance(values, np.ndarray) or values.dtype == object


def _write_folder(folder: Path, contents: _Contents, place: Path | Address) -> None:
    """Writes a store that is a folder; shards that are there, or that an extraction has finished, stay as they are.

    A shard with rows that the store does not have is written anew without them.

    Args:
        place: where the store is to lie, an address or ``folder`` itself; shards that are there are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _Shards(folder, place)
    with write_hdf5(folder / MANIFEST) as writer:
        _write_head(writer.file, STORE_FOLDER_FORMAT, STORE_FOLDER_VERSION, contents)
        for kind in KINDS:
            placed = _placed(shards, kind, contents)
            placed.write(writer.file[kind])
            stamp(writer.file[kind]["shard"], contents.recipes[kind], contents.provenance[kind])
        shards.write(writer.file)
        _write_rest(writer.file, contents)
        writer.check()
        sync_folder(folder)
    _remove_others(folder, set(shards.names))


class _Shards:
    """The shards of a folder that is being written.

    Attributes:
        folder: where new ones are written. place: where the store is to lie, whose own shards stay.
    """

    def __init__(self, folder: Path, place: Path | Address):
        self.folder = folder
        self.place = place
        self.names: list[str] = []
        self._rows: list[int] = []
        self._sizes: list[int] = []
        self._checksums: list[str] = []

    def keep(self, kind: str, shard: KeptShard) -> int:
        """Adds a shard, by a link to its file where that lies elsewhere; gives its number."""
        assert shard.checksum is not None, "one without is not kept"
        name = _name(kind, shard.checksum)
        if shard.file.parent != self.place:
            assert isinstance(shard.file, Path), "at an address lie shards of this store alone"
            _link(shard.file, self.folder / name)
        return self._note(name, shard.rows, shard.size, shard.checksum)

    def add(self, kind: str, columns: dict[str, Any], recipe: dict) -> int:
        """Writes a new shard; gives its number."""
        data = shard_bytes(kind, columns, recipe, [])
        checksum = checksum_behind(io.BytesIO(data))
        assert checksum is not None, "it was just made"
        name = _name(kind, checksum)
        write_bytes(self.folder / name, data)
        return self._note(name, len(columns["features"]), len(data), checksum)

    def _note(self, name: str, rows: int, size: int, checksum: str) -> int:
        self.names.append(name)
        self._rows.append(rows)
        self._sizes.append(size)
        self._checksums.append(checksum)
        return len(self.names) - 1

    def write(self, manifest: h5py.File) -> None:
        """Writes the table of all shards."""
        group = manifest.create_group("shards")
        write_column(group, "file", self.names)
        write_column(group, "rows", np.array(self._rows, np.int64))
        write_column(group, "bytes", np.array(self._sizes, np.int64))
        write_column(group, "checksum", self._checksums)


def _name(kind: str, checksum: str) -> str:
    """The name of a shard, which is that of its content: two shards of one name are the same."""
    return f"{kind}-{checksum[:24]}.h5"


def _link(shard: Path, target: Path) -> None:
    """Gives a complete file a second name, or a copy where the file system has no such links."""
    if target.exists() and target.samefile(shard):
        return
    aside = aside_of(target)
    try:
        os.link(shard, aside)
        os.replace(aside, target)
    except OSError:
        with whole_file(target) as copy:
            shutil.copyfile(shard, copy)
    finally:
        aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class _PlacedRows:
    """Rows of a folder: the shard of each, where in it, the columns that the manifest has, and how features look.

    ``in_shards``: the names of the columns that the shards have.
    """

    shards: np.ndarray
    rows: np.ndarray
    columns: dict[str, np.ndarray]
    features: np.ndarray
    in_shards: list[str]

    def write(self, group: h5py.Group) -> None:
        """Writes them into a manifest's group."""
        for name, values in self.columns.items():
            write_column(group, name, values)
        write_column(group, "shard", self.shards.astype(np.int32, copy=False))
        write_column(group, "row", self.rows.astype(np.int32, copy=False))
        group["shard"].attrs["row_shape"] = np.array(self.features.shape[1:], np.int64)
        group["shard"].attrs["dtype"] = self.features.dtype.name
        group["shard"].attrs["in_shards"] = json.dumps(self.in_shards)


def _placed(shards: _Shards, kind: str, contents: _Contents) -> _PlacedRows:
    """Places the rows of a kind: in shards that are there, and the others in new ones."""
    source = contents.sources[kind]
    keys = contents.keys(kind)
    if not isinstance(source, RowSources):
        return _in_new_shards(shards, kind, contents, source.blocks(keys), np.arange(len(keys)))
    placed = source.placed(keys, shards.place)
    numbers = _kept_shards(shards, kind, placed)
    rest = np.flatnonzero(numbers < 0)
    _, firsts, of_each = np.unique(placed.positions[rest], return_index=True, return_inverse=True)
    order = np.argsort(firsts)  # equal rows lie in a shard once, where the first of them comes
    first_rows = rest[firsts[order]]
    others = _in_new_shards(
        shards, kind, contents, source.blocks(ChosenTexts(text_column(keys), first_rows)), first_rows
    )
    written = np.argsort(order)[of_each]  # of each row of the rest, its number among those that were written
    numbers[rest] = others.shards[written]
    placed.rows[rest] = others.rows[written]
    columns = _gathered(source, placed.positions) if len(keys) else others.columns
    return _PlacedRows(numbers, placed.rows, columns, others.features, others.in_shards)


def _kept_shards(shards: _Shards, kind: str, placed: PlacedRows) -> np.ndarray:
    """The shard of each row, −1 of one that is still to be written, in the place of its number; keeps the shards."""
    final = np.full(len(placed.used) + 1, -1, np.int32)  # the last one: of rows in no shard
    for number, shard in placed.shards.items():
        if placed.used[number] == shard.rows and shard.checksum is not None:
            final[number] = shards.keep(kind, shard)
    for rows in row_blocks(len(placed.numbers)):
        placed.numbers[rows] = final[placed.numbers[rows]]
    return placed.numbers


def _gathered(source: RowSources, positions: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of rows that a manifest has; long ones in temporary files."""
    columns = {}
    for name, (shape, dtype) in source.row_shapes().items():
        if name not in _IN_SHARDS:
            columns[name] = temporary_array((len(positions), *shape), dtype, IN_MEMORY)
    if not columns:
        return {}
    for rows in row_blocks(len(positions), _GATHERED):
        for name, values in source.gather(list(columns), positions[rows]).items():
            columns[name][rows] = values
    return columns


def _in_new_shards(
    shards: _Shards, kind: str, contents: _Contents, blocks: Iterator[dict[str, Any]], rows: np.ndarray
) -> _PlacedRows:
    """Writes new shards with blocks of rows, which have the numbers ``rows`` in the store."""
    numbers = np.zeros(len(rows), np.int64)
    in_shard = np.zeros(len(rows), np.int64)
    columns: dict[str, list[np.ndarray]] = {}
    start = 0
    for block in _regrouped(blocks):
        stop = start + len(block["features"])
        for name in block.keys() - _IN_SHARDS:
            columns.setdefault(name, []).append(block[name])
        if stop > start:
            own = _own_columns(kind, contents.columns[kind], rows[start:stop])
            numbers[start:stop] = shards.add(kind, own | _as_written(block), contents.recipes[kind])
            in_shard[start:stop] = np.arange(stop - start)
        start = stop
    joined = {name: np.concatenate(values) for name, values in sorted(columns.items())}
    return _PlacedRows(numbers, in_shard, joined, block["features"][:0], [name for name in _IN_SHARDS if name in block])


def _regrouped(blocks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows in blocks of ``BLOCK`` or more, but for the last."""
    waiting: list[dict[str, Any]] = []
    for block in blocks:
        waiting.append(block)
        if sum(len(block["features"]) for block in waiting) >= BLOCK:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Blocks as one."""
    if len(blocks) == 1:
        return blocks[0]
    joined: dict[str, Any] = {}
    for name, values in blocks[0].items():
        parts = [block[name] for block in blocks]
        joined[name] = list(chain.from_iterable(parts)) if _is_bytes(values) else np.concatenate(parts)
    return joined


def _own_columns(kind: str, columns: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """The columns of some rows that a shard has beside those of its source."""
    own = {}
    for name in _SHARD_COLUMNS[kind]:
        values = columns[name]
        own[name] = values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows.tolist()]
    return own


def _as_written(block: dict[str, Any]) -> dict[str, Any]:
    """A block with bytes where it has arrays of them."""
    written = dict(block)
    if "thumbnail" in block:
        written["thumbnail"] = [value.tobytes() for value in block["thumbnail"]]
    return written


def _remove_others(folder: Path, names: set[str]) -> None:
    """Removes shards of an earlier manifest, or of one that was never finished; other people's files stay."""
    for entry in list(folder.iterdir()):
        match = SHARD_NAME.fullmatch(entry.name)
        if match is None or entry.name in names or entry.is_symlink() or not entry.is_file():
            continue
        checksum = stated_checksum(entry)
        if checksum is not None and entry.name == _name(match[1], checksum):
            entry.unlink()
