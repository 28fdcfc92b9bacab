"""Arrays in other programs' files, read a block of rows at a time: ``.npy``, ``.npz``, HDF5, safetensors, Parquet.

Nothing is unpickled.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import check_regular
from onceover.base.progress import ProgressBar
from onceover.extract.dataset.parquet import load_pyarrow, open_parquet
from onceover.extract.named_arrays import NamedArrays, hdf5_arrays, npz_arrays, refuse_objects, safetensors_arrays
from onceover.extract.names import natural, shown
from onceover.extract.store import BLOCK, row_blocks

_STORED = {"float16": "float16", "float32": "float32", "float64": "float32"}
_SHOWN = 4  # names in an error
_MAX_REASON = 200  # characters of another library's message
#: formats that are not read, and how to convert them
_CONVERSIONS = {
    ".pt": "is not read; convert it: numpy.save('x.npy', torch.load(FILE, weights_only=True).numpy())",
    ".pkl": "is a pickle, which can run code and is not read; where it was made: numpy.save('x.npy', ARRAY)",
    ".mat": "is not read; convert it: numpy.save('x.npy', scipy.io.loadmat(FILE)['NAME'])",
}
_CONVERSIONS |= {".pth": _CONVERSIONS[".pt"], ".pickle": _CONVERSIONS[".pkl"]}
_NAMED_ARRAY = re.compile(r"(.+\.(?:safetensors|npz|h5|hdf5)):(.+)")


class ArrayError(OnceoverError):
    """An array or a table that cannot be read, or that is not what it should be."""


@dataclass(frozen=True)
class _File:
    """An array in a file; ``blocks`` opens it anew and reads at most ``BLOCK`` rows at a time.

    ``names``: those of the rows, where the file has an array for each of them.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[], Iterator[np.ndarray]]
    names: list[str] | None = None


@dataclass(frozen=True)
class Array:
    """Rows of numbers in one file or several: the ``shape`` of all together, and the ``dtype`` to store them with."""

    source: Path
    files: list[_File]
    shape: tuple[int, ...]
    dtype: str

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def names(self) -> list[str] | None:
        """The names of the rows, where files have an array for each name."""
        names = [file.names for file in self.files if file.names is not None]
        return list(chain.from_iterable(names)) if len(names) == len(self.files) else None

    def mean_of_regions(self) -> "Array":
        """The same with the mean of each row's regions in their place: (N, R, D) -> (N, D).

        Raises:
            ArrayError: there are no regions.
        """
        if len(self.shape) != 3:
            raise ArrayError(f"{self.source} has the shape {self.shape}, and no regions whose mean could be taken")
        files = []
        for file in self.files:
            means = partial(_means, file.blocks)
            files.append(replace(file, shape=(file.shape[0], file.shape[2]), blocks=means))
        return Array(self.source, files, (len(self), self.shape[2]), self.dtype)

    def blocks(self, doing: str) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows in order, at most ``BLOCK`` at a time, as ``dtype``, with their places; ``doing`` labels the bar.

        Raises:
            ArrayError: numbers that are not finite, or a damaged file.
        """
        start = 0
        with ProgressBar(doing, "rows", total=len(self)) as bar:
            for file in self.files:
                first = start
                for block in file.blocks():
                    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused below
                        block = np.ascontiguousarray(block, self.dtype)
                    bad = np.flatnonzero(~np.isfinite(block).all(axis=tuple(range(1, block.ndim))))
                    if len(bad):
                        row = start - first + bad[0]
                        raise ArrayError(f"{file.path}: row {row:,} (counted from 0) is not finite as {self.dtype}")
                    yield slice(start, start + len(block)), block
                    start += len(block)
                    bar.update(len(block))


def _means(blocks: Callable[[], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Blocks of rows with the mean of each row's regions."""
    return (block.mean(1, dtype=np.float32).astype(block.dtype) for block in blocks())


def open_array(source: Path, dimensions: tuple[int, ...]) -> Array:
    """The array in a file, one of several in it (``FILE.npz:NAME``), or the arrays in all files of a folder, joined.

    A file that has an array of one shape for each of many names gives a row for each name.

    float16 stays as it is, float64 becomes float32. ``dimensions``: how many it may have, that of the rows included.

    Raises:
        ArrayError: nothing there, not readable, without rows, or of another shape or type.
    """
    path, name = _named_array(source)
    readers: dict[str, Callable[[Path], _File]] = {
        ".npy": _npy,
        ".npz": partial(_chosen, npz_arrays, name=name),
        ".h5": partial(_chosen, hdf5_arrays, name=name),
        ".hdf5": partial(_chosen, hdf5_arrays, name=name),
        ".safetensors": partial(_chosen, safetensors_arrays, name=name),
        ".parquet": _parquet,
    }
    return _joined(source, [readers[file.suffix](file) for file in files_of(path, tuple(readers))], dimensions)


def join_arrays(source: Path, arrays: list[Array], dimensions: tuple[int, ...]) -> Array:
    """The rows of several arrays, one after the other.

    Raises:
        ArrayError: they have rows of different shapes or types.
    """
    return _joined(source, list(chain.from_iterable(array.files for array in arrays)), dimensions)


def _joined(source: Path, files: list[_File], dimensions: tuple[int, ...]) -> Array:
    """The array of all files' rows, of which some may be empty."""
    files = [file for file in files if file.shape[:1] != (0,)]
    if not files:
        raise ArrayError(f"{source} holds no rows")
    for file in files:
        if file.dtype not in _STORED:
            raise ArrayError(f"{file.path} holds {file.dtype}; features are float16, float32 or float64")
        if len(file.shape) not in dimensions or 0 in file.shape[1:]:
            wanted = " or ".join(("", "", "(rows, numbers)", "(rows, views, numbers)")[count] for count in dimensions)
            raise ArrayError(f"{file.path} has the shape {file.shape}; {wanted} is needed")
    row = files[0].shape[1:]
    dtype = files[0].dtype
    for file in files:
        if (file.shape[1:], file.dtype) != (row, dtype):
            raise ArrayError(
                f"{file.path} has rows of the shape {file.shape[1:]}, {file.dtype}, and {files[0].path} has {row}, "
                f"{dtype}; all files of a folder need the same"
            )
    return Array(source, files, (sum(file.shape[0] for file in files), *row), _STORED[dtype])


def files_of(source: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """``source``, or the files of that folder in natural order (2 before 10), which have to be of one format.

    Raises:
        ArrayError: nothing there, or not of one of the formats.
    """
    formats = ", ".join(suffixes)
    if not source.exists():
        raise ArrayError(f"{source} does not exist; name a file ({formats}), or a folder of such files")
    if not source.is_dir():
        if source.suffix.lower() in _CONVERSIONS:
            raise ArrayError(f"{source} {_CONVERSIONS[source.suffix.lower()]}")
        if source.suffix not in suffixes:
            raise ArrayError(f"{source} is of no known format; name a file of one of these: {formats}")
        return [source]
    files = [file for file in source.iterdir() if file.suffix in suffixes and not file.name.startswith(".")]
    present = sorted({file.suffix for file in files})
    if len(present) != 1:
        holds = f"files of several formats ({', '.join(present)})" if present else "no such files"
        raise ArrayError(f"{source} holds {holds}; name a folder with files of one of these formats: {formats}")
    return sorted(files, key=lambda file: (natural(file.name), file.name))


def _named_array(source: Path) -> tuple[Path, str | None]:
    named = None if source.exists() else _NAMED_ARRAY.fullmatch(str(source))
    return (Path(named[1]), named[2]) if named else (source, None)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the readers raise on files that are not what they seem into an error of one line.

    Raises:
        ArrayError: no regular file, or one that its reader does not take.
    """
    try:
        check_regular(path)
        yield
    except ArrayError:
        raise
    except OnceoverError as error:
        raise ArrayError(str(error)) from error
    except Exception as error:  # tokenize.TokenError, EOFError, KeyError, pyarrow's own …
        reason = " ".join(next(iter(str(error).splitlines()), "").split()) or type(error).__name__
        raise ArrayError(f"{path} is damaged, or not what its name says ({reason:.{_MAX_REASON}})") from error


def _npy(path: Path) -> _File:
    def blocks() -> Iterator[np.ndarray]:
        with _readable(path):
            array = np.lib.format.open_memmap(path, mode="r")
        yield from (array[rows] for rows in row_blocks(len(array)))

    with _readable(path):
        refuse_objects(path)
        array = np.lib.format.open_memmap(path, mode="r")  # reads nothing but .npy
        size = path.stat().st_size
    if array.size and array.offset + array.nbytes != size:
        raise ArrayError(f"{path} has {size:,} bytes; its shape {array.shape} needs {array.offset + array.nbytes:,}")
    return _File(path, array.shape, array.dtype.name, blocks)


def _chosen(read: Callable[[Path], NamedArrays], path: Path, name: str | None) -> _File:
    """The array of that name; without a name the only one, or a row for each array where all have one shape.

    Raises:
        ArrayError: the file is damaged, or has several arrays of different shapes and none was named.
    """
    with _readable(path):
        arrays = read(path)
    headers = arrays.headers
    if name is None and len(headers) == 1:
        name = next(iter(headers))
    if name in headers:
        shape, dtype = headers[name]
        return _File(path, shape, dtype, partial(_guarded, path, partial(arrays.blocks, name)))
    kinds = set(headers.values())
    if name is None and len(kinds) == 1:
        shape, dtype = kinds.pop()
        names = list(headers)
        rows = partial(_guarded, path, partial(_stacked, arrays, names))
        return _File(path, (len(names), *shape), dtype, rows, names)
    listed = [f"{shown(known)} {header.shape}" for known, header in list(headers.items())[:_SHOWN]]
    more = f" and {len(headers) - _SHOWN:,} more" if len(headers) > _SHOWN else ""
    raise ArrayError(
        f"{path} holds the {arrays.noun} {', '.join(listed)}{more}; name one of them: {path}:NAME"
        if headers
        else f"{path} holds no {arrays.noun} of numbers"
    )


def _stacked(arrays: NamedArrays, names: list[str]) -> Iterator[np.ndarray]:
    """Blocks of rows, one for each of the named arrays."""
    rows_of_names = arrays.whole(names)
    for rows in row_blocks(len(names)):
        yield np.stack([next(rows_of_names) for _ in range(rows.stop - rows.start)])


def _guarded(path: Path, blocks: Callable[[], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Blocks of rows; what goes wrong while they are read is an error that names the file."""
    reading = blocks()
    while True:
        with _readable(path):
            block = next(reading, None)
        if block is None:
            return
        yield block


def _parquet(path: Path) -> _File:
    pa = load_pyarrow()

    def lists(rows: int) -> Iterator:
        with _readable(path), open_parquet(path) as file:
            yield from (batch.column(0) for batch in file.iter_batches(rows, columns=[name]))

    def blocks() -> Iterator[np.ndarray]:
        start = 0
        for column in lists(BLOCK):
            lengths = pa.compute.list_value_length(column).to_numpy(zero_copy_only=False)  # NaN: no list
            bad = np.flatnonzero(lengths != size)
            if len(bad):
                raise ArrayError(f"{path}: row {start + bad[0]:,} (counted from 0) has not {size} numbers")
            yield column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
            start += len(column)

    with _readable(path), open_parquet(path) as file:
        count = file.metadata.num_rows
        schema = file.schema_arrow
    name, number_type = _numbers(pa, path, schema)
    size = len(next(lists(1))[0].values or ()) if count else 0
    dtype = pa.array([], type=number_type).to_numpy(zero_copy_only=False).dtype  # pyarrow's own names need pandas
    return _File(path, (count, size), dtype.name, blocks)


def _numbers(pa: Any, path: Path, schema: Any) -> tuple[str, Any]:
    """The column that holds the features, and the type of their numbers."""
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    is_number = (pa.types.is_floating, pa.types.is_integer)
    types = {}
    for field in schema:
        if any(test(field.type) for test in is_list) and any(test(field.type.value_type) for test in is_number):
            types[field.name] = field.type.value_type
    chosen = ["embedding"] if "embedding" in types else list(types)
    if len(chosen) != 1:
        columns = f"several columns of lists of numbers ({', '.join(types)})" if types else "no column of such lists"
        raise ArrayError(f"{path} has {columns}; features are a list of numbers a row, in the column embedding")
    return chosen[0], types[chosen[0]]
