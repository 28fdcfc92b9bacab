"""The faiss file of a segment: built, written, opened, checked and searched. Only this module imports faiss here."""

import contextlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from onceover.base.files import open_regular, whole_file
from onceover.base.progress import ProgressBar
from onceover.retrieval.exact import load_faiss
from onceover.retrieval.index.types import CODE_DIMS, LINKS, REBUILD, IndexingError, cell_count, code_count

load_faiss()  # which sets how it multiplies

_NO_LISTS = struct.Struct("<4sQQ4sQ")  # the end of an index's file whose inverted lists are empty
_ROWS_PLACE = 8  # in an index's file, of the number of rows
BLOCK = 16_384  # rows added or read at a time
_BUILD_EFFORT = 100  # nodes visited while hnsw lays its links
_FIRST_BYTES = {"flat": b"IxFI", "hnsw": b"IHNf", "ivf": b"IwFl", "ivf16": b"IwSq", "ivfpq": b"IxPT"}
_CLASSES = {
    "flat": faiss.IndexFlatIP,
    "hnsw": faiss.IndexHNSWFlat,
    "ivf": faiss.IndexIVFFlat,
    "ivf16": faiss.IndexIVFScalarQuantizer,
    "ivfpq": faiss.IndexPreTransform,
}


@contextlib.contextmanager
def faiss_errors(name: object) -> Iterator[None]:
    """Turns an exception of faiss into an error of one line that names the file or index."""
    try:
        yield
    except RuntimeError as error:
        raise IndexingError(f"{name} cannot be used by faiss: it is damaged; {REBUILD}") from error


class RowFilter:
    """Restricts a search to the rows that are alive, bool (N,); ``selector`` is None where all are."""

    def __init__(self, alive: np.ndarray):
        self._bits = np.packbits(alive, bitorder="little")  # faiss reads them here and makes no copy
        self.selector = None if alive.all() else faiss.IDSelectorBitmap(self._bits)


def search_parameters(kind: str, effort: int, rows: RowFilter) -> faiss.SearchParameters:
    """Parameters for searching an index of type ``kind`` with an effort (``EFFORTS``)."""
    if kind == "flat":
        return faiss.SearchParameters(sel=rows.selector)
    if kind == "hnsw":
        return faiss.SearchParametersHNSW(efSearch=effort, sel=rows.selector)
    parameters = faiss.SearchParametersIVF(nprobe=effort, sel=rows.selector)
    if kind in ("ivf", "ivf16"):
        return parameters
    return faiss.SearchParametersPreTransform(index_params=parameters)


def search_blocks(queries: np.ndarray, blocks: Iterator[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search over vectors that come block by block: scores and rows of the best ``k``, each (Q, k)."""
    return knn_ground_truth(queries, blocks, k, metric_type=faiss.METRIC_INNER_PRODUCT)


def open_faiss(path: Path, kind: str, size: int, dim: int) -> faiss.Index:
    """Opens a faiss file, memory-mapped.

    Raises:
        IndexingError: it is not of the type, class and size that are written here; others can end the process.
    """
    with open_regular(path) as file:
        first = file.read(4)
    if first == _FIRST_BYTES[kind]:
        with faiss_errors(path):
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
        if type(index) is _CLASSES[kind] and _is_as_described(index, kind, size, dim):
            return index
    raise IndexingError(f"{path} is not the index that its manifest describes; {REBUILD}")


def _is_as_described(index: faiss.Index, kind: str, size: int, dim: int) -> bool:
    """Whether an opened index, and the parts it is made of, have the size and classes that its manifest implies."""
    if (index.ntotal, index.d, index.metric_type) != (size, dim, faiss.METRIC_INNER_PRODUCT):
        return False
    if kind == "hnsw":
        storage = faiss.downcast_index(index.storage)
        return isinstance(storage, faiss.IndexFlat) and storage.ntotal == size
    if kind == "ivfpq":
        if index.chain.size() != 1:
            return False
        padding = faiss.downcast_VectorTransform(index.chain.at(0))
        quantized = faiss.downcast_index(index.index)
        if not isinstance(padding, faiss.RemapDimensionsTransform):
            return False
        return isinstance(quantized, faiss.IndexIVFPQFastScan) and quantized.ntotal == size
    if kind in ("ivf", "ivf16"):
        lists = faiss.downcast_InvertedLists(index.invlists)
        is_half = kind == "ivf" or (index.sq.qtype == faiss.ScalarQuantizer.QT_fp16 and not index.by_residual)
        # lists in a file of their own would be read from wherever the index says
        return is_half and isinstance(lists, faiss.ArrayInvertedLists) and index.code_size == lists.code_size
    return True


def write_faiss(index: faiss.Index, path: Path) -> None:
    """Writes an index through Python, which, unlike faiss, reports a full disk in time."""
    try:
        with whole_file(path) as aside, open(aside, "wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    except RuntimeError as error:
        raise IndexingError(f"{path} could not be written; is the disk full?") from error


def build_faiss(vectors: np.ndarray, kind: str) -> faiss.Index:
    """Builds an index in memory over the vectors, float32 (N, D): of a type whose rows are not encoded one by one."""
    rows, dim = vectors.shape
    index = faiss.index_factory(dim, _recipe(kind, rows, dim), faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = _BUILD_EFFORT
        # reserves the room at once; grown block by block, the array would be held twice at times
        index.storage.add(vectors)
        index.storage.reset()
    if kind == "ivfpq":
        _train_cells(index, vectors)
    with ProgressBar(f"building {kind}", "rows", total=rows) as bar:
        for start in range(0, rows, BLOCK):
            index.add(vectors[start : start + BLOCK])
            bar.update(min(BLOCK, rows - start))
    return index


def _recipe(kind: str, rows: int, dim: int) -> str:
    """A type of index in the language of ``faiss.index_factory``."""
    if kind == "flat":
        return "Flat"
    if kind == "hnsw":
        return f"HNSW{LINKS}"
    if kind == "ivf":
        return f"IVF{cell_count(rows)},Flat"
    if kind == "ivf16":
        return f"IVF{cell_count(rows)},SQfp16"
    codes = code_count(dim)
    return f"Pad{codes * CODE_DIMS},IVF{cell_count(rows)},PQ{codes}x4fs"


def _train_cells(index: faiss.Index, vectors: np.ndarray) -> None:
    """Trains the cells of an inverted file on a seeded sample of the vectors."""
    cells = faiss.extract_index_ivf(index)
    cells.cp.niter = 10
    cells.cp.min_points_per_centroid = 1
    size = min(len(vectors), max(64 * cells.nlist, 1024))
    sample = np.random.default_rng(0).choice(len(vectors), size, replace=False, shuffle=False)
    index.train(vectors[np.sort(sample)])


def train_lists(vectors: np.ndarray, kind: str) -> bytes:
    """Trains the cells of inverted lists, ``ivf`` or ``ivf16``; returns the file of the index without its rows."""
    rows, dim = vectors.shape
    index = faiss.index_factory(dim, _recipe(kind, rows, dim), faiss.METRIC_INNER_PRODUCT)
    index.by_residual = False  # a code then depends on its vector alone
    _train_cells(index, vectors)
    return faiss.serialize_index(index).tobytes()


def cell_codes(index: faiss.Index, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cell, int64 (n,), and the code, uint8 (n, bytes), of each vector, as the index would keep them."""
    prefix = index.coarse_code_size()
    codes = index.sa_encode(vectors)
    places = 256 ** np.arange(prefix, dtype=np.int64)
    return codes[:, :prefix] @ places, codes[:, prefix:]


@contextlib.contextmanager
def list_writer(path: Path, trained: bytes, sizes: np.ndarray, rows: int) -> Iterator[Callable[[bytes], int]]:
    """Writes the file of an index of inverted lists, whole or not at all, without holding a list in memory.

    It is the file that ``faiss.write_index`` writes of the same index: fields of the index, among them the number of
    rows; ``ilar``, the number of lists and the bytes of a code; ``full`` and the lists' sizes; then the codes and
    numbers of each list (faiss/impl/index_write.cpp).

    Args:
        trained: the file of the index without rows. sizes: int64 (lists,).

    Yields:
        What is called with the codes of the first list, the row numbers of its rows, the codes of the second one …

    Raises:
        IndexingError: the disk is full, or ``trained`` does not end as faiss ends it.
    """
    lists = trained[-_NO_LISTS.size :]
    name, count, code_bytes, form, nonempty = _NO_LISTS.unpack(lists)
    if (name, count, form, nonempty) != (b"ilar", len(sizes), b"sprs", 0):
        raise IndexingError("this version of faiss writes inverted lists in another form; install faiss-cpu 1.15")
    header = bytearray(trained[: -_NO_LISTS.size])
    struct.pack_into("<q", header, _ROWS_PLACE, rows)
    try:
        with whole_file(path) as aside, open(aside, "wb") as file:
            file.write(header)
            file.write(_NO_LISTS.pack(b"ilar", count, code_bytes, b"full", count))
            file.write(sizes.astype("<u8").tobytes())
            yield file.write
    except OSError as error:
        raise IndexingError(f"{path} could not be written ({error.strerror}); is the disk full?") from error
