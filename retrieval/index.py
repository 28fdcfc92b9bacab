"""faiss: exact search over arrays, and an index on disk for one gallery. The only importer of faiss.

An index is a folder of immutable *segments*, each a faiss file and a file of its rows. A manifest lists them, with the
rows that were removed since, and ``CURRENT`` names the manifest. Adding writes a segment, removing a list of
tombstones, compacting one segment in the place of all; each time the new version appears by renaming ``CURRENT``, and
who reads an older one goes on undisturbed. faiss trusts the bytes it is given (damaged ones can end the process), so
every file is checked against the manifest's SHA-256 before it sees them.

A folder is written to only if it is empty or an index. ``pending.json`` names the files that are being written, so that
after a kill they can be told from other people's, which are never removed.
"""

import contextlib
import copy
import hashlib
import io
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import faiss
import h5py
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth
from tqdm import tqdm

from onceover.base.errors import OnceoverError
from onceover.base.files import (
    MAX_TEXT,
    FileError,
    digest,
    file_sha256,
    only_writer,
    open_regular,
    read_bytes,
    read_json,
    read_record,
    whole_file,
    write_bytes,
    write_json,
    write_record,
)
from onceover.base.formats import CURRENT, INDEX_FORMAT, INDEX_VERSION
from onceover.base.hdf5 import open_hdf5, write_column, write_hdf5
from onceover.base.outputs import claim_folder
from onceover.retrieval.exact import checked_queries

if TYPE_CHECKING:
    from onceover.retrieval.embeddings import Gallery

# with its own default (128,000) faiss takes no BLAS for a batch of queries, and a fifth of the speed
faiss.cvar.distance_compute_blas_threshold = 4

TYPES = ("flat", "hnsw", "ivf", "ivfpq")
MIN_RECALL = 0.95  # recall@10 under which an approximate index is refused
FLAT_ROWS = 100_000  # up to here exact search answers within milliseconds
SMALL_SEGMENT = 10_000  # so few new rows are searched exactly beside an approximate index
MAX_SEGMENTS = 16  # beyond which an update builds anew
_TRAINABLE = 256  # rows under which a segment is flat, whatever the index's type
_EQUAL = 1e-5  # scores that differ by less are equal; the arithmetic of faiss's types differs by some 1e-6
_AGAIN = "build it again: index with --force"
_PENDING = "pending.json"  # names the files that are being written
_PENDING_FORMAT = "onceover index, files under way"
_SEGMENT_FILE = re.compile(r"\d{6}\.(faiss|h5)|\d{6}-[0-9a-f]{12}\.npy")
_MANIFEST_FILE = re.compile(r"manifest-([0-9a-f]{12})\.json")
_HALF = 0.5  # of the indexed items, more than which do not vanish by themselves
_FIRST_BYTES = {"flat": b"IxFI", "hnsw": b"IHNf", "ivf": b"IwFl", "ivfpq": b"IxPT"}  # of faiss's files
_CLASSES = {
    "flat": faiss.IndexFlatIP,
    "hnsw": faiss.IndexHNSWFlat,
    "ivf": faiss.IndexIVFFlat,
    "ivfpq": faiss.IndexPreTransform,
}
_K = 10
_LINKS = 32  # of an HNSW node (Malkov and Yashunin 2018); twice as many in its bottom layer
_BUILD_EFFORT = 100  # nodes kept in sight while links are laid
_CODE_DIMS = 4  # dimensions that share a 4-bit code of the product quantizer (Jégou et al. 2011, André et al. 2017)
_CANDIDATES = 16  # of a quantized index, scored exactly for each hit that is wanted or each cell that is visited
_BLOCK = 16_384  # rows added or read at a time
_EFFORTS = {  # what is tried until recall suffices: nodes kept in sight, cells visited
    "flat": (0,),
    "hnsw": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "ivf": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "ivfpq": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
}


class IndexingError(OnceoverError):
    """An index that is missing, damaged, of another space, or not good enough."""


def choose_type(rows: int, dim: int, memory: int) -> tuple[str, str]:
    """The type of index for a gallery and a budget in bytes, and the reason.

    Raises:
        IndexingError: not even quantized vectors fit.
    """
    sizes = {name: _bytes(name, rows, dim) for name in TYPES}
    fits = {name: f"takes {size / 2**20:,.0f} of {memory / 2**20:,.0f} MiB" for name, size in sizes.items()}
    if rows <= FLAT_ROWS and sizes["flat"] <= memory:
        return "flat", f"exact search over {rows:,} rows answers within milliseconds, and {fits['flat']}"
    for name, why in (("hnsw", "the fastest search"), ("ivf", "no room for links"), ("ivfpq", "no room for vectors")):
        if sizes[name] <= memory:
            return name, f"{rows:,} rows: {why}, it {fits[name]}"
    raise IndexingError(
        f"{rows:,} rows do not fit the budget: even quantized, the index {fits['ivfpq']}; raise --memory"
    )


def _bytes(kind: str, rows: int, dim: int) -> int:
    """What a segment takes in memory; the vectors that ivfpq reads to score candidates again stay on the disk."""
    vector, code = 4 * dim, -(-dim // _CODE_DIMS) // 2
    each = {"flat": vector, "hnsw": vector + 8 * _LINKS + 16, "ivf": vector + 8, "ivfpq": code + 8}[kind]
    return rows * each + (4 * dim * _cells(rows) if kind.startswith("ivf") else 0)


def _cells(rows: int) -> int:
    return max(1, round(2 * rows**0.5))


@dataclass(frozen=True)
class Update:
    """What writing an index did: rows by what became of them, the manifest, and whether nothing had to be done."""

    added: int
    removed: int
    rows: int
    manifest: dict
    up_to_date: bool = False


class Index:
    """An index on disk, memory-mapped, open for searching.

    Attributes:
        kind: ``image`` or ``text``. biased: whether a query gets a 1 for one more coordinate. space: whose vectors.
        manifest: all that is known about it, as plain values.

    Raises:
        IndexingError: nothing there, of another version, or a file that does not match its SHA-256.
    """

    _shows_thumbnails = True

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.kind, self.biased, self.space = (self.manifest[key] for key in ("kind", "biased", "space"))
        self.segments = [_Segment(folder, entry, self.manifest["dim"]) for entry in self.manifest["segments"]]
        self._starts = np.cumsum([0, *(segment.size for segment in self.segments)])

    def __len__(self) -> int:
        return sum(int(segment.alive.sum()) for segment in self.segments)

    def ids(self) -> list[str]:
        """The ids of all items, removed ones left out."""
        return [name for segment in self.segments for name in segment.living("id")]

    def captions(self) -> list[str]:
        """The captions of all items, removed ones left out."""
        of_rows = [captions for segment in self.segments for captions in segment.captions()]
        return [caption for captions in of_rows for caption in captions]

    def search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and rows, best first, for each of the queries, float32 (Q, D): ``k`` of them, or all there are."""
        queries = checked_queries(queries, self.manifest["dim"])
        found = [segment.search(queries, k) for segment in self.segments]
        scores = np.concatenate([scores for scores, _ in found], axis=1)
        rows = np.concatenate([rows + (rows >= 0) * start for (_, rows), start in zip(found, self._starts)], axis=1)  # noqa: B905
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        hits = zip(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1), strict=True)
        return [(score[row >= 0], row[row >= 0]) for score, row in hits]

    def contents_of(self, rows: list[int]) -> list[str]:
        """For each of the rows what is equal where two look the same."""
        rows_, contents = np.asarray(rows, int), np.empty(len(rows), object)
        number = np.searchsorted(self._starts, rows_, side="right") - 1
        for each in np.unique(number):
            mine = np.flatnonzero(number == each)
            wanted, back = np.unique(rows_[mine] - self._starts[each], return_inverse=True)
            contents[mine] = _text(self.segments[each].rows["content"])[wanted][back]
        return contents.tolist()

    def item(self, row: int) -> dict:
        """What a hit shows of a row: id, path, captions, thumbnail."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        segment = self.segments[number]
        first = row - int(self._starts[number])
        thumbnail = segment.thumbnail(first) if self._shows_thumbnails else b""
        return segment.item(first) | {"thumbnail": thumbnail or None}

    def without_thumbnails(self) -> "Index":
        """The same index, whose items come without their thumbnails."""
        plain = copy.copy(self)
        plain._shows_thumbnails = False
        return plain


class _Segment:
    """One faiss file with its rows. faiss never adds to a mapped index: it would end the process."""

    def __init__(self, folder: Path, entry: dict, dim: int):
        self.type: str = entry["type"]
        self.effort: int = entry["effort"]
        self.size: int = entry["rows"]
        self.dim = dim
        for name, wanted in entry["files"].items():
            _check_file(folder / name, wanted)
        rows_file = folder / f"{entry['name']}.h5"
        self._index = _open_faiss(folder / f"{entry['name']}.faiss", self.type, self.size, dim)
        self.rows = _open_rows(rows_file, self.type, self.size, dim)
        self.alive = np.ones(self.size, bool)
        if entry["removed"]:
            self.alive[_read_tombstones(folder / entry["removed"], self.size)] = False
        self._bits = np.packbits(self.alive, bitorder="little")
        self._selector = None if self.alive.all() else faiss.IDSelectorBitmap(self._bits)
        self._vectors = None
        if self.type == "ivfpq":
            column = self.rows["vectors"]
            where = {"offset": column.id.get_offset(), "shape": column.shape, "dtype": column.dtype}
            self._vectors = np.memmap(rows_file, mode="r", **where)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, k), -inf where there is none, and rows (Q, k), -1 there; every query finds all that it can."""
        wanted = k if self._vectors is None else _CANDIDATES * max(k, self.effort)
        with _faiss_errors("the index"):
            scores, rows = self._index.search(queries, min(wanted, self.size), params=self._parameters())
        if rows.max(initial=-1) >= self.size:
            raise IndexingError(f"the index names rows that it does not hold: it is damaged; {_AGAIN}")
        if self._vectors is not None:
            scores, rows = self._rescored(queries, rows, k)
        scores, rows = (_padded(part, k, fill) for part, fill in ((scores, -np.inf), (rows, -1)))
        short = np.flatnonzero((rows >= 0).sum(1) < min(k, self.alive.sum()))
        if len(short):  # an approximate search met too few rows that are still alive
            exact_scores, exact_rows = self.exact(queries[short], k)
            scores[short], rows[short] = _padded(exact_scores, k, -np.inf), _padded(exact_rows, k, -1)
        scores[rows < 0] = -np.inf
        return scores, rows

    def exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact search over the rows that are alive."""
        alive = np.flatnonzero(self.alive)
        k = min(k, len(alive))
        if not k:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        scores, rows = knn_ground_truth(queries, self.vectors(), k, metric_type=faiss.METRIC_INNER_PRODUCT)
        return scores, alive[rows]

    def vectors(self) -> Iterator[np.ndarray]:
        """The vectors that are alive, in order, block by block."""
        for start in range(0, self.size, _BLOCK):
            count = min(_BLOCK, self.size - start)
            if self._vectors is not None:
                block = np.asarray(self._vectors[start : start + count])
            else:
                with _faiss_errors("the index"):
                    block = self._index.reconstruct_n(start, count)
            if self.alive[start : start + count].any():
                yield np.ascontiguousarray(block[self.alive[start : start + count]])

    def item(self, row: int) -> dict:
        """What a hit shows of a row, but for its thumbnail."""
        first, last = self.rows["caption_offset"][row : row + 2]
        captions = _text(self.rows["caption"])[first:last].tolist()
        return {"id": _text(self.rows["id"])[row], "path": _text(self.rows["path"])[row], "captions": captions}

    def thumbnail(self, row: int) -> bytes:
        """A row's JPEG, empty where it has none."""
        return self.rows["thumbnail"][row].tobytes() if "thumbnail" in self.rows else b""

    def captions(self) -> list[list[str]]:
        """The captions of each row that is alive."""
        said = _text(self.rows["caption"])[:].tolist()
        offsets = self.rows["caption_offset"][:].tolist()
        return [said[offsets[row] : offsets[row + 1]] for row in np.flatnonzero(self.alive)]

    def living(self, name: str) -> list[str]:
        """A column of strings, of the rows that are alive."""
        return _text(self.rows[name])[:][self.alive].tolist()

    def _parameters(self):
        if self.type == "flat":
            return faiss.SearchParameters(sel=self._selector)
        if self.type == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=self.effort, sel=self._selector)
        cells = faiss.SearchParametersIVF(nprobe=self.effort, sel=self._selector)
        return cells if self.type == "ivf" else faiss.SearchParametersPreTransform(index_params=cells)

    def _rescored(self, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` candidates with the best exact scores, query by query, so that memory holds those of one.

        Not by a matrix product: BLAS's threads go on spinning after it, and faiss's wait for them at the next query.
        """
        scores = np.full((len(queries), k), -np.inf, np.float32)
        found = np.full((len(queries), k), -1, rows.dtype)
        for query, candidates, best, nearest in zip(queries, rows, scores, found, strict=True):
            candidates = candidates[candidates >= 0]
            exact = np.einsum("cd,d->c", self._vectors[candidates], query)
            order = np.argsort(-exact, kind="stable")[:k]
            best[: len(order)], nearest[: len(order)] = exact[order], candidates[order]
        return scores, found


def _text(column: h5py.Dataset):
    """A column of strings; bytes that are no UTF-8, which nobody wrote here, are replaced."""
    return column.asstr(errors="replace")


@contextlib.contextmanager
def _faiss_errors(what: object) -> Iterator[None]:
    """Turns what faiss raises into one line."""
    try:
        yield
    except RuntimeError as error:
        raise IndexingError(f"{what} cannot be used by faiss: it is damaged; {_AGAIN}") from error


def _open_faiss(path: Path, kind: str, size: int, dim: int) -> faiss.Index:
    """Opens a faiss file, mapped, if it is one of the kind that is written here: others can end the process."""
    with open_regular(path) as file:
        first = file.read(4)
    if first == _FIRST_BYTES[kind]:
        with _faiss_errors(path):
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if type(index) is _CLASSES[kind] and _is_described(index, kind, size, dim):
            return index
    raise IndexingError(f"{path} is not the index that its manifest describes; {_AGAIN}")


def _is_described(index: faiss.Index, kind: str, size: int, dim: int) -> bool:
    if (index.ntotal, index.d, index.metric_type) != (size, dim, faiss.METRIC_INNER_PRODUCT):
        return False
    if kind == "hnsw":
        storage = faiss.downcast_index(index.storage)
        return isinstance(storage, faiss.IndexFlat) and storage.ntotal == size
    if kind == "ivfpq":
        padding = faiss.downcast_VectorTransform(index.chain.at(0)) if index.chain.size() == 1 else None
        coded = faiss.downcast_index(index.index)
        is_ours = isinstance(padding, faiss.RemapDimensionsTransform) and isinstance(coded, faiss.IndexIVFPQFastScan)
        return is_ours and coded.ntotal == size
    return True


def _open_rows(path: Path, kind: str, size: int, dim: int) -> h5py.File:
    """Opens a segment's rows, if they are as many and as complete as its manifest says."""
    try:
        file = open_hdf5(path)
    except OSError as error:
        raise IndexingError(f"{path} cannot be read ({str(error).splitlines()[0]}); {_AGAIN}") from error
    try:
        _check_rows(file, kind, size, dim)
    except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        file.close()
        raise IndexingError(f"{path} does not hold the rows that its manifest describes; {_AGAIN}") from error
    return file


def _check_rows(file: h5py.File, kind: str, size: int, dim: int) -> None:
    """Refuses columns of other lengths or types than are written here, with a ValueError."""
    for name in ("id", "path", "content", "key", "caption"):
        if h5py.check_string_dtype(file[name].dtype) is None or file[name].ndim != 1:
            raise ValueError(f"{name} holds no strings")
        if name != "caption" and len(file[name]) != size:
            raise ValueError(f"{name} has another number of rows")
    offsets = file["caption_offset"][:]
    if offsets.shape != (size + 1,) or offsets.dtype.kind != "i" or (np.diff(offsets) < 0).any():
        raise ValueError("caption_offset is not in order")
    if offsets[0] != 0 or offsets[-1] != len(file["caption"]):
        raise ValueError("caption_offset does not fit the captions")
    if "thumbnail" in file and (file["thumbnail"].shape != (size,) or file["thumbnail"].dtype.kind != "O"):
        raise ValueError("thumbnail has another number of rows")
    if kind == "ivfpq":
        vectors = file["vectors"]
        if vectors.shape != (size, dim) or vectors.dtype != np.float32 or vectors.id.get_offset() is None:
            raise ValueError("vectors do not fit the index")


def _read_tombstones(path: Path, size: int) -> np.ndarray:
    """The numbers of removed rows, int64 (R,).

    Raises:
        IndexingError: no such array, or rows that a segment of ``size`` rows has not.
    """
    try:
        rows = np.load(io.BytesIO(read_bytes(path, 8 * size + 4096)), allow_pickle=False)
    except Exception as error:  # of NumPy's parser anything
        raise IndexingError(f"{path} holds no list of removed rows; {_AGAIN}") from error
    is_list = isinstance(rows, np.ndarray) and rows.dtype == np.int64 and rows.ndim == 1
    if not is_list or rows.min(initial=0) < 0 or rows.max(initial=0) >= size:
        raise IndexingError(f"{path} holds no list of removed rows; {_AGAIN}")
    return rows


def read_manifest(folder: str | Path) -> dict:
    """The current manifest of an index.

    Raises:
        IndexingError: no index there, of another version, or a pointer or manifest that is damaged.
    """
    folder = Path(folder)
    if not (folder / CURRENT).is_file():
        raise IndexingError(f"there is no index at {folder}; onceover index makes one")
    current = _read_json(folder / CURRENT, "the index's pointer")
    if (current.get("format"), current.get("format_version")) != (INDEX_FORMAT, INDEX_VERSION):
        raise IndexingError(f"{folder} is no index of the format {INDEX_VERSION}; {_AGAIN}")
    name, sha256 = current.get("manifest"), current.get("sha256")
    if not isinstance(name, str) or not _MANIFEST_FILE.fullmatch(name) or not isinstance(sha256, str):
        raise IndexingError(f"{folder / CURRENT} names no manifest: it is damaged; {_AGAIN}")
    _check_file(folder / name, sha256)
    manifest = _read_json(folder / name, "the index's manifest")
    problem = _problem_of(manifest)
    if problem:
        raise IndexingError(f"{folder / name} is damaged: {problem}; {_AGAIN}")
    return manifest


def _read_json(path: Path, what: str) -> dict:
    try:
        return read_json(path, what)
    except FileError as error:
        raise IndexingError(f"{error}; {_AGAIN}") from error


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**40


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_string(value) -> bool:
    return isinstance(value, str)


_FIELDS = {  # of a manifest, with what each has to be
    "kind": lambda value: value in ("image", "text"),
    "biased": lambda value: isinstance(value, bool),
    "dim": lambda value: _is_count(value) and value > 0,
    "space": _is_string,
    "type": lambda value: value in TYPES,
    "asked": lambda value: value in (*TYPES, "auto"),
    "reason": _is_string,
    "min_recall": _is_number,
    "source": _is_string,
    "run": _is_string,
    "rows": _is_count,
    "recall@10": _is_number,
    "queries_per_second": _is_number,
    "probes": _is_count,
    "segments": lambda value: isinstance(value, list) and len(value) > 0,
}
_SEGMENT_FIELDS = {
    "name": lambda value: _is_string(value) and re.fullmatch(r"\d{6}", value) is not None,
    "type": lambda value: value in TYPES,
    "effort": lambda value: _is_count(value) and value <= 2**16,
    "rows": lambda value: _is_count(value) and value > 0,
    "removed": lambda value: value is None or (_is_string(value) and value.endswith(".npy")),
    "files": lambda value: isinstance(value, dict),
}


def _problem_of(manifest: dict) -> str | None:
    """The first thing that is wrong with a manifest, or None."""
    parts = [(manifest, _FIELDS)]
    segments = manifest.get("segments")
    parts += [(entry, _SEGMENT_FIELDS) for entry in (segments if isinstance(segments, list) else [])]
    for part, fields in parts:
        if not isinstance(part, dict):
            return "a segment is no object"
        for key, is_right in fields.items():
            if key not in part or not is_right(part[key]):
                return f"{key} is missing, or not what it has to be"
    for entry in segments:
        names = {f"{entry['name']}.faiss", f"{entry['name']}.h5"} | ({entry["removed"]} - {None})
        if set(entry["files"]) != names or not all(map(_SEGMENT_FILE.fullmatch, names)):
            return f"the files of segment {entry['name']} are not those of a segment"
    return None


def claim_index(folder: str | Path, names: Iterable[str]) -> None:
    """Makes an absent or empty folder one for the galleries of an index; one that holds an index stays as it is.

    Args:
        names: of the galleries' folders in it.

    Raises:
        IndexingError, OutputError: it, or a gallery's folder in it, holds something else.
    """
    galleries = [Path(folder) / name for name in names]
    for gallery in galleries:
        check_folder(gallery)
    if not any(map(_is_index, galleries)):
        claim_folder(folder, "name another folder for the index")


def check_folder(folder: str | Path) -> None:
    """Refuses a folder that holds something else than an index; hidden files do not count.

    Raises:
        IndexingError: files of somebody else's.
    """
    folder = Path(folder)
    if not folder.exists() or _is_index(folder):
        return
    if not folder.is_dir():
        raise IndexingError(f"{folder} is no folder; name another folder for the index")
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise IndexingError(f"{folder} is not empty and no index; name another folder for the index")


def _is_index(folder: Path) -> bool:
    """Whether a folder holds a pointer of this program's, or, where that is damaged, a manifest or files under way."""
    with contextlib.suppress(FileError):
        if read_json(folder / CURRENT, "the index's pointer").get("format") == INDEX_FORMAT:
            return True
    with contextlib.suppress(IndexingError):
        if _pending(folder):
            return True
    return bool(_manifests(folder))


def _manifests(folder: Path) -> dict[str, dict]:
    """The manifests in a folder that were written by this program: their names are digests of their content."""
    manifests = {}
    for path in folder.glob("manifest-*.json"):
        name = _MANIFEST_FILE.fullmatch(path.name)
        if name is None or not path.is_file():
            continue
        try:
            manifest = read_json(path, "a manifest")
        except FileError:
            continue
        if digest(manifest)[:12] == name[1] and _problem_of(manifest) is None:
            manifests[path.name] = manifest
    return manifests


def _pending(folder: Path) -> list[str]:
    """The files that were being written when a process was killed.

    Raises:
        IndexingError: the list is damaged, or a file of somebody else's.
    """
    path = folder / _PENDING
    if not path.exists():
        return []
    try:
        record = read_record(path, "the list of files under way")
    except FileError as error:
        raise IndexingError(f"{error}; move it elsewhere") from error
    names = record.get("files")
    if record.get("format") != _PENDING_FORMAT or not isinstance(names, list):
        raise IndexingError(f"{path} is no list of this program's; move it elsewhere")
    return [name for name in names if _is_string(name) and _is_ours(name)]


def _is_ours(name: str) -> bool:
    """Whether a name is one that this program gives to files of an index."""
    return bool(_SEGMENT_FILE.fullmatch(name) or _MANIFEST_FILE.fullmatch(name))


def check_vanished(folder: str | Path, items: Iterable[str], source: str) -> None:
    """Refuses to go on where so many items have vanished that a disk may not be mounted.

    That is more than half of the items of the index in ``folder``, or all images of a subfolder.

    Args:
        items: ids of the images, or the captions, that are in ``source`` now.

    Raises:
        IndexingError: so many have vanished, or a damaged index.
    """
    if not (Path(folder) / CURRENT).exists():
        return
    index = Index(folder)
    now = set(items)
    empty: list[str] = []
    if index.kind == "image":
        noun, before = "images", index.ids()
        empty = sorted(_subfolders(before) - _subfolders(now), key=lambda name: (name.count("/"), name))
    else:
        noun, before = "captions", index.captions()
    gone = [name for name in before if name not in now]
    if len(gone) <= _HALF * len(before) and not empty:
        return
    where = f" (no image of {empty[0]}/ is there)" if empty else ""
    raise IndexingError(
        f"{len(gone):,} of {len(before):,} indexed {noun} are no longer in {source}{where}; is a disk not mounted? "
        "--prune drops them, --force goes on without them and keeps their features"
    )


def _subfolders(ids: Iterable[str]) -> set[str]:
    """All folders, whole paths, that hold one of the images or a folder that does."""
    return {str(parent) for name in ids for parent in PurePosixPath(name).parents} - {"."}


def check_origin(folder: str | Path, source: str, run: str, space: str, force: bool = False) -> dict | None:
    """The manifest of the index that is there, if there is one; ``force`` overlooks a damaged one.

    A run that was fitted again may replace what it made before; another run may not.

    Raises:
        IndexingError: it is an index of something else or by another run, or damaged, and ``force`` is not given.
    """
    if not (Path(folder) / CURRENT).exists():
        return None
    try:
        before = read_manifest(folder)
    except IndexingError:
        if force:
            return None
        raise
    if before["source"] != source and not force:
        raise IndexingError(f"{folder} indexes {before['source']}, not {source}; name another --index, or --force")
    if before["run"] != run and before["space"] != space and not force:
        raise IndexingError(
            f"{folder} was made with the run {before['run']}; name that one, another --index, or --force"
        )
    return before


def update(
    folder: str | Path,
    gallery: "Gallery",
    probes: np.ndarray,
    *,
    source: str,
    run: str,
    kind: str | None = None,
    memory: int,
    min_recall: float | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Update:
    """Makes the index hold what ``gallery`` holds: new rows join, changed ones are replaced, missing ones removed.

    It is built anew where that is simpler: after other heads, another type, or when more than half would change.

    Args:
        probes: queries of the other modality, float32 (Q, D): recall and speed are measured with them.
        source: what the gallery was made from. run: the run folder whose heads made it, for later queries.
        kind: one of ``TYPES``, or auto; by default what was asked for before, or auto.
        memory: bytes the index may take, which auto goes by.
        min_recall: recall@10 against exact search under which an approximate index is refused; by default what was
            asked for before, or ``MIN_RECALL``.
        force: replace an index of another source, or a damaged one.

    Raises:
        IndexingError: another source, ids that are not unique, too low a recall, or a folder of something else.
        OSError: a full disk; the index that was there is still there.
    """
    folder = Path(folder)
    if len(set(gallery.ids)) < len(gallery.ids):
        raise IndexingError("several items of the gallery have the same id")
    if not len(gallery):
        raise IndexingError(f"{source} holds nothing to index")
    with _writing(folder) as files:
        before = check_origin(folder, source, run, gallery.space, force)
        about = _request(gallery, before, kind, memory, min_recall) | {"source": source, "run": run}
        say(f"{folder}: {about['type']} ({about['reason']})")
        segments = _still_good(folder, before, about, force, say)
        keys = _keys(gallery)
        kept = {key for segment in segments for key in segment.living("key")}
        new, gone = [row for row, key in enumerate(keys) if key not in kept], kept.difference(keys)
        result = {"added": len(new), "removed": len(gone), "rows": len(gallery)}
        if segments and not new and not gone and all(before[key] == about[key] for key in about):
            return Update(**result, manifest=before, up_to_date=True)
        entries = [dict(entry) for entry in before["segments"]] if segments else []
        buried = sum(segment.size for segment in segments) - len(kept) + len(gone)
        if len(new) + buried > len(gallery) / 2 or len(entries) >= MAX_SEGMENTS:
            entries, new = [], list(range(len(gallery)))
        for entry, segment in zip(entries, segments, strict=False):
            _bury(files, entry, segment, gone)
        if new:
            part = gallery.take(np.array(new)) if len(new) < len(gallery) else gallery
            small = entries and len(new) <= SMALL_SEGMENT
            chosen = "flat" if small else about["type"]
            entries.append(_write_segment(files, part, [keys[row] for row in new], chosen))
        return Update(**result, manifest=_publish(files, about, entries, probes, say))


def remove(
    folder: str | Path, ids: list[str], probes: np.ndarray, say: Callable[[str], None] = lambda _: None
) -> Update:
    """Removes rows by id: a tombstone each, so that searches pass them over.

    Raises:
        IndexingError: an id that is not in the index, or one that would be left empty.
    """
    folder, wanted = Path(folder), set(ids)
    with _writing(folder) as files:
        index = Index(folder)
        named = [list(zip(segment.living("id"), segment.living("key"), strict=True)) for segment in index.segments]
        keys = {name: key for pairs in named for name, key in pairs}
        missing = sorted(wanted.difference(keys))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise IndexingError(f"{folder} holds no {missing[0]!r}{more}")
        if len(wanted) == len(keys):
            raise IndexingError(f"that would leave nothing in {folder}; remove the folder instead")
        entries = [dict(entry) for entry in index.manifest["segments"]]
        for entry, segment in zip(entries, index.segments, strict=True):
            _bury(files, entry, segment, {keys[name] for name in wanted})
        manifest = _publish(files, index.manifest, entries, probes, say)
    return Update(0, len(wanted), len(keys) - len(wanted), manifest)


def compact(
    folder: str | Path, probes: np.ndarray, say: Callable[[str], None] = lambda _: None, keep_last: bool = True
) -> Update:
    """Writes one segment in the place of all, without the rows that were removed.

    Args:
        keep_last: keep the files of the version before, for those who have it open; without them nothing of what was
            removed is left in the folder.
    """
    from onceover.retrieval.embeddings import Gallery, Lazy

    folder = Path(folder)
    with _writing(folder) as files:
        index = Index(folder)
        buried = sum(segment.size for segment in index.segments) - len(index)
        if len(index.segments) == 1 and not buried:
            if not keep_last:
                _sweep(files, {_pointer(folder)})
            return Update(0, 0, len(index), index.manifest, up_to_date=True)
        say(f"{folder}: writing {len(index):,} rows anew ({index.manifest['type']})")
        columns: dict[str, list] = {
            name: [value for segment in index.segments for value in segment.living(name)]
            for name in ("id", "path", "key", "content")
        }
        captions = [said for segment in index.segments for said in segment.captions()]
        alive = [(segment, row) for segment in index.segments for row in np.flatnonzero(segment.alive).tolist()]
        pictured = any("thumbnail" in segment.rows for segment in index.segments)
        small = Lazy(lambda place: place[0].thumbnail(place[1]), alive) if pictured else None
        vectors = np.concatenate([block for segment in index.segments for block in segment.vectors()])
        gallery = Gallery(
            index.kind, vectors, index.biased, columns["id"], columns["path"], captions, columns["content"], small,
            index.space,
        )  # fmt: skip
        entry = _write_segment(files, gallery, columns["key"], index.manifest["type"])
        manifest = _publish(files, index.manifest, [entry], probes, say, keep_last)
    return Update(0, buried, len(gallery), manifest)


class _Files:
    """The files of an index that a writer adds, each named in ``pending.json`` before it appears."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.begun: list[str] = []  # those that were not there before
        self.left = _pending(folder)  # by a process that was killed

    def begin(self, *names: str) -> list[Path]:
        """The paths of files that are about to be written."""
        self.begun += [name for name in names if not (self.folder / name).exists()]
        write_record(self.folder / _PENDING, {"format": _PENDING_FORMAT, "files": [*self.left, *self.begun]})
        return [self.folder / name for name in names]

    def next_segment(self) -> str:
        """The name of a new segment, of which no file is there, whosever it would be."""
        taken = {path.name[:6] for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        listed = [entry["name"] for manifest in _manifests(self.folder).values() for entry in manifest["segments"]]
        number = 1 + max(map(int, listed), default=0)
        while f"{number:06d}" in taken:
            number += 1
        return f"{number:06d}"

    def undo(self) -> None:
        """Removes what was written, and nothing else."""
        _remove(self.folder, self.begun)
        self._forget(self.left)

    def done(self, used: set[str]) -> None:
        """Removes what a killed process left, but for what is in use."""
        _remove(self.folder, set(self.left) - used)
        self._forget([])

    def _forget(self, left: list[str]) -> None:
        path = self.folder / _PENDING
        if left:
            write_record(path, {"format": _PENDING_FORMAT, "files": left})
        else:
            path.unlink(missing_ok=True)


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Removes files of an index by name; a folder by such a name is not one."""
    for name in names:
        if (folder / name).is_file():
            (folder / name).unlink()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[_Files]:
    """Holds the writer's lock; of a failure nothing stays, and all that was there before.

    Raises:
        IndexingError: the folder holds something else than an index.
    """
    check_folder(folder)
    with only_writer(folder, "the index"):
        files, version = _Files(folder), _version(folder)
        try:
            yield files
        except BaseException:
            if _version(folder) == version:  # else the new one is there already, and its files are in use
                files.undo()
            raise


def _version(folder: Path) -> bytes | None:
    return read_bytes(folder / CURRENT, MAX_TEXT) if (folder / CURRENT).exists() else None


def _request(gallery: "Gallery", before: dict | None, kind: str | None, memory: int, min_recall: float | None) -> dict:
    """What the index is to be; what is not asked for stays as it was."""
    asked = kind or (before or {}).get("asked", "auto")
    chosen, reason = asked, "as asked for"
    if asked == "auto":
        chosen, reason = choose_type(len(gallery), gallery.vectors.shape[1], memory)
    return {
        "kind": gallery.kind,
        "biased": gallery.biased,
        "dim": gallery.vectors.shape[1],
        "space": gallery.space,
        "type": chosen,
        "asked": asked,
        "reason": reason,
        "min_recall": (before or {}).get("min_recall", MIN_RECALL) if min_recall is None else min_recall,
    }


def _still_good(folder: Path, before: dict | None, about: dict, force: bool, say) -> "list[_Segment]":
    """The segments that are there, unless all has to be built anew."""
    if before is None:
        return []
    changed = [key for key in ("kind", "biased", "dim", "space", "source", "type") if before[key] != about[key]]
    if changed:
        say(f"building it anew: {', '.join(changed)} changed")
        return []
    try:
        return Index(folder).segments
    except IndexingError:
        if not force:
            raise
        say("building it anew: it is damaged")
        return []


def _keys(gallery: "Gallery") -> list[str]:
    """A digest of all that the index keeps of each item."""
    return [
        hashlib.sha256(vector.tobytes() + digest([name, path, captions, content]).encode()).hexdigest()
        for vector, name, path, captions, content in zip(
            gallery.vectors, gallery.ids, gallery.paths, gallery.captions, gallery.contents, strict=True
        )
    ]


def _bury(files: _Files, entry: dict, segment: _Segment, gone: set[str]) -> None:
    """Adds rows to a segment's tombstones."""
    dead = np.array([key in gone for key in _text(segment.rows["key"])[:]])
    if not (dead & segment.alive).any():
        return
    rows = np.flatnonzero(dead | ~segment.alive)
    name = f"{entry['name']}-{hashlib.sha256(rows.tobytes()).hexdigest()[:12]}.npy"
    data = io.BytesIO()
    np.save(data, rows)
    (path,) = files.begin(name)
    write_bytes(path, data.getbuffer())
    others = {file: sha256 for file, sha256 in entry["files"].items() if not file.endswith(".npy")}
    entry |= {"removed": name, "files": others | {name: file_sha256(path)}}


def _write_segment(files: _Files, gallery: "Gallery", keys: list[str], kind: str) -> dict:
    """Builds and writes a segment; returns its entry for the manifest."""
    kind = kind if len(gallery) >= _TRAINABLE else "flat"
    name = files.next_segment()
    rows_file, faiss_file = files.begin(f"{name}.h5", f"{name}.faiss")
    vectors = np.ascontiguousarray(gallery.vectors, dtype=np.float32)
    offsets = np.cumsum([0, *map(len, gallery.captions)])
    with write_hdf5(rows_file) as writer:
        file = writer.file
        columns = {"id": gallery.ids, "path": gallery.paths, "content": gallery.contents, "key": keys}
        for column, values in columns.items():
            write_column(file, column, values)
        write_column(file, "caption", [caption for captions in gallery.captions for caption in captions])
        file["caption_offset"] = offsets
        if gallery.thumbnails is not None:
            write_column(file, "thumbnail", gallery.thumbnails)
        if kind == "ivfpq":
            file["vectors"] = vectors  # what the codes have lost
    _write_faiss(_built(vectors, kind), faiss_file)
    return {
        "name": name,
        "type": kind,
        "effort": _EFFORTS[kind][0],
        "rows": len(vectors),
        "removed": None,
        "vectors_sha256": hashlib.sha256(vectors).hexdigest(),
        "files": {path.name: file_sha256(path) for path in (faiss_file, rows_file)},
    }


def _write_faiss(index: faiss.Index, path: Path) -> None:
    """Writes an index through Python, which, unlike faiss, tells of a full disk in time."""
    try:
        with whole_file(path) as aside, open(aside, "wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    except RuntimeError as error:
        raise IndexingError(f"{path} could not be written; is the disk full?") from error


def _built(vectors: np.ndarray, kind: str) -> faiss.Index:
    """A faiss index of the vectors, float32 (N, D)."""
    rows, dim = vectors.shape
    codes = -(-dim // _CODE_DIMS)
    recipe = {
        "flat": "Flat",
        "hnsw": f"HNSW{_LINKS}",
        "ivf": f"IVF{_cells(rows)},Flat",
        "ivfpq": f"Pad{codes * _CODE_DIMS},IVF{_cells(rows)},PQ{codes}x4fs",
    }[kind]
    index = faiss.index_factory(dim, recipe, faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = _BUILD_EFFORT
        index.storage.add(vectors)  # makes room once; grown block by block, its array would stand there twice at times
        index.storage.reset()
    if kind.startswith("ivf"):
        cells = faiss.extract_index_ivf(index)
        cells.cp.niter, cells.cp.min_points_per_centroid = 10, 1
        sample = np.random.default_rng(0).permutation(rows)[: max(64 * cells.nlist, 1024)]
        index.train(vectors[np.sort(sample)])
    with tqdm(total=rows, desc=f"building {kind}", unit=" rows", disable=None if rows > _BLOCK else True) as bar:
        for start in range(0, rows, _BLOCK):
            index.add(vectors[start : start + _BLOCK])
            bar.update(min(_BLOCK, rows - start))
    return index


def _publish(files: _Files, about: dict, entries: list[dict], probes: np.ndarray, say, keep_last: bool = True) -> dict:
    """Measures the new version and points ``CURRENT`` at it; only what it and the last one use stays.

    A last one that is damaged does not stay, nor one that is not to be kept.
    """
    folder = files.folder
    segments = [_Segment(folder, entry, about["dim"]) for entry in entries]
    manifest = about | {"metric": "inner product", "normalised": True, "segments": entries}
    manifest["rows"] = sum(int(segment.alive.sum()) for segment in segments)
    manifest |= _measured(segments, entries, probes, about["min_recall"])
    say(
        f"recall@10 {manifest['recall@10']:.3f} against exact search, {manifest['queries_per_second']:,.0f} queries a "
        f"second one by one ({len(probes):,} queries of the other modality)"
    )
    name = f"manifest-{digest(manifest)[:12]}.json"
    versions = {name}
    if keep_last:
        with contextlib.suppress(IndexingError):
            read_manifest(folder)
            versions.add(_pointer(folder))
    (path,) = files.begin(name)
    write_json(path, manifest)
    pointer = {"format": INDEX_FORMAT, "format_version": INDEX_VERSION, "manifest": name, "sha256": file_sha256(path)}
    write_json(folder / CURRENT, pointer)
    _sweep(files, versions)
    return manifest


def _pointer(folder: Path) -> str:
    """The name of the manifest that ``CURRENT`` points at."""
    return _read_json(folder / CURRENT, "the index's pointer")["manifest"]


def _sweep(files: _Files, versions: set[str]) -> None:
    """Removes what manifests of this program's list, and those manifests, but for what some versions use.

    Nothing is removed while a version's manifest cannot be read.
    """
    manifests = _manifests(files.folder)
    if not versions <= set(manifests):
        return
    used: set[str] = set()
    listed: set[str] = set()
    for name, manifest in manifests.items():
        names = {file for entry in manifest["segments"] for file in entry["files"]}
        listed |= names
        if name in versions:
            used |= names
    _remove(files.folder, listed - used)
    _remove(files.folder, set(manifests) - versions)  # last: after a kill they still list what is to go
    files.done(used | versions)


def _measured(segments: list[_Segment], entries: list[dict], probes: np.ndarray, min_recall: float) -> dict:
    """Recall@10 and speed; raises the segments' effort until the recall suffices."""
    probes = checked_queries(probes, segments[0].dim)
    approximate = [segment.type for segment in segments if segment.type != "flat"]
    recall = 1.0
    if approximate:
        truth = _merged([segment.exact(probes, _K) for segment in segments])
        for effort in _EFFORTS[approximate[0]]:
            for segment, entry in zip(segments, entries, strict=True):
                if segment.type != "flat":
                    segment.effort = entry["effort"] = max(effort, entry["effort"])
            recall = _recall(_merged([segment.search(probes, _K) for segment in segments]), truth)
            if recall >= min_recall:
                break
    if recall < min_recall:
        raise IndexingError(
            f"the recall@10 against exact search is {recall:.3f}, under {min_recall}; use --type hnsw or flat, or "
            "lower --min-recall"
        )
    start = time.perf_counter()
    for probe in probes[:100]:
        for segment in segments:
            segment.search(probe[None], _K)
    seconds = time.perf_counter() - start
    return {"recall@10": recall, "queries_per_second": round(len(probes[:100]) / seconds, 1), "probes": len(probes)}


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The best ten scores over all segments, best first, (Q, at most 10)."""
    return -np.sort(-np.concatenate([scores for scores, _ in parts], axis=1), axis=1)[:, :_K]


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the places that hold something as near as what exact search has there at last; copies are equal.

    Places are ten, or as many as there are rows.
    """
    return float((found[:, : truth.shape[1]] >= truth[:, -1:] - _EQUAL).mean())


def _padded(part: np.ndarray, k: int, fill: float) -> np.ndarray:
    return np.pad(part[:, :k], ((0, 0), (0, max(0, k - part.shape[1]))), constant_values=fill)


def _check_file(path: Path, sha256: str) -> None:
    try:
        actual = file_sha256(path)
    except FileNotFoundError as error:
        raise IndexingError(f"{path} is missing; {_AGAIN}") from error
    if actual != sha256:
        raise IndexingError(f"{path} does not match its SHA-256: it is damaged, or not what was built; {_AGAIN}")
