"""The HDF5 feature store: rows of features with ids, provenance, checksums and a ledger of failures.

While an extraction runs, finished rows lie in *shards*, small HDF5 files with the same groups; ``seal`` copies them
into the store, which appears complete by one rename. Rows are found by what they were computed from (``KEYS``), so
that shards and an earlier store serve alike as sources. numpy and h5py only; docs/store-format.md describes the file.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, overload

import h5py
import numpy as np

from onceover.base.errors import OnceoverError, first_line
from onceover.base.files import digest, parse_json
from onceover.base.formats import STORE_FORMAT, STORE_VERSION
from onceover.base.hdf5 import (
    DAMAGE,
    StoredRows,
    check_bytes,
    create_bytes_column,
    damaged_parts,
    fill,
    open_hdf5,
    which_file,
    write_column,
    write_hdf5,
)
from onceover.base.progress import LOGGER
from onceover.extract.encoder_files import known_tokenizer_files
from onceover.extract.ledger import Failure

KINDS = ("image", "text")
SPLITS = ("train", "dev", "test", "")
KEYS = {"image": "sha256", "text": "caption"}  # the column that says what a row's features were computed from
NOT_COUNTED = -1  # in a column of counts: a row that an earlier version encoded
BLOCK = 1024  # rows copied or hashed at a time
SELECTION = "select"  # the name of the tenth of the train images that chooses where dev has to report
#: datasets whose rows are checked as they are read, not when a store is opened
CHECKED_LATER = ("image/features", "text/features")


class StoreError(OnceoverError):
    """A store that is missing, unfinished, damaged, or not the one that is wanted."""


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
        image_ids, image_paths, image_splits, sha256: lists of N.
        captions: list of M; image_index: int64 (M,), the image of each caption; truncated: bool (M,).
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

    def __init__(self, path: str | Path, check: bool = True):
        """``check``: refuse what does not match its checksum; without, ``verify`` can tell all that is wrong."""
        self.path = Path(path)
        self._file, self._is_whole = _open(self.path)
        LOGGER.debug("opened the feature store %s", self.path)
        try:
            with readable(self.path):
                self._read()
                if check:
                    self._check()
                self._features = {kind: StoredRows(self._file[kind]["features"], self.path) for kind in KINDS}
        except StoreError:
            self.close()
            raise

    def _read(self) -> None:
        image = self._file["image"]
        text = self._file["text"]
        self.image_ids = strings(image["id"])
        self.image_paths = strings(image["path"])
        self.image_splits = strings(image["split"])
        self.sha256 = strings(image["sha256"])
        self.captions = strings(text["caption"])
        self.image_index = text["image_index"][:]
        self.truncated = text["truncated"][:]
        self.unknown = text["unknown"][:] if "unknown" in text else None
        self.tokens = text["tokens"][:] if "tokens" in text else None
        self.provenance = parse_json(self._file.attrs["provenance"])
        self.recipes = {kind: parse_json(self._file[kind]["features"].attrs["recipe"]) for kind in KINDS}
        self.fingerprints = {kind: self._file[kind]["features"].attrs["fingerprint"] for kind in KINDS}
        self.fingerprints["dataset"] = self._file.attrs["dataset_fingerprint"]

    def _check(self) -> None:
        """Refuses a file whose columns and attributes are not as they were written; features are checked as read.

        Raises:
            ValueError: what is wrong.
        """
        wrong = [] if self._is_whole else damaged_parts(self._file, but=CHECKED_LATER)
        problems = [*wrong, *self._shape_problems()]
        if problems:
            raise ValueError(problems[0])

    def _shape_problems(self) -> Iterator[str]:
        """Columns of different lengths, features of another kind, and a caption map that points outside the images."""
        for kind, rows, dimensions in (("image", len(self.image_ids), 3), ("text", len(self.captions), 2)):
            features = self._file[kind]["features"]
            if features.ndim != dimensions or features.dtype not in (np.float32, np.float16):
                yield f"/{kind}/features has the shape {features.shape} and holds {features.dtype}"
            for name, column in self._file[kind].items():
                if len(column) != rows:
                    yield f"/{kind}/{name} has {len(column)} rows; {rows} expected"
        index = self.image_index
        if index.dtype != np.int64:
            yield f"/text/image_index holds {index.dtype}"
        elif len(index) and not (index.min() >= (0 if self.image_ids else -1) and index.max() < len(self.image_ids)):
            yield "/text/image_index points outside the images"

    @property
    def is_checked(self) -> bool:
        """Whether features are compared with checksums as they are read; stores of earlier versions have none."""
        return all(rows.is_checked for rows in self._features.values())

    def __repr__(self) -> str:
        encoders = " and ".join(self.provenance[kind]["encoder"] for kind in KINDS if self.recipes[kind])
        counts = f"{len(self.image_ids):,} images, {len(self.captions):,} captions"
        return f"<FeatureStore {self.path}: {counts}; features of {encoders}>"

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def image_features(self) -> StoredRows:
        """float32 or float16 (N, V, D): V views of each image, unnormalised; read when rows are asked for."""
        return self._features["image"]

    @property
    def text_features(self) -> StoredRows:
        """float32 or float16 (M, D), unnormalised; read when rows are asked for."""
        return self._features["text"]

    def features(self, kind: str) -> StoredRows:
        """The features of ``image`` or ``text``."""
        return self._features[kind]

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

    def image_stats(self) -> tuple[np.ndarray, np.ndarray]:
        """Size in bytes and modification time in ns of each image's file, int64 (N,); -1 of imported images."""
        return self._file["image/size"][:], self._file["image/mtime_ns"][:]

    def thumbnails(self) -> "Column | None":
        """A small JPEG of each image, or None where the store was made without."""
        return Column(self._file["image/thumbnail"], self.path) if "image/thumbnail" in self._file else None

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
        chosen = np.array([_in_selection(self.image_ids[row]) for row in rows["train"]])
        if not chosen.any() or chosen.all():
            raise StoreError(
                f"{self.path} has {len(chosen)} train images; too few to set a tenth of "
                "them aside: extract more (a larger --limit)"
            )
        return Roles(rows["train"][~chosen], rows["train"][chosen], rows[report], SELECTION, report)

    def duplicates_across_splits(self) -> list[tuple[str, ...]]:
        """Ids of images with the same bytes that lie in different splits: what they teach leaks into the test."""
        groups: dict[str, list[int]] = {}
        for row, content in enumerate(self.sha256):
            groups.setdefault(content, []).append(row)
        duplicates = []
        for rows in groups.values():
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
        for kind in KINDS:
            features = self._file[kind]["features"]
            bad = sum(int((~np.isfinite(features[rows])).sum()) for rows in row_blocks(len(features)))
            if bad:
                problems.append(f"/{kind}/features holds {bad} numbers that are not finite")
            if digest(self.recipes[kind]) != self.fingerprints[kind]:
                problems.append(f"/{kind}/features: the fingerprint is not its recipe's")
        problems += [
            f"/image/id: {name!r} stands {count} times" for name, count in Counter(self.image_ids).items() if count > 1
        ]
        if (
            dataset_fingerprint(self.image_ids, self.sha256, self.image_splits, self.captions, self.image_index)
            != self.fingerprints["dataset"]
        ):
            problems.append("the dataset's fingerprint does not match its rows")
        return problems


class Column(Sequence[bytes]):
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

    @overload
    def __getitem__(self, row: int) -> bytes: ...

    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...

    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        if isinstance(row, slice):
            return [value.tobytes() for value in self._opened()[row]]
        return self._opened()[row].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for block in row_blocks(len(self)):
            yield from (value.tobytes() for value in self._opened()[block])

    def _opened(self) -> h5py.Dataset:
        """The dataset, opened at first use and then kept open."""
        if self._rows is None:
            self._rows = open_hdf5(self._path, again=True)[self._name]
        if which_file(os.fstat(self._rows.file.id.get_vfd_handle())) != self._file:
            self._rows = None
            raise StoreError(f"{self._path} was replaced while it was in use; run the command again")
        return self._rows


def copy_thumbnails(thumbnails: Column | None, group: h5py.Group) -> None:
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
    return digest([list(ids), list(sha256), list(splits), list(captions), np.asarray(image_index).tolist()])


def caption_ids(image_ids: list[str], image_index: np.ndarray) -> list[str]:
    """``<image id>#<n>`` for each caption, n counting the captions of its image."""
    seen: dict[int, int] = {}
    names = []
    for image in image_index.tolist():
        seen[image] = seen.get(image, -1) + 1
        names.append(f"{image_ids[image]}#{seen[image]}")
    return names


class Rows(Protocol):
    """Rows of one kind with their features, wherever they lie."""

    def copy(self, keys: list[str], group: h5py.Group) -> None:
        """Writes the rows with ``keys``, in their order, into new datasets of a store's group."""


def seal(
    path: Path,
    *,
    images: dict,
    texts: dict,
    sources: Mapping[str, "Rows"],
    recipes: dict[str, dict],
    provenance: dict,
    failures: list[Failure],
    tokenizer_files: dict[str, bytes],
) -> None:
    """Writes the finished store, whole or not at all. Memory stays at a block of rows, however large the store.

    ``images`` holds the columns id, path, split, sha256, size, mtime_ns and ``texts`` caption, image_index; features
    and the other columns come from ``sources``, by key.
    """
    fingerprint = dataset_fingerprint(
        images["id"], images["sha256"], images["split"], texts["caption"], texts["image_index"]
    )
    with write_hdf5(path, CHECKED_LATER) as writer:
        file = writer.file
        file.attrs["format"] = STORE_FORMAT
        file.attrs["format_version"] = STORE_VERSION
        file.attrs["dataset_fingerprint"] = fingerprint
        file.attrs["provenance"] = json.dumps(provenance)
        for kind, columns in (("image", images), ("text", texts)):
            group = file.create_group(kind)
            for name, values in columns.items():
                write_column(group, name, values)
            sources[kind].copy(columns[KEYS[kind]], group)
            writer.check()
            stamp(group["features"], recipes[kind], provenance[kind])
        file.create_group("tokenizer")
        for name, data in tokenizer_files.items():
            file.create_dataset(f"tokenizer/{name}", data=np.frombuffer(data, dtype=np.uint8))
        write_failures(file, failures)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what h5py and the decoders raise on a damaged file into an error with a way out."""
    try:
        yield
    except (OnceoverError, PermissionError):
        raise
    except DAMAGE as error:
        raise StoreError(f"{path} is damaged ({first_line(error)}); remove it and extract again") from error


def _open(path: Path) -> tuple[h5py.File, bool]:
    """The file of a store, and whether its bytes, large arrays aside, were compared with their checksum."""
    if path.is_dir():
        raise StoreError(f"{path} is a folder; a feature store is one .h5 file")
    if not path.exists():
        if parts_folder(path).exists():
            raise StoreError(f"{path} is unfinished; run the same extract command again to go on with it")
        raise StoreError(f"there is no feature store at {path}; make one: onceover extract --data DIR --store {path}")
    try:
        is_whole = check_bytes(path)
        file = open_hdf5(path, again=True)
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
    if (kind, version) != (STORE_FORMAT, STORE_VERSION):
        file.close()
        if kind != STORE_FORMAT:
            raise StoreError(f"{path} is an HDF5 file, but no feature store; make one with extract")
        raise StoreError(f"{path} has the format version {version}; this program reads {STORE_VERSION}: extract again")
    return file, is_whole


def _in_selection(image_id: str) -> bool:
    return hashlib.sha256(f"select:{image_id}".encode()).digest()[0] < 256 / 10


def row_blocks(rows: int) -> Iterator[slice]:
    """The rows as slices of at most ``BLOCK``."""
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))


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
    columns = [strings(group[name]) for name in ("id", "stage", "reason")]
    columns += [group[name][:].tolist() for name in ("size", "mtime_ns")]
    return [Failure(*row) for row in zip(*columns, strict=True)]
