"""Segments of an index: a faiss file with its rows, opened for searching, or written anew."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from onceover.base.files import file_sha256, write_bytes
from onceover.base.progress import say
from onceover.base.worker import Worker
from onceover.retrieval.gallery import Gallery
from onceover.retrieval.index.faiss_files import (
    BLOCK,
    RowFilter,
    build_faiss,
    faiss_errors,
    open_faiss,
    search_blocks,
    search_parameters,
    write_faiss,
)
from onceover.retrieval.index.folder import IndexFiles
from onceover.retrieval.index.lists import SHARED_TYPES, ListParts, write_lists, write_share
from onceover.retrieval.index.manifest import check_file
from onceover.retrieval.index.rows import SegmentRows, tombstone_bytes, write_rows
from onceover.retrieval.index.types import EFFORTS, MIN_TRAINING_ROWS, REBUILD, IndexingError

CANDIDATES = 16  # of a quantized segment, scored exactly for each wanted hit or visited cell


class Segment:
    """One faiss file with its rows, open for searching.

    It is never added to: faiss would end the process on a memory-mapped index.

    Attributes:
        type: the type of its index. effort: how thoroughly it is searched (``EFFORTS``). rows: its items.

    Raises:
        IndexingError: a file that is missing, damaged, or not what the manifest describes.
    """

    def __init__(self, folder: Path, entry: dict, dim: int):
        self.type: str = entry["type"]
        self.effort: int = entry["effort"]
        self.size: int = entry["rows"]
        self.dim = dim
        for name, sha256 in entry["files"].items():
            check_file(folder / name, sha256)
        self._index = open_faiss(folder / f"{entry['name']}.faiss", self.type, self.size, dim)
        self.rows = SegmentRows(folder / f"{entry['name']}.h5", self.type, self.size, dim)
        if entry["removed"]:
            self.rows.bury(folder / entry["removed"])
        self._filter = RowFilter(self.rows.alive)
        self._vectors: np.ndarray | None = None
        if self.type == "ivfpq":
            self._vectors = self.rows.vectors()

    @property
    def alive(self) -> np.ndarray:
        """The rows that were not removed, bool (size,)."""
        return self.rows.alive

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Searches for the best ``k`` rows of each query; all that are alive where they are fewer.

        Returns:
            Scores (Q, k), filled up with -inf, and rows (Q, k), filled up with -1.
        """
        wanted = k
        if self._vectors is not None:
            wanted = CANDIDATES * max(k, self.effort)
        parameters = search_parameters(self.type, self.effort, self._filter)
        with faiss_errors("the index"):
            scores, rows = self._index.search(queries, min(wanted, self.size), params=parameters)
        if rows.max(initial=-1) >= self.size:
            raise IndexingError(f"the index names rows that it does not hold: it is damaged; {REBUILD}")
        if self._vectors is not None:
            scores, rows = _rescored(self._vectors, queries, rows, k)
        scores = _padded(scores, k, -np.inf)
        rows = _padded(rows, k, -1)
        short = np.flatnonzero((rows >= 0).sum(1) < min(k, self.alive.sum()))
        if len(short):  # an approximate search met too few rows that are alive
            exact_scores, exact_rows = self.exact(queries[short], k)
            scores[short] = _padded(exact_scores, k, -np.inf)
            rows[short] = _padded(exact_rows, k, -1)
        scores[rows < 0] = -np.inf
        return scores, rows

    def exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Searches the rows that are alive exactly; scores and rows, (Q, k) or fewer columns."""
        alive = np.flatnonzero(self.alive)
        k = min(k, len(alive))
        if not k:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        scores, rows = search_blocks(queries, self.vectors(), k)
        return scores, alive[rows]

    def vector(self, row: int) -> np.ndarray:
        """The vector of a row, float32 (D,)."""
        if self._vectors is not None:
            return np.array(self._vectors[row])
        with faiss_errors("the index"):
            return self._index.reconstruct_n(row, 1)[0]

    def vectors(self) -> Iterator[np.ndarray]:
        """The vectors of the rows that are alive, in order, block by block."""
        for start in range(0, self.size, BLOCK):
            count = min(BLOCK, self.size - start)
            if self._vectors is not None:
                block = np.asarray(self._vectors[start : start + count])
            else:
                with faiss_errors("the index"):
                    block = self._index.reconstruct_n(start, count)
            alive = self.alive[start : start + count]
            if alive.any():
                yield np.ascontiguousarray(block[alive])


def _rescored(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` candidates with the best exact scores, query by query, so that memory holds those of one.

    Not by a matrix product: the threads of BLAS go on spinning after it, and delay the next query of faiss.
    """
    best_scores = np.full((len(queries), k), -np.inf, np.float32)
    best_rows = np.full((len(queries), k), -1, rows.dtype)
    for number, query in enumerate(queries):
        candidates = rows[number][rows[number] >= 0]
        scores = np.einsum("cd,d->c", vectors[candidates], query)
        order = np.argsort(-scores, kind="stable")[:k]
        best_scores[number, : len(order)] = scores[order]
        best_rows[number, : len(order)] = candidates[order]
    return best_scores, best_rows


def _padded(columns: np.ndarray, k: int, fill: float) -> np.ndarray:
    """An array (Q, …) with exactly ``k`` columns, filled up on the right."""
    missing = max(0, k - columns.shape[1])
    return np.pad(columns[:, :k], ((0, 0), (0, missing)), constant_values=fill)


def write_segment(files: IndexFiles, gallery: Gallery, keys: Sequence[str], kind: str) -> dict:
    """Builds and writes a segment of a gallery's items; returns its entry for the manifest.

    Args:
        keys: for each item a digest of all that the index keeps of it.
        kind: the type of the index; a small segment is flat all the same.
    """
    kind = type_of_segment(kind, len(gallery))
    name = files.next_segment()
    rows_file, faiss_file = files.begin(f"{name}.h5", f"{name}.faiss")
    sha256 = _sha256_of(gallery.vectors)
    if kind in SHARED_TYPES:
        write_rows(rows_file, gallery, keys, None)
        write_lists(ListParts(files.folder, gallery.vectors, sha256, kind), faiss_file)
    else:
        vectors = np.ascontiguousarray(gallery.vectors, dtype=np.float32)
        is_quantized = kind == "ivfpq"
        write_rows(rows_file, gallery, keys, vectors if is_quantized else None)
        write_faiss(build_faiss(vectors, kind), faiss_file)
    return {
        "name": name,
        "type": kind,
        "effort": EFFORTS[kind][0],
        "rows": len(gallery),
        "removed": None,
        "vectors_sha256": sha256,
        "files": {path.name: file_sha256(path) for path in (faiss_file, rows_file)},
    }


def encode_share(folder: Path, gallery: Gallery, kind: str, worker: Worker) -> None:
    """Encodes a worker's share of the segment of these items that ``write_segment`` will write.

    Args:
        folder: the index's.
    """
    kind = type_of_segment(kind, len(gallery))
    if kind not in SHARED_TYPES:
        say(f"{folder}: a {kind} index of {len(gallery):,} rows is not shared; the call without --worker builds it")
        return
    parts = ListParts(folder, gallery.vectors, _sha256_of(gallery.vectors), kind, worker.count)
    write_share(parts, worker)


def type_of_segment(kind: str, rows: int) -> str:
    """The type of a segment in an index of type ``kind``."""
    return kind if rows >= MIN_TRAINING_ROWS else "flat"


def _sha256_of(vectors: np.ndarray) -> str:
    """The SHA-256 of the bytes of vectors (N, D) as float32, of which a block is in memory at a time."""
    state = hashlib.sha256()
    for start in range(0, len(vectors), BLOCK):
        state.update(np.ascontiguousarray(vectors[start : start + BLOCK], dtype=np.float32).data)
    return state.hexdigest()


def bury(files: IndexFiles, entry: dict, segment: Segment, keys: set[str]) -> dict:
    """Adds the rows of some keys to a segment's tombstones; returns the segment's entry as it is then."""
    named = np.array([key in keys for key in segment.rows.text("key")[:]])
    if not (named & segment.alive).any():
        return entry
    rows = np.flatnonzero(named | ~segment.alive)
    name = f"{entry['name']}-{hashlib.sha256(rows.tobytes()).hexdigest()[:12]}.npy"
    (path,) = files.begin(name)
    write_bytes(path, tombstone_bytes(rows))
    sha256_of = {file: sha256 for file, sha256 in entry["files"].items() if not file.endswith(".npy")}
    sha256_of[name] = file_sha256(path)
    return entry | {"removed": name, "files": sha256_of}
