"""The rows of a segment in an HDF5 file: ids, paths, captions, thumbnails; and the list of the rows that were removed.

Both are checked when they are opened, since a manifest may have been signed again by somebody else.
"""

import io
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import h5py
import numpy as np

from onceover.base.files import read_bytes
from onceover.base.hdf5 import open_hdf5, write_column, write_hdf5
from onceover.base.texts import Texts
from onceover.retrieval.gallery import Gallery
from onceover.retrieval.index.types import REBUILD, IndexingError

_TEXT_COLUMNS = ("id", "path", "content", "key", "caption")
_KEPT = 50_000  # values of a column that stay in memory once they were read: a read of HDF5 takes a millisecond
_NPY_HEADER = 4096  # bytes, more than a .npy file's header ever takes


class SegmentRows:
    """The opened rows of a segment.

    Attributes:
        size: how many rows there are. alive: bool (size,), those that were not removed.

    Raises:
        IndexingError: the file does not hold the rows that a manifest describes.
    """

    def __init__(self, path: Path, kind: str, size: int, dim: int):
        self.size = size
        self.alive = np.ones(size, bool)
        self._path = path
        self._file = _open_rows(path, kind, size, dim)
        self._kept: dict[str, np.ndarray] = {}

    def bury(self, tombstones: Path) -> None:
        """Marks the rows that a file of tombstones lists as removed."""
        self.alive[_read_tombstones(tombstones, self.size)] = False

    @property
    def has_thumbnails(self) -> bool:
        """Whether the segment holds thumbnails."""
        return "thumbnail" in self._file

    def text(self, column: str) -> h5py.Dataset | np.ndarray:
        """A column of strings; bytes that are no UTF-8, which this program does not write, are replaced."""
        return self._kept_or_stored(column, lambda: self._file[column].asstr(errors="replace"))

    def _kept_or_stored(self, column: str, stored: Callable[[], h5py.Dataset]) -> h5py.Dataset | np.ndarray:
        """A column in memory, or as it is in the file where it is long. ``stored``: gives the latter."""
        if column in self._kept:
            return self._kept[column]
        values = stored()
        if len(self._file[column]) <= _KEPT:
            self._kept[column] = values[:]
            return self._kept[column]
        return values

    def living(self, column: str) -> list[str]:
        """A column of strings, for the rows that are alive."""
        return self.text(column)[:][self.alive].tolist()

    def captions(self) -> list[list[str]]:
        """The captions of each row that is alive."""
        captions = self.text("caption")[:].tolist()
        offsets = self._file["caption_offset"][:].tolist()
        return [captions[offsets[row] : offsets[row + 1]] for row in np.flatnonzero(self.alive)]

    def items(self, rows: np.ndarray) -> list[dict]:
        """The id, path and captions of each of some rows, which are read together."""
        ordered, inverse = np.unique(rows, return_inverse=True)
        ids = self.text("id")[ordered]
        paths = self.text("path")[ordered]
        offsets = self._kept_or_stored("caption_offset", lambda: self._file["caption_offset"])
        counts = offsets[ordered + 1] - offsets[ordered]
        numbers = np.repeat(offsets[ordered] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        captions = np.split(self.text("caption")[numbers], np.cumsum(counts)[:-1])
        items = []
        for place in inverse.tolist():
            items.append({"id": ids[place], "path": paths[place], "captions": captions[place].tolist()})
        return items

    def thumbnail(self, row: int) -> bytes:
        """The JPEG of a row, empty where it has none."""
        if not self.has_thumbnails:
            return b""
        return self._file["thumbnail"][row].tobytes()

    def vectors(self) -> np.memmap:
        """The vectors that a quantized segment keeps beside its codes, memory-mapped, float32 (size, D)."""
        column = self._file["vectors"]
        return np.memmap(self._path, mode="r", offset=column.id.get_offset(), shape=column.shape, dtype=column.dtype)


def write_rows(path: Path, gallery: Gallery, keys: Sequence[str], vectors: np.ndarray | None) -> None:
    """Writes the rows of a segment.

    Args:
        keys: for each item a digest of all that the index keeps of it.
        vectors: float32 (N, D), where the faiss file does not hold them; else None.
    """
    columns = {"id": gallery.ids, "path": gallery.paths, "content": gallery.contents, "key": keys}
    captions = Texts(chain.from_iterable(gallery.captions))
    with write_hdf5(path) as writer:
        file = writer.file
        for column, values in columns.items():
            write_column(file, column, values)
        write_column(file, "caption", captions)
        file["caption_offset"] = np.cumsum([0, *map(len, gallery.captions)])
        if gallery.thumbnails is not None:
            write_column(file, "thumbnail", gallery.thumbnails)
        if vectors is not None:
            file["vectors"] = vectors


def tombstone_bytes(rows: np.ndarray) -> bytes:
    """The content of a file of tombstones, the numbers of removed rows, int64 (R,)."""
    data = io.BytesIO()
    np.save(data, rows)
    return data.getvalue()


def _open_rows(path: Path, kind: str, size: int, dim: int) -> h5py.File:
    """Opens the rows of a segment, if they are as many and as complete as its manifest says."""
    try:
        file = open_hdf5(path)
    except OSError as error:
        raise IndexingError(f"{path} cannot be read ({str(error).splitlines()[0]}); {REBUILD}") from error
    try:
        _check_rows(file, kind, size, dim)
    except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        file.close()
        raise IndexingError(f"{path} does not hold the rows that its manifest describes; {REBUILD}") from error
    return file


def _check_rows(file: h5py.File, kind: str, size: int, dim: int) -> None:
    """Refuses columns of other lengths or types than are written here, with a ValueError."""
    for name in _TEXT_COLUMNS:
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
        rows = np.load(io.BytesIO(read_bytes(path, 8 * size + _NPY_HEADER)), allow_pickle=False)
    except Exception as error:  # NumPy's parser raises errors of many kinds
        raise IndexingError(f"{path} holds no list of removed rows; {REBUILD}") from error
    is_list = isinstance(rows, np.ndarray) and rows.dtype == np.int64 and rows.ndim == 1
    if not is_list or rows.min(initial=0) < 0 or rows.max(initial=0) >= size:
        raise IndexingError(f"{path} holds no list of removed rows; {REBUILD}")
    return rows
