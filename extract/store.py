"""The HDF5 feature store: rows of features with ids, provenance, checksums and a ledger of failures.

While an extraction runs, finished rows lie in *shards*, small HDF5 files with the same groups; ``seal`` copies them
into the store, which appears complete by one rename. Rows are found by what they were computed from (``KEYS``), so
that shards and an earlier store serve alike as sources. numpy and h5py only; docs/store-format.md describes the file.
"""

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from configs import OnceoverError
from configs.formats import STORE_FORMAT, STORE_VERSION
from extract import Failure
from extract.files import digest, whole_file

KINDS = ("image", "text")
SPLITS = ("train", "dev", "test", "")
KEYS = {"image": "sha256", "text": "caption"}  # the column that says what a row's features were computed from
BLOCK = 1024  # rows copied or hashed at a time
SELECTION = "select"  # the name of the tenth of the train pictures that chooses where dev has to report
_STRING = h5py.string_dtype()
_BYTES = h5py.vlen_dtype(np.uint8)


class StoreError(OnceoverError):
    """A store that is missing, unfinished, damaged, or not the one that is wanted."""


def parts_folder(path: str | Path) -> Path:
    """Where the shards of an unfinished store lie."""
    return Path(f"{path}.parts")


@dataclass(frozen=True)
class Roles:
    """Which pictures, as rows of the store, a fit trains on, chooses by and reports on; names for the latter two."""

    train: np.ndarray
    selection: np.ndarray
    report: np.ndarray
    selection_name: str
    report_name: str

    def together(self) -> "Roles":
        """The same with the selection pictures among the train ones, for what is fitted once all is chosen."""
        return replace(self, train=np.union1d(self.train, self.selection))


class FeatureStore:
    """A finished store, open for reading; a context manager.

    Attributes:
        image_ids, image_paths, image_splits, sha256: lists of N.
        captions: list of M; image_index: int64 (M,), the picture of each caption; truncated: bool (M,).
        fingerprints: of ``image`` and ``text`` features and of the ``dataset``.
        provenance: what made it, as plain values.

    Raises:
        StoreError: nothing there, unfinished, or no store of a known version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = _open(self.path)
        try:
            with _readable(self.path):
                self._read()
        except StoreError:
            self.close()
            raise

    def _read(self) -> None:
        image, text = self._file["image"], self._file["text"]
        self.image_ids, self.image_paths = _strings(image["id"]), _strings(image["path"])
        self.image_splits, self.sha256 = _strings(image["split"]), _strings(image["sha256"])
        self.captions, self.image_index = _strings(text["caption"]), text["image_index"][:]
        self.truncated = text["truncated"][:]
        self.provenance = json.loads(self._file.attrs["provenance"])
        self.recipes = {kind: json.loads(self._file[kind]["features"].attrs["recipe"]) for kind in KINDS}
        self.fingerprints = {kind: self._file[kind]["features"].attrs["fingerprint"] for kind in KINDS}
        self.fingerprints["dataset"] = self._file.attrs["dataset_fingerprint"]

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def image_features(self) -> np.ndarray:
        """float32 or float16 (N, V, D): V views of each picture, unnormalised; mapped: only what is used is read."""
        return memory_mapped(self._file["image/features"])

    @property
    def text_features(self) -> np.ndarray:
        """float32 or float16 (M, D), unnormalised; mapped: only what is used is read."""
        return memory_mapped(self._file["text/features"])

    @property
    def dims(self) -> tuple[int, int]:
        """Dimensions of a picture's features in a view, and of a caption's."""
        return self.image_features.shape[2], self.text_features.shape[1]

    @property
    def failures(self) -> list[Failure]:
        """The ledger: every record that was left out."""
        return _read_failures(self._file)

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The text encoder's tokenizer, file by file."""
        return {name: data[:].tobytes() for name, data in self._file["tokenizer"].items()}

    def thumbnails(self) -> "Column | None":
        """A small JPEG of each picture, or None where the store was made without."""
        return Column(self._file["image/thumbnail"]) if "image/thumbnail" in self._file else None

    def copy_thumbnails(self, group: h5py.Group) -> None:
        """Writes the thumbnails, if there are any, into another file's ``group``."""
        if "image/thumbnail" in self._file:
            self._file.copy("image/thumbnail", group, without_attrs=True)

    def roles(self) -> Roles:
        """Who trains, who chooses, who reports. With a test split: dev chooses, test reports. Without one: a tenth of
        the train pictures, taken by a hash of their ids and so the same in every store of this dataset, chooses and
        dev reports.

        Raises:
            StoreError: no train pictures, or nothing to report on.
        """
        splits = np.array(self.image_splits)
        rows = {split: np.flatnonzero(splits == split) for split in ("train", "dev", "test")}
        report = "test" if len(rows["test"]) else "dev"
        if not len(rows["train"]) or not len(rows[report]):
            counts = ", ".join(f"{len(chosen)} {split}" for split, chosen in rows.items())
            raise StoreError(
                f"{self.path} has too few splits to fit and report on ({counts} pictures); extract "
                "more pictures (a larger --limit), or give the dataset a split column or the official lists"
            )
        if report == "test" and len(rows["dev"]):
            return Roles(rows["train"], rows["dev"], rows["test"], "dev", "test")
        chosen = np.array([_in_selection(self.image_ids[row]) for row in rows["train"]])
        if not chosen.any() or chosen.all():
            raise StoreError(
                f"{self.path} has {len(chosen)} train pictures; too few to set a tenth of "
                "them aside: extract more (a larger --limit)"
            )
        return Roles(rows["train"][~chosen], rows["train"][chosen], rows[report], SELECTION, report)

    def duplicates_across_splits(self) -> list[tuple[str, ...]]:
        """Ids of pictures with the same bytes that lie in different splits: what they teach leaks into the test."""
        groups: dict[str, list[int]] = {}
        for row, content in enumerate(self.sha256):
            groups.setdefault(content, []).append(row)
        return [
            tuple(self.image_ids[row] for row in rows)
            for rows in groups.values()
            if len({self.image_splits[row] for row in rows} - {""}) > 1
        ]

    def verify(self) -> list[str]:
        """What is wrong with the file: shapes, checksums, non-finite numbers, ids, splits, the caption map.

        Raises:
            StoreError: so damaged that it cannot be read to its end.
        """
        with _readable(self.path):
            return self._problems()

    def _problems(self) -> list[str]:
        problems = []
        n, m = len(self.image_ids), len(self.captions)
        for kind, rows in (("image", n), ("text", m)):
            for name, column in self._file[kind].items():
                if len(column) != rows:
                    problems.append(f"/{kind}/{name} has {len(column)} rows; {rows} expected")
        for name in _datasets(self._file):
            if self._file[name].attrs.get("sha256") != checksum(self._file[name]):
                problems.append(f"/{name} does not match its checksum")
        if self._file.attrs.get("attributes_sha256") != _attributes_checksum(self._file):
            problems.append("the attributes do not match their checksum")
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
        if m and not (self.image_index.min() >= (0 if n else -1) and self.image_index.max() < n):
            problems.append("/text/image_index points outside the pictures")
        if (
            dataset_fingerprint(self.image_ids, self.sha256, self.image_splits, self.captions, self.image_index)
            != self.fingerprints["dataset"]
        ):
            problems.append("the dataset's fingerprint does not match its rows")
        return problems


class Column(Sequence):
    """Rows of bytes in an HDF5 dataset of variable length, read when they are asked for; no file is kept open.

    Raises:
        StoreError: of every access, once another file has taken the place of the one that the dataset was opened in.
    """

    def __init__(self, dataset: h5py.Dataset):
        self._path, self._name = Path(dataset.file.filename), dataset.name
        self._file = _which(os.fstat(dataset.file.id.get_vfd_handle()))

    def __len__(self) -> int:
        with self._rows() as rows:
            return len(rows)

    def __getitem__(self, row: int) -> bytes:
        with self._rows() as rows:
            return rows[row].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        with self._rows() as rows:
            for block in row_blocks(len(rows)):
                yield from (data.tobytes() for data in rows[block])

    @contextlib.contextmanager
    def _rows(self) -> Iterator[h5py.Dataset]:
        with h5py.File(self._path, "r", locking=False) as file:
            if _which(os.fstat(file.id.get_vfd_handle())) != self._file:
                raise StoreError(f"{self._path} was replaced while it was in use; run the command again")
            yield file[self._name]


def _which(status: os.stat_result) -> tuple:
    """What tells one file from another at the same path."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def memory_mapped(dataset: h5py.Dataset) -> np.ndarray:
    """The values of a dataset that lies in its file in one piece, mapped and read-only: no memory is taken up by it.

    The file is the one that is open, whatever lies at its path by now.
    """
    offset = dataset.id.get_offset()
    if offset is None:  # nothing in it, or written by others in chunks
        return dataset[:]
    with os.fdopen(os.dup(dataset.file.id.get_vfd_handle()), "rb") as file:
        return np.memmap(file, mode="r", offset=offset, shape=dataset.shape, dtype=dataset.dtype)


def changed_settings(recipe: dict, before: dict) -> str:
    """The names of what differs between two recipes, for an error message."""
    return ", ".join(key for key in recipe if recipe[key] != before.get(key))


def dataset_fingerprint(ids, sha256, splits, captions, image_index) -> str:
    """SHA-256 over what the dataset is: pictures with content and split, captions with their pictures."""
    return digest([list(ids), list(sha256), list(splits), list(captions), np.asarray(image_index).tolist()])


def caption_ids(image_ids: list[str], image_index: np.ndarray) -> list[str]:
    """``<image id>#<n>`` for each caption, n counting the captions of its picture."""
    seen: dict[int, int] = {}
    names = []
    for image in image_index.tolist():
        seen[image] = seen.get(image, -1) + 1
        names.append(f"{image_ids[image]}#{seen[image]}")
    return names


def checksum(dataset: h5py.Dataset) -> str:
    """SHA-256 over a dataset's values, with lengths before values of variable length."""
    state = hashlib.sha256(str(dataset.shape).encode())
    for rows in row_blocks(len(dataset)):
        block = dataset[rows]
        if block.dtype != object:
            state.update(np.ascontiguousarray(block))
            continue
        for value in block:
            data = value if isinstance(value, bytes) else value.tobytes()
            state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


class RowSources:
    """Rows of one kind that were computed before, found by key, in shards and an earlier store.

    Only files whose features carry ``fingerprint`` and that hold all ``columns`` are used.
    """

    def __init__(self, kind: str, fingerprint: str, columns: tuple[str, ...]):
        self.kind, self.fingerprint, self.columns = kind, fingerprint, columns
        self._files: list[Path] = []
        self._where: dict[str, tuple[int, int]] = {}
        self.keys_by_stat: dict[tuple[str, int, int], str] = {}
        self.failures: dict[str, Failure] = {}

    def __contains__(self, key: str | None) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def add(self, path: Path) -> None:
        """Adds the rows of a shard or store, unless they are of other features."""
        with h5py.File(path, "r", locking=False) as file:
            group = file.get(self.kind)
            if group is None or group["features"].attrs["fingerprint"] != self.fingerprint:
                return
            self.failures |= {failure.id: failure for failure in _read_failures(file) if failure.stage == self.kind}
            if not len(group["features"]) or any(name not in group for name in self.columns):
                return
            for row, key in enumerate(_strings(group[KEYS[self.kind]])):
                self._where.setdefault(key, (len(self._files), row))
            if self.kind == "image":
                stats = zip(
                    _strings(group["id"]), group["size"][:].tolist(), group["mtime_ns"][:].tolist(), strict=True
                )
                self.keys_by_stat |= dict(zip(stats, _strings(group["sha256"]), strict=True))
            self._files.append(Path(path))

    def copy(self, keys: list[str], group: h5py.Group) -> None:
        """Writes the columns of the rows with ``keys``, in their order, into new datasets of ``group``."""
        if not keys and not self._files:  # a store of the other kind alone
            group["features"] = np.zeros((0, 0, 0) if self.kind == "image" else (0, 0), np.float32)
            group["truncated"] = np.zeros(0, bool)
            return
        for name in ("features", *self.columns):
            with h5py.File(self._files[0], "r", locking=False) as file:
                like = file[self.kind][name]
                target = group.create_dataset(name, (len(keys), *like.shape[1:]), dtype=like.dtype)
            for rows in row_blocks(len(keys)):
                _fill(target, rows, self.gather(name, keys[rows]))

    def gather(self, name: str, keys: list[str]) -> np.ndarray:
        """The values of the rows with ``keys``, one file open at a time: there can be more than a process may open."""
        places = np.array([self._where[key] for key in keys])
        block = None
        for number in np.unique(places[:, 0]):
            chosen = np.flatnonzero(places[:, 0] == number)
            rows, inverse = np.unique(places[chosen, 1], return_inverse=True)
            with h5py.File(self._files[number], "r", locking=False) as file:
                values = file[self.kind][name][rows][inverse]
            if block is None:
                block = np.empty((len(keys), *values.shape[1:]), dtype=values.dtype)
            block[chosen] = values
        return block


def write_shard(path: Path, kind: str, columns: dict, recipe: dict, failures: Iterable[Failure]) -> None:
    """Writes finished rows as one small HDF5 file, whole or not at all.

    ``columns``: name -> array or list, among them ``features``, which gets the recipe. Zero rows are allowed: a shard
    whose records all failed keeps their ledger.
    """
    buffer = io.BytesIO()  # so that a full disk fails in a plain write, not inside HDF5
    with h5py.File(buffer, "w") as file:
        group = file.create_group(kind)
        for name, values in columns.items():
            write_column(group, name, values)
        _stamp(group["features"], recipe, {})
        _write_failures(file, failures)
    with whole_file(path) as aside:
        aside.write_bytes(buffer.getbuffer())


def seal(
    path: Path,
    *,
    images: dict,
    texts: dict,
    sources: dict[str, RowSources],
    recipes: dict[str, dict],
    provenance: dict,
    failures: list[Failure],
    tokenizer_files: dict[str, bytes],
) -> None:
    """Writes the finished store, whole or not at all. Memory stays at a block of rows, however large the store.

    ``images`` holds the columns id, path, split, sha256, size, mtime_ns and ``texts`` caption, image_index; features
    and the other columns come from ``sources``, by key, or from whatever else has their ``copy``.
    """
    fingerprint = dataset_fingerprint(
        images["id"], images["sha256"], images["split"], texts["caption"], texts["image_index"]
    )
    with whole_file(path) as aside, h5py.File(aside, "w") as file:
        file.attrs["format"], file.attrs["format_version"] = STORE_FORMAT, STORE_VERSION
        file.attrs["dataset_fingerprint"] = fingerprint
        file.attrs["provenance"] = json.dumps(provenance)
        for kind, columns in (("image", images), ("text", texts)):
            group = file.create_group(kind)
            for name, values in columns.items():
                write_column(group, name, values)
            sources[kind].copy(columns[KEYS[kind]], group)
            _stamp(group["features"], recipes[kind], provenance[kind])
        file.create_group("tokenizer")
        for name, data in tokenizer_files.items():
            file.create_dataset(f"tokenizer/{name}", data=np.frombuffer(data, dtype=np.uint8))
        _write_failures(file, failures)
        for name in _datasets(file):
            file[name].attrs["sha256"] = checksum(file[name])
        file.attrs["attributes_sha256"] = _attributes_checksum(file)


def describe_shard(path: Path) -> tuple[str, str, list[str]]:
    """A shard's kind, the fingerprint of its features, and the keys of its rows."""
    with h5py.File(path, "r", locking=False) as file:
        kind = next(kind for kind in KINDS if kind in file)
        group = file[kind]
        return kind, group["features"].attrs["fingerprint"], _strings(group[KEYS[kind]])


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what h5py and the decoders raise on a damaged file into an error with a way out."""
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StoreError(f"{path} is damaged ({reason}); remove it and extract again") from error


def _attributes_checksum(file: h5py.File) -> str:
    """SHA-256 over the file's and every dataset's attributes, this one aside."""
    holders = {"/": file, **{name: file[name] for name in _datasets(file)}}
    return digest(
        {
            holder: {key: str(value) for key, value in item.attrs.items() if key != "attributes_sha256"}
            for holder, item in holders.items()
        }
    )


def _open(path: Path) -> h5py.File:
    if path.is_dir():
        raise StoreError(f"{path} is a folder; a feature store is one .h5 file")
    if not path.exists():
        if parts_folder(path).exists():
            raise StoreError(f"{path} is unfinished; run the same extract command again to go on with it")
        raise StoreError(
            f"there is no feature store at {path}; make one: python cli.py extract --data DIR --store {path}"
        )
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise StoreError(f"{path} is no HDF5 file, or a damaged one ({str(error).splitlines()[0]})") from error
    try:
        with _readable(path):
            kind, version = file.attrs.get("format"), file.attrs.get("format_version")
    except StoreError:
        file.close()
        raise
    if (kind, version) != (STORE_FORMAT, STORE_VERSION):
        file.close()
        if kind != STORE_FORMAT:
            raise StoreError(f"{path} is an HDF5 file, but no feature store; make one with extract")
        raise StoreError(f"{path} has the format version {version}; this program reads {STORE_VERSION}: extract again")
    return file


def _in_selection(image_id: str) -> bool:
    return hashlib.sha256(f"select:{image_id}".encode()).digest()[0] < 256 / 10


def row_blocks(rows: int) -> Iterator[slice]:
    """The rows as slices of at most ``BLOCK``."""
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))


def _strings(dataset: h5py.Dataset) -> list[str]:
    return dataset.asstr()[:].tolist()


def _datasets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def write_column(group: h5py.Group, name: str, values) -> None:
    """Writes an array, strings or bytes as a dataset."""
    if isinstance(values, np.ndarray):
        group.create_dataset(name, data=values)
    elif len(values) and isinstance(values[0], bytes):
        column = group.create_dataset(name, (len(values),), dtype=_BYTES)
        _fill(column, slice(0, len(values)), (np.frombuffer(data, dtype=np.uint8) for data in values))
    else:
        group.create_dataset(name, data=np.array(values, dtype=object), shape=(len(values),), dtype=_STRING)


def _fill(target: h5py.Dataset, rows: slice, block) -> None:
    if h5py.check_vlen_dtype(target.dtype) == np.uint8:  # h5py's own way takes equally long values for a matrix
        values = np.empty(rows.stop - rows.start, dtype=object)
        for place, data in zip(range(len(values)), block, strict=True):
            values[place] = data
        space = target.id.get_space()
        space.select_hyperslab((rows.start,), values.shape)
        target.id.write(h5py.h5s.create_simple(values.shape), space, values, h5py.h5t.py_create(target.dtype))
    else:
        target[rows] = block


def _stamp(features: h5py.Dataset, recipe: dict, provenance: dict) -> None:
    features.attrs["recipe"] = json.dumps(recipe, sort_keys=True)
    features.attrs["fingerprint"] = digest(recipe)
    features.attrs["provenance"] = json.dumps(provenance, sort_keys=True)


def _write_failures(file: h5py.File, failures: Iterable[Failure]) -> None:
    failures = list(failures)
    group = file.create_group("failures")
    for name in ("id", "stage", "reason"):
        write_column(group, name, [_printable(getattr(failure, name)) for failure in failures])
    for name in ("size", "mtime_ns"):
        write_column(group, name, np.array([getattr(failure, name) for failure in failures], dtype=np.int64))


def _printable(text: str) -> str:
    """``text`` as HDF5 can hold it: file names need not be UTF-8, and neither they nor captions be free of NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _read_failures(file: h5py.File) -> list[Failure]:
    group = file["failures"]
    columns = [_strings(group[name]) for name in ("id", "stage", "reason")]
    columns += [group[name][:].tolist() for name in ("size", "mtime_ns")]
    return [Failure(*row) for row in zip(*columns, strict=True)]
