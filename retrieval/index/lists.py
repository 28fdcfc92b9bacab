"""Parts of an index of inverted lists: blocks of encoded rows that any number of processes write, and one merges.

The folder ``NAME.parts`` beside an index holds a plan, the trained cells, and a file for each block of rows. Nothing
else is shared and no lock is needed: the first process to come makes the folder, with plan and cells in it, by one
rename, and a part that is there already is never replaced. A process that is killed costs the parts under way.

A part keeps its rows sorted by cell, so that merging copies slices of mapped files and needs no memory for vectors.
"""

import re
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import (
    aside_folder,
    digest,
    file_sha256,
    place_folder,
    read_record,
    remove_asides,
    remove_files,
    visible_names,
    write_bytes,
    write_once,
    write_record,
)
from onceover.base.hdf5 import hdf5_bytes, memory_mapped, open_hdf5, raise_passing
from onceover.base.progress import ProgressBar, say, warn
from onceover.base.worker import Worker, WorkerError
from onceover.retrieval.index.faiss_files import (
    BLOCK,
    cell_codes,
    list_writer,
    open_faiss,
    train_lists,
)
from onceover.retrieval.index.types import IndexingError, cell_count

SHARED_TYPES = ("ivf", "ivf16")  # whose rows are encoded one by one, so that processes can share them
_PART_BYTES = 2**27  # of float32 vectors that make a part
_PLAN = "plan.json"
_TRAINED = "trained.faiss"
_PART_NAME = re.compile(r"part-\d{6,}\.h5")
_FORMAT = "onceover index, parts"


class _Part(NamedTuple):
    """The rows of a part, sorted by cell, memory-mapped.

    Attributes:
        ends: int64 (cells + 1,), where the rows of each cell begin, and where the last one's end.
        rows: int64 (n,), their numbers. codes: uint8 (n, bytes).
    """

    ends: np.ndarray
    rows: np.ndarray
    codes: np.ndarray


class ListParts:
    """The parts of the segment whose vectors these are.

    Args:
        index_folder: the folder of the gallery's index; the parts lie beside it.
        vectors: float32 (N, D), in memory or mapped. sha256: of their bytes. kind: one of ``SHARED_TYPES``.
        workers: how many share the work; None for whoever puts it together.
    """

    def __init__(self, index_folder: Path, vectors: np.ndarray, sha256: str, kind: str, workers: int | None = None):
        self.folder = parts_folder(index_folder)
        self._vectors = vectors
        self._kind = kind
        self._workers = workers
        rows, dim = vectors.shape
        self._size = max(BLOCK // 8, _PART_BYTES // (4 * dim))
        self._cells = cell_count(rows)
        self._origin = {
            "format": _FORMAT,
            "type": kind,
            "rows": rows,
            "dim": dim,
            "part_rows": self._size,
            "vectors_sha256": sha256,
        }

    @property
    def numbers(self) -> range:
        """The numbers of all parts."""
        return range(-(-len(self._vectors) // self._size))

    def begin(self) -> None:
        """Trains the cells and writes the plan, unless another process was first.

        Raises:
            WorkerError: the parts that are there are of something else. IndexingError: somebody else's folder.
        """
        _check_folder(self.folder)
        self._remove_left_over()
        if self.folder.parent.is_dir():
            remove_asides(self.folder.parent, self.folder.name)
        if not (self.folder / _PLAN).exists():
            with aside_folder(self.folder) as aside:
                trained = train_lists(self._vectors, self._kind)
                write_bytes(aside / _TRAINED, trained)
                plan = self._origin | {"workers": self._workers, "trained_sha256": file_sha256(aside / _TRAINED)}
                write_record(aside / _PLAN, plan)
                place_folder(aside, self.folder)
        plan = _read_plan(self.folder)
        changed = [key for key, value in self._origin.items() if plan.get(key) != value]
        if changed:
            raise WorkerError(
                f"{self.folder} holds parts of something else ({', '.join(changed)} differ); give all workers the same "
                "command, or remove that folder"
            )
        if self._workers is not None and plan.get("workers") != self._workers:
            shared = "one process" if plan.get("workers") is None else f"{plan['workers']} workers"
            raise WorkerError(f"{self.folder} is shared by {shared}; name one of these, or remove that folder")
        if file_sha256(self.folder / _TRAINED) != plan["trained_sha256"]:
            raise IndexingError(f"{self.folder / _TRAINED} is damaged; remove {self.folder} and run the command again")

    def _remove_left_over(self) -> None:
        """Removes parts without a plan, and those of another build that one process began and did not end.

        Those of workers stay, unless the vectors are others now and nobody can go on with them.
        """
        if not (self.folder / _PLAN).exists():
            remove_files(self.folder, _part_names(self.folder))
            return
        if self._workers is not None:
            return
        plan = _read_plan(self.folder)
        changed = {key for key, value in self._origin.items() if plan.get(key) != value}
        if "vectors_sha256" in changed or (changed and plan.get("workers") is None):
            say(f"{self.folder}: removing parts of an index that was not finished")
            self.remove()

    def write(self, numbers: list[int]) -> None:
        """Encodes the parts of these numbers that are not there yet, or are damaged."""
        dim = self._vectors.shape[1]
        trained = open_faiss(self.folder / _TRAINED, self._kind, 0, dim)
        missing = [number for number in numbers if not self._is_sound(number)]
        rows = sum(min(self._size, len(self._vectors) - number * self._size) for number in missing)
        with ProgressBar(f"building {self._kind}", "rows", total=rows) as bar:
            for number in missing:
                start = number * self._size
                cells = []
                codes = []
                for first in range(start, min(start + self._size, len(self._vectors)), BLOCK):
                    block = self._vectors[first : min(first + BLOCK, start + self._size)]
                    block_cells, block_codes = cell_codes(trained, np.ascontiguousarray(block, np.float32))
                    cells.append(block_cells)
                    codes.append(block_codes)
                    bar.update(len(block))
                write_once(self._path(number), self._part_bytes(start, np.concatenate(cells), np.concatenate(codes)))

    def left(self) -> list[int]:
        """The numbers of the parts that are not there yet."""
        return [number for number in self.numbers if not self._path(number).exists()]

    def merge(self, path: Path) -> None:
        """Writes all parts as one faiss file, list after list.

        Raises:
            IndexingError: a part is missing or damaged, or the disk is full.
        """
        parts = [self._read(number) for number in self.numbers]
        sizes = np.sum([np.diff(part.ends) for part in parts], axis=0)
        trained = (self.folder / _TRAINED).read_bytes()
        with list_writer(path, trained, sizes, len(self._vectors)) as write:
            for cell in range(self._cells):
                slices = [slice(part.ends[cell], part.ends[cell + 1]) for part in parts]
                for part, own in zip(parts, slices, strict=True):
                    write(part.codes[own].tobytes())
                for part, own in zip(parts, slices, strict=True):
                    write(part.rows[own].astype("<i8").tobytes())

    def remove(self) -> None:
        """Removes the parts, the cells and the plan, and no file of somebody else's.

        A worker that is still busy may put parts there until the folder is gone.
        """
        remove_files(self.folder, [*_part_names(self.folder), _TRAINED, _PLAN], everyones=True)
        while _part_names(self.folder) and not (self.folder / _PLAN).exists():
            remove_files(self.folder, _part_names(self.folder))

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.h5"

    def _part_bytes(self, start: int, cells: np.ndarray, codes: np.ndarray) -> bytes:
        order = np.argsort(cells, kind="stable")
        counts = np.bincount(cells, minlength=self._cells)

        def fill(file: h5py.File) -> None:
            file["end"] = np.cumsum([0, *counts])
            file["row"] = start + order
            file["code"] = codes[order]
            file.attrs["plan"] = digest(self._origin)

        return hdf5_bytes(fill)

    def _is_sound(self, number: int) -> bool:
        """Whether a part is there as it was written; a damaged one is removed, with a warning."""
        path = self._path(number)
        if not path.exists():
            return False
        try:
            self._read(number)
        except IndexingError as error:
            raise_passing(error, path)
            warn(f"encoding a damaged part again: {error}")
            path.unlink()
            return False
        return True

    def _read(self, number: int) -> _Part:
        path = self._path(number)
        start = number * self._size
        stop = min(start + self._size, len(self._vectors))
        try:
            with open_hdf5(path) as file:
                part = _Part(file["end"][:], memory_mapped(file["row"]), memory_mapped(file["code"]))
                is_right = file.attrs["plan"] == digest(self._origin)
            is_right = is_right and part.ends.shape == (self._cells + 1,)
            is_right = is_right and part.ends[0] == 0 and part.ends[-1] == stop - start
            is_right = is_right and bool((np.diff(part.ends) >= 0).all()) and part.codes.dtype == np.uint8
            is_right = is_right and part.rows.shape == part.codes.shape[:1] == (stop - start,)
            is_right = is_right and bool((np.sort(part.rows) == np.arange(start, stop)).all())
        except (OSError, OnceoverError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise IndexingError(f"{path} is damaged or missing; remove it and run the command again") from error
        if not is_right:
            raise IndexingError(f"{path} is a part of another index; remove it and run the command again")
        return part


def parts_folder(index_folder: Path) -> Path:
    """Where the parts of the index in ``index_folder`` lie while it is built."""
    return index_folder.with_name(f"{index_folder.name}.parts")


def write_share(parts: ListParts, worker: Worker) -> None:
    """Encodes a worker's share, every N-th part, and tells which workers have parts left."""
    own = list(worker.own(parts.numbers))
    try:
        parts.begin()
        say(f"worker {worker}: {len(own):,} of {len(parts.numbers):,} parts")
        parts.write(own)
    except FileNotFoundError:
        if (parts.folder / _PLAN).exists():
            raise
        say(f"the index was put together without worker {worker}")
        return
    left: dict[int, int] = {}
    for number in parts.left():
        owner = number % worker.count + 1
        left[owner] = left.get(owner, 0) + 1
    if left:
        shown = [f"{number}/{worker.count} ({count:,})" for number, count in sorted(left.items())]
        say(f"workers that have parts left: {', '.join(shown)}")


def write_lists(parts: ListParts, path: Path) -> None:
    """Encodes what is missing, merges all parts into one faiss file, and removes them."""
    parts.begin()
    parts.write(list(parts.numbers))
    parts.merge(path)
    parts.remove()


def _check_folder(folder: Path) -> None:
    """Refuses a link, a file, or a folder of somebody else's where the parts are to lie."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise IndexingError(f"{folder} is where an index keeps its parts, and it is no folder; move it elsewhere")
    if not folder.is_dir() or (folder / _PLAN).exists():
        return
    parts = _part_names(folder)  # which a worker put there while the folder was removed
    if any(name not in parts for name in visible_names(folder)):
        raise IndexingError(f"{folder} is where an index keeps its parts, and it holds other files; move it elsewhere")


def _part_names(folder: Path) -> list[str]:
    """The names of the parts in a folder, which need not be there."""
    return [name for name in visible_names(folder) if _PART_NAME.fullmatch(name)]


def _read_plan(folder: Path) -> dict:
    plan = read_record(folder / _PLAN, "the plan of the parts")
    if plan.get("format") != _FORMAT:
        raise IndexingError(f"{folder / _PLAN} is no plan of this program's; move {folder} elsewhere")
    return plan
