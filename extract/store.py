"""The HDF5 feature store: rows of features with ids, provenance, checksums and a ledger of failures.

It is one file, or a folder of shards with a manifest, which is such a file without features: they lie in the shards.
``extract.sealing`` writes both. Rows are found by what they were computed from (``KEYS``), so that shards and an
earlier store serve alike as sources. numpy and h5py only; docs/store-format.md describes the files.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from onceover.base.addresses import Address, is_address, path_of
from onceover.base.columns import LazyColumn
from onceover.base.errors import OnceoverError, first_line
from onceover.base.files import digest, digest_of_columns, parse_json
from onceover.base.formats import MANIFEST, STORE_FOLDER_FORMAT, STORE_FOLDER_VERSION, STORE_FORMAT, STORE_VERSION
from onceover.base.hdf5 import (
    DAMAGE,
    RowsOnDisk,
    StoredRows,
    check_bytes,
    create_bytes_column,
    damaged_parts,
    fill,
    memory_mapped,
    open_hdf5,
    which_file,
    write_column,
)
from onceover.base.progress import LOGGER
from onceover.base.texts import TextColumn, Texts
from onceover.extract.encoder_files import known_tokenizer_files
from onceover.extract.key_index import repeated_rows
from onceover.extract.ledger import Failure
from onceover.extract.remote import RemoteFolder, staging_path
from onceover.extract.sharded import Places, ShardedColumn, ShardedRows, ShardFiles, ShardTable

KINDS = ("image", "text")
SPLITS = ("train", "dev", "test", "")
KEYS = {"image": "sha256", "text": "caption"}  # the column that says what a row's features were computed from
NOT_COUNTED = -1  # in a column of counts: a row that an earlier version encoded
BLOCK = 1024  # rows copied or hashed at a time
_TEXTS = 8192  # that are read at a time
SHARD_NAME = re.compile(r"(image|text)-[0-9a-f]{24}\.h5")  # in a folder: the digits are those of its checksum
SELECTION = "select"  # the name of the tenth of the train images that chooses where dev has to report
_BYTES = h5py.vlen_dtype(np.uint8)
#: datasets whose rows are checked as they are read, not when a store is opened
CHECKED_LATER = ("image/features", "text/features")


class StoreError(OnceoverError):
    """A store that is missing, unfinished, damaged, or not the one that is wanted."""


def named_store(store: str | Path) -> Path:
    """The path or the address that a user names for a store.

    Raises:
        AddressError: an address of an unknown kind, or one whose driver is not installed.
    """
    if isinstance(store, Address):
        return store
    return path_of(store) if is_address(store) else Path(store)


def store_exists(path: Path) -> bool:
    """Whether a finished store is there: a file, or a folder with a manifest.

    Raises:
        AddressError: an address that cannot be reached.
    """
    if isinstance(path, Address):
        return (path / MANIFEST).exists()
    return (path / MANIFEST).exists() if path.is_dir() else path.exists()


def parts_folder(path: str | Path) -> Path:
    """Where the shards of an unfinished store lie."""
    return Path(f"{path}.parts")


@dataclass(frozen=True)
class Roles:
    """Which images, as rows of the store, a fit trains on, chooses by and reports on; names for the latter two."""

    train: np.ndarray
    selection: np.ndarray
    report: np.ndarray
    selection_name: str
    report_name: str

    def together(self) -> "Roles":
        """The same with the validation images among the train ones, for what is fitted once all is chosen."""
        return replace(self, train=np.union1d(self.train, self.selection))


class FeatureStore:
    """A finished store, open for reading; a context manager.

    Attributes:
        path: of the store, or its address. local: where its files lie on this machine, which is ``path``, or the folder
            with copies of those at an address.
        image_ids, image_paths, image_splits, sha256: texts of N, which read like lists (``base.texts``).
        captions: texts of M; image_index: int64 (M,), the image of each caption; truncated: bool (M,).
        unknown, tokens: int32 (M,), the tokens of each caption that the encoder's vocabulary lacks, and all its tokens,
            ``NOT_COUNTED`` where an earlier version encoded it; None in imported stores and those of earlier versions.
        fingerprints: of ``image`` and ``text`` features and of the ``dataset``.
        provenance: what made it, as plain values.

    Raises:
        StoreError: nothing there, unfinished, or no store of a known version.

    Example:
        >>> with onceover.FeatureStore("store.h5") as store:
        ...     print(len(store.image_ids), "images,", len(store.captions), "captions")
        ...     print(store.image_features.shape, store.text_features.shape)
        60 images, 300 captions
        (60, 2, 16) (300, 32)
    """

    def __init__(self, path: str | Path, check: bool = True, mend: bool = False):
        """``check``: refuse what does not match its checksum; without, ``verify`` can tell all that is wrong.

        ``mend``: open a folder that lacks shards, to encode their rows again.
        """
        self.path = named_store(path)
        remote = RemoteFolder(self.path) if isinstance(self.path, Address) else None
        self.local = self.path if remote is None else remote.copies
        if remote is not None and not remote.fetch_manifest():
            raise StoreError(_why_not_there(self.path, staging_path(remote.address)))
        self._file, self._is_whole = _open(self.path, self.local)
        LOGGER.debug("opened the feature store %s", self.path)
        self.shards: ShardFiles | None = None
        self._places: dict[str, Places] = {}
        try:
            with readable(self.path):
                if self.local.is_dir():
                    self.shards = ShardFiles(self.local, shard_table(self._file), remote)
                self.provenance = parse_json(self._file.attrs["provenance"])
                self.recipes = {kind: parse_json(self._described(kind).attrs["recipe"]) for kind in KINDS}
                self.fingerprints = {kind: self._described(kind).attrs["fingerprint"] for kind in KINDS}
                self.fingerprints["dataset"] = self._file.attrs["dataset_fingerprint"]
                if check:
                    self._check()
                if check and not mend:
                    self._refuse_missing_shards()
                self._features: dict[str, RowsOnDisk] = {kind: self._open_features(kind) for kind in KINDS}
        except OnceoverError:
            self.close()
            raise

    def _described(self, kind: str) -> h5py.Dataset:
        """The dataset that carries the recipe of a kind of features: they themselves, or the shard of each row."""
        return self._file[kind]["features" if self.shards is None else "shard"]

    def _open_features(self, kind: str) -> RowsOnDisk:
        if self.shards is None:
            return StoredRows(self._file[kind]["features"], self.local)
        row, dtype = self._row_of(kind)
        return ShardedRows(self.shards, kind, self.places(kind), row, dtype)

    def _row_of(self, kind: str) -> tuple[tuple[int, ...], np.dtype]:
        """The shape of a row of features, and their type."""
        described = self._described(kind)
        if self.shards is None:
            return described.shape[1:], described.dtype
        return tuple(int(length) for length in described.attrs["row_shape"]), np.dtype(described.attrs["dtype"])

    def places(self, kind: str) -> Places:
        """The shard of each row, and the row in it; of a store that is a folder."""
        if kind not in self._places:
            group = self._file[kind]
            self._places[kind] = Places(memory_mapped(group["shard"]), memory_mapped(group["row"]))
        return self._places[kind]

    @cached_property
    def image_ids(self) -> TextColumn:
        """The id of each image."""
        return self._texts("image/id")

    @cached_property
    def image_paths(self) -> TextColumn:
        """The path of each image, relative to the data folder."""
        return self._texts("image/path")

    @cached_property
    def image_splits(self) -> TextColumn:
        """The split of each image; empty where it is in none."""
        return self._texts("image/split")

    @cached_property
    def sha256(self) -> TextColumn:
        """The SHA-256 of each image's content."""
        return self._texts("image/sha256")

    @cached_property
    def captions(self) -> TextColumn:
        """The captions."""
        return self._texts("text/caption")

    @cached_property
    def image_index(self) -> np.ndarray:
        """The row of each caption's image: int64 (M,)."""
        return self._numbers("text/image_index")

    @cached_property
    def truncated(self) -> np.ndarray:
        """Whether each caption was cut: bool (M,)."""
        return self._numbers("text/truncated")

    @cached_property
    def unknown(self) -> np.ndarray | None:
        """How many tokens of each caption the vocabulary lacks: int32 (M,), or None."""
        return self._numbers("text/unknown") if "unknown" in self._file["text"] else None

    @cached_property
    def tokens(self) -> np.ndarray | None:
        """How many tokens each caption has: int32 (M,), or None."""
        return self._numbers("text/tokens") if "tokens" in self._file["text"] else None

    def _texts(self, name: str) -> TextColumn:
        """A column of text, which is read when it is first asked for."""
        with self._readable():
            return texts_in(self._file[name])

    def _numbers(self, name: str) -> np.ndarray:
        """A column of numbers, which is read when it is first asked for."""
        with self._readable():
            values: np.ndarray = self._file[name][:]
            return values

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """As ``readable``, with an error of its own where the store was closed."""
        if not self._file:
            raise StoreError(f"{self.path} was closed before all of it was read; open it again")
        with readable(self.path):
            yield

    def _check(self) -> None:
        """Refuses a file whose columns and attributes are not as they were written; features are checked as read.

        Raises:
            ValueError: what is wrong.
        """
        wrong = [] if self._is_whole else damaged_parts(self._file, but=CHECKED_LATER)
        problems = [*wrong, *self._shape_problems()]
        if problems:
            raise ValueError(problems[0])

    def missing_shards(self) -> list[str]:
        """The names of shards that the manifest has and the folder has not."""
        return [] if self.shards is None else self.shards.missing()

    def _refuse_missing_shards(self) -> None:
        missing = self.missing_shards()
        if missing:
            raise StoreError(
                f"{self.path} lacks {len(missing):,} of its shards (the first: {missing[0]}); put them back, or run "
                "extract again, which encodes their rows anew"
            )

    def _shape_problems(self) -> Iterator[str]:
        """Columns of different lengths, features of another kind, and a caption map that points outside the images."""
        counts = {"image": len(self._file["image/id"]), "text": len(self._file["text/caption"])}
        for kind, dimensions in (("image", 3), ("text", 2)):
            row, dtype = self._row_of(kind)
            if len(row) + 1 != dimensions or dtype not in (np.float32, np.float16):
                yield f"/{kind}/features has the shape {(counts[kind], *row)} and holds {dtype}"
            for name, column in self._file[kind].items():
                if len(column) != counts[kind]:
                    yield f"/{kind}/{name} has {len(column)} rows; {counts[kind]} expected"
            if self.shards is not None:
                yield from self._place_problems(kind)
        index = self._file["text/image_index"]
        lowest, highest = extremes(index)
        if index.dtype != np.int64:
            yield f"/text/image_index holds {index.dtype}"
        elif len(index) and not (lowest >= (0 if counts["image"] else -1) and highest < counts["image"]):
            yield "/text/image_index points outside the images"

    def _place_problems(self, kind: str) -> Iterator[str]:
        """Rows that lie in no shard, or beyond its end."""
        assert self.shards is not None
        places = self.places(kind)
        if places.shards.dtype != np.int32 or places.rows.dtype != np.int32:
            yield f"/{kind}/shard and /{kind}/row hold {places.shards.dtype} and {places.rows.dtype}"
            return
        for rows in row_blocks(min(len(places.shards), len(places.rows)), 2**20):
            shards = places.shards[rows]
            if shards.min() < 0 or shards.max() >= len(self.shards):
                yield f"/{kind}/shard names shards that there are not"
            elif places.rows[rows].min() < 0 or (places.rows[rows] >= self.shards.table.rows[shards]).any():
                yield f"/{kind}/row points outside its shard"

    @property
    def is_checked(self) -> bool:
        """Whether features are compared with checksums as they are read; stores of earlier versions have none."""
        return all(rows.is_checked for rows in self._features.values())

    def __repr__(self) -> str:
        if not self._file:
            return f"<FeatureStore {self.path}, closed>"
        encoders = " and ".join(self.provenance[kind]["encoder"] for kind in KINDS if self.recipes[kind])
        counts = f"{len(self.image_features):,} images, {len(self.text_features):,} captions"
        return f"<FeatureStore {self.path}: {counts}; features of {encoders}>"

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is open."""
        if self.shards is not None:
            self.shards.close()
        self._file.close()

    @property
    def image_features(self) -> RowsOnDisk:
        """float32 or float16 (N, V, D): V views of each image, unnormalised; read when rows are asked for."""
        return self._features["image"]

    @property
    def text_features(self) -> RowsOnDisk:
        """float32 or float16 (M, D), unnormalised; read when rows are asked for."""
        return self._features["text"]

    def features(self, kind: str) -> RowsOnDisk:
        """The features of ``image`` or ``text``."""
        return self._features[kind]

    @property
    def nbytes(self) -> int:
        """The size of its files."""
        if self.shards is None:
            return self.local.stat().st_size
        return (self.local / MANIFEST).stat().st_size + int(self.shards.table.sizes.sum())

    @property
    def dims(self) -> tuple[int, int]:
        """Dimensions of an image's features in a view, and of a caption's."""
        return self.image_features.shape[2], self.text_features.shape[1]

    @property
    def failures(self) -> list[Failure]:
        """The ledger: every record that was left out."""
        return read_failures(self._file)

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The text encoder's tokenizer, file by file; files of other names are left where they are."""
        return known_tokenizer_files({name: data[:].tobytes() for name, data in self._file["tokenizer"].items()})

    def row_shapes(self, kind: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The shape of a row and the type of the columns of a kind, features among them, by their names."""
        shapes = {name: (column.shape[1:], column.dtype) for name, column in self._file[kind].items()}
        shapes["features"] = self._row_of(kind)
        if self.shards is not None:
            shapes |= {name: ((), _BYTES) for name in in_shards(self._file[kind]) if name != "features"}
        return shapes

    def column(self, kind: str, name: str, rows: np.ndarray) -> np.ndarray:
        """Some rows of a column, ascending; one that the store lacks was not counted in it."""
        with self._readable():
            group = self._file[kind]
            if name == "features":
                return self.features(kind)[rows]
            if name == "thumbnail" and self.shards is not None:
                return ShardedColumn(self.shards, kind, name, self.places(kind)).arrays(rows)
            if name not in group:
                return np.full(len(rows), NOT_COUNTED, np.int32)
            if group[name].dtype == object:
                return rows_of(group[name], rows)
            column: np.ndarray = memory_mapped(group[name])[rows]
            return column

    def forget(self) -> None:
        """Frees the columns of text that were read; they are read again when they are asked for."""
        for name in ("image_ids", "image_paths", "image_splits", "sha256", "captions"):
            self.__dict__.pop(name, None)

    def image_stats(self) -> tuple[np.ndarray, np.ndarray]:
        """Size in bytes and modification time in ns of each image's file, int64 (N,); -1 of imported images."""
        return self._file["image/size"][:], self._file["image/mtime_ns"][:]

    def thumbnails(self) -> Sequence[bytes] | None:
        """A small JPEG of each image, or None where the store was made without."""
        if self.shards is not None:
            has_some = "thumbnail" in in_shards(self._file["image"])
            return ShardedColumn(self.shards, "image", "thumbnail", self.places("image")) if has_some else None
        return Column(self._file["image/thumbnail"], self.local) if "image/thumbnail" in self._file else None

    def roles(self) -> Roles:
        """The images to train on, to choose by (validation) and to report on.

        With a test split dev is for validation and test is reported. Without one a tenth of the train images is for
        validation, taken by a hash of their ids and so the same in every store of this dataset, and dev is reported.

        Raises:
            StoreError: no train images, or nothing to report on.
        """
        splits = np.array(self.image_splits)
        rows = {split: np.flatnonzero(splits == split) for split in ("train", "dev", "test")}
        report = "test" if len(rows["test"]) else "dev"
        if not len(rows["train"]) or not len(rows[report]):
            counts = ", ".join(f"{len(chosen)} {split}" for split, chosen in rows.items())
            raise StoreError(
                f"{self.path} has too few splits to fit and report on ({counts} images); extract "
                "more images (a larger --limit), or give the dataset a split column or the official lists"
            )
        if report == "test" and len(rows["dev"]):
            return Roles(rows["train"], rows["dev"], rows["test"], "dev", "test")
        chosen = np.array([_in_selection(self.image_ids[row]) for row in rows["train"].tolist()])
        if not chosen.any() or chosen.all():
            raise StoreError(
                f"{self.path} has {len(chosen)} train images; too few to set a tenth of "
                "them aside: extract more (a larger --limit)"
            )
        return Roles(rows["train"][~chosen], rows["train"][chosen], rows[report], SELECTION, report)

    def duplicates_across_splits(self) -> list[tuple[str, ...]]:
        """Ids of images with the same bytes that lie in different splits: what they teach leaks into the test."""
        duplicates = []
        for rows in repeated_rows(self.sha256):
            splits = {self.image_splits[row] for row in rows}
            if len(splits - {""}) > 1:
                duplicates.append(tuple(self.image_ids[row] for row in rows))
        return duplicates

    def verify(self) -> list[str]:
        """Lists what is wrong with the file: shapes, checksums, numbers, ids, splits, the caption map.

        Raises:
            StoreError: so damaged that it cannot be read to its end.
        """
        with readable(self.path):
            return self._problems()

    def _problems(self) -> list[str]:
        problems = list(self._shape_problems())
        problems += damaged_parts(self._file)
        problems += [f"/image/split: {split!r} is no split" for split in sorted(set(self.image_splits) - set(SPLITS))]
        if self.shards is not None and not problems:
            problems += self._shard_problems()
        for kind in KINDS:
            features = self._file[kind].get("features", ())
            bad = sum(int((~np.isfinite(features[rows])).sum()) for rows in row_blocks(len(features)))
            if bad:
                problems.append(f"/{kind}/features holds {bad} numbers that are not finite")
            if digest(self.recipes[kind]) != self.fingerprints[kind]:
                problems.append(f"/{kind}/features: the fingerprint is not its recipe's")
        for rows in repeated_rows(self.image_ids):
            problems.append(f"/image/id: {self.image_ids[rows[0]]!r} stands {len(rows)} times")
        if (
            dataset_fingerprint(self.image_ids, self.sha256, self.image_splits, self.captions, self.image_index)
            != self.fingerprints["dataset"]
        ):
            problems.append("the dataset's fingerprint does not match its rows")
        return problems

    def _shard_problems(self) -> Iterator[str]:
        """Shards that are missing, damaged or of other rows than the manifest says, and numbers that are not finite."""
        assert self.shards is not None
        for kind, keys in (("image", self.sha256), ("text", self.captions)):
            places = self.places(kind)
            for number, rows, in_shard in places.by_shard(np.arange(len(keys))):
                try:
                    features = self.shards.features(number, kind)
                    stored = self.shards.texts(number, kind, KEYS[kind])
                except (OnceoverError, *DAMAGE) as error:
                    yield f"{self.shards.path(number)}: {first_line(error)}"
                    continue
                bad = int((~np.isfinite(features)).sum())
                if bad:
                    yield f"{self.shards.path(number)} holds {bad} numbers that are not finite"
                if list(keys.values_of(rows.tolist())) != [stored[place] for place in in_shard.tolist()]:
                    yield f"{self.shards.path(number)} holds other rows than the manifest says"


class Column(LazyColumn[bytes]):
    """Rows of bytes in an HDF5 dataset of variable length, read when they are asked for.

    Raises:
        StoreError: of every access, once another file has taken the place of the one that the dataset was opened in.
    """

    def __init__(self, dataset: h5py.Dataset, path: Path):
        self._path = path
        self._name = dataset.name
        self._file = which_file(os.fstat(dataset.file.id.get_vfd_handle()))
        self._rows: h5py.Dataset | None = None

    def __len__(self) -> int:
        return len(self._opened())

    def values_of(self, rows: Iterable[int]) -> Iterator[bytes]:
        """The values of rows that are given by their numbers, from 0; quickest of neighbours, given as a range."""
        if isinstance(rows, range) and rows.step == 1:
            for start in range(rows.start, rows.stop, BLOCK):
                for value in self._opened()[start : min(start + BLOCK, rows.stop)]:
                    yield value.tobytes()
            return
        for row in rows:
            yield self._opened()[row].tobytes()

    def _opened(self) -> h5py.Dataset:
        """The dataset, opened at first use and then kept open."""
        if self._rows is None:
            self._rows = open_hdf5(self._path, again=True)[self._name]
        if which_file(os.fstat(self._rows.file.id.get_vfd_handle())) != self._file:
            self._rows = None
            raise StoreError(f"{self._path} was replaced while it was in use; run the command again")
        return self._rows


def copy_thumbnails(thumbnails: Sequence[bytes] | None, group: h5py.Group) -> None:
    """Writes thumbnails, if there are any, into a group of another file, a block at a time."""
    if thumbnails is None:
        return
    column = create_bytes_column(group, "thumbnail", len(thumbnails))
    rows = iter(thumbnails)
    for block in row_blocks(len(thumbnails)):
        fill(column, block, [np.frombuffer(next(rows), np.uint8) for _ in range(block.stop - block.start)])


def changed_settings(recipe: dict, before: dict) -> str:
    """The names of what differs between two recipes, for an error message."""
    return ", ".join(key for key in recipe if recipe[key] != before.get(key))


def dataset_fingerprint(ids, sha256, splits, captions, image_index) -> str:
    """SHA-256 over what the dataset is: images with content and split, captions with their images."""
    return digest_of_columns([ids, sha256, splits, captions, np.asarray(image_index)])


def caption_ids(image_ids: Sequence[str], image_index: np.ndarray) -> list[str]:
    """``<image id>#<n>`` for each caption, n counting the captions of its image."""
    seen: dict[int, int] = {}
    names = []
    for image in image_index.tolist():
        seen[image] = seen.get(image, -1) + 1
        names.append(f"{image_ids[image]}#{seen[image]}")
    return names


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what h5py and the decoders raise on a damaged file into an error with a way out."""
    try:
        yield
    except (OnceoverError, PermissionError):
        raise
    except DAMAGE as error:
        raise StoreError(f"{path} is damaged ({first_line(error)}); remove it and extract again") from error


def _why_not_there(path: Path, local: Path) -> str:
    """Why there is no store at a path or an address; ``local`` is where it would be written on this machine."""
    if parts_folder(local).exists():
        return f"{path} is unfinished; run the same extract command again to go on with it"
    if local.is_dir() and local == path:
        return f"{path} is a folder without {MANIFEST}, and so no feature store; name a store"
    return f"there is no feature store at {path}; make one: onceover extract --data DIR --store {path}"


def _open(path: Path, local: Path) -> tuple[h5py.File, bool]:
    """The file of a store, and whether its bytes, large arrays aside, were compared with their checksum.

    ``local``: where its files lie on this machine.
    """
    if not store_exists(local):
        raise StoreError(_why_not_there(path, local))
    is_folder = local.is_dir()
    file_path = local / MANIFEST if is_folder else local
    try:
        is_whole = check_bytes(file_path)
        file = open_hdf5(file_path, again=True)
    except PermissionError:
        raise
    except OSError as error:
        raise StoreError(f"{path} is no HDF5 file, or a damaged one ({first_line(error)})") from error
    try:
        with readable(path):
            kind = file.attrs.get("format")
            version = file.attrs.get("format_version")
    except StoreError:
        file.close()
        raise
    known = (STORE_FOLDER_FORMAT, STORE_FOLDER_VERSION) if is_folder else (STORE_FORMAT, STORE_VERSION)
    if (kind, version) != known:
        file.close()
        if kind == STORE_FOLDER_FORMAT and not is_folder:
            raise StoreError(f"{path} is the manifest of a feature store; name the folder that it lies in")
        if kind != known[0]:
            raise StoreError(f"{file_path} is an HDF5 file, but no feature store; make one with extract")
        raise StoreError(f"{path} has the format version {version}; this program reads {known[1]}: extract again")
    return file, is_whole


def shard_table(manifest: h5py.File) -> ShardTable:
    """What a manifest says of its shards.

    Raises:
        ValueError: a name that leads out of the folder, or columns of different lengths.
    """
    group = manifest["shards"]
    table = ShardTable(strings(group["file"]), group["rows"][:], group["bytes"][:], strings(group["checksum"]))
    if not len(table.names) == len(table.rows) == len(table.sizes) == len(table.checksums):
        raise ValueError("/shards has columns of different lengths")
    strange = next((name for name in table.names if SHARD_NAME.fullmatch(name) is None), None)
    if strange is not None:
        raise ValueError(f"/shards names {strange!r}, which is no shard")
    return table


def in_shards(group: h5py.Group) -> list[str]:
    """The names of the columns of a kind that lie in shards, as its manifest says."""
    return list(parse_json(group["shard"].attrs["in_shards"]))


def extremes(column: h5py.Dataset) -> tuple[int, int]:
    """The smallest and the largest number in a column; (0, 0) of an empty one."""
    lowest = []
    highest = []
    for rows in row_blocks(len(column), 2**20):
        block = column[rows]
        lowest.append(int(block.min()))
        highest.append(int(block.max()))
    return min(lowest, default=0), max(highest, default=0)


def _in_selection(image_id: str) -> bool:
    return hashlib.sha256(f"select:{image_id}".encode()).digest()[0] < 256 / 10


def row_blocks(rows: int, size: int = BLOCK) -> Iterator[slice]:
    """The rows as slices of at most ``size``."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def rows_of(dataset: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
    """Some rows of a column, ascending; those of text as strings in an array of objects."""
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    values: np.ndarray = (dataset.asstr() if is_text else dataset)[rows]
    return values


def texts_in(dataset: h5py.Dataset) -> Texts:
    """The values of a column of text, however many, read a block at a time."""
    values = Texts()
    for rows in row_blocks(len(dataset), _TEXTS):
        values.extend(dataset.asstr()[rows])
    return values


def strings(dataset: h5py.Dataset) -> list[str]:
    """The values of a column of text."""
    return dataset.asstr()[:].tolist()


def stamp(features: h5py.Dataset, recipe: dict, provenance: dict) -> None:
    """Writes the recipe, its fingerprint and the provenance as attributes of features."""
    features.attrs["recipe"] = json.dumps(recipe, sort_keys=True)
    features.attrs["fingerprint"] = digest(recipe)
    features.attrs["provenance"] = json.dumps(provenance, sort_keys=True)


def write_failures(file: h5py.File, failures: Iterable[Failure]) -> None:
    """Writes the ledger into a store or a shard."""
    failures = list(failures)
    group = file.create_group("failures")
    for name in ("id", "stage", "reason"):
        write_column(group, name, [_printable(getattr(failure, name)) for failure in failures])
    for name in ("size", "mtime_ns"):
        write_column(group, name, np.array([getattr(failure, name) for failure in failures], dtype=np.int64))


def _printable(text: str) -> str:
    """``text`` as HDF5 can hold it: file names need not be UTF-8, and neither they nor captions be free of NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def read_failures(file: h5py.File) -> list[Failure]:
    """The ledger of a store or a shard."""
    group = file["failures"]
    if not len(group["id"]):
        return []
    columns = [strings(group[name]) for name in ("id", "stage", "reason")]
    columns += [group[name][:].tolist() for name in ("size", "mtime_ns")]
    return [Failure(*row) for row in zip(*columns, strict=True)]
