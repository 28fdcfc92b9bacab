"""Arrays by their names in one file: ``.npz``, HDF5 and ``.safetensors``, read a block of rows at a time.

Nothing is unpickled, and an HDF5 file that reaches outside itself is refused.
"""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import h5py
import numpy as np
from safetensors import safe_open

from onceover.base.hdf5 import open_hdf5
from onceover.extract.store import row_blocks

MAX_ARRAYS = 2_000_000  # in an HDF5 file: one for each image
_NUMPY_NAMES = {"F16": "float16", "F32": "float32", "F64": "float64"}  # of the dtypes of safetensors


class Header(NamedTuple):
    """The shape of an array and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class NamedArrays:
    """The arrays of a file.

    Attributes:
        noun: the format's word for arrays. headers: of each array, by its name.
        blocks: opens the file anew and reads the rows of the named array, some at a time.
        whole: opens the file anew and reads the named arrays, one after the other.
    """

    noun: str
    headers: dict[str, Header]
    blocks: Callable[[str], Iterator[np.ndarray]]
    whole: Callable[[list[str]], Iterator[np.ndarray]]


def npz_arrays(path: Path) -> NamedArrays:
    """The arrays of a ``.npz`` file, compressed or not.

    Raises:
        ValueError: Python objects, or fewer bytes than a shape needs.
    """
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                shape, _, dtype = _npy_header(file)
                size = archive.getinfo(name).file_size - file.tell()
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects, which are not read")
            if size != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
                raise ValueError(f"{name} has {size:,} bytes of numbers, which are not those of its shape {shape}")
            headers[name.removesuffix(".npy")] = Header(shape, dtype.name)

    def blocks(name: str) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            shape, is_fortran, dtype = _npy_header(file)
            if is_fortran:
                yield np.frombuffer(file.read(), dtype).reshape(shape, order="F")
                return
            row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
            for rows in row_blocks(shape[0]):
                count = rows.stop - rows.start
                yield np.frombuffer(file.read(count * row_bytes), dtype).reshape(count, *shape[1:])

    def whole(names: list[str]) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                with archive.open(f"{name}.npy") as file:
                    shape, is_fortran, dtype = _npy_header(file)
                    yield np.frombuffer(file.read(), dtype).reshape(shape, order="F" if is_fortran else "C")

    return NamedArrays("arrays", headers, blocks, whole)


def refuse_objects(path: Path) -> None:
    """Refuses a ``.npy`` file of Python objects, which numpy writes where rows differ in length or type.

    Raises:
        ValueError: it holds some, or has no header. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        _, _, dtype = _npy_header(file)
    if dtype.hasobject:
        raise ValueError(
            "it holds Python objects, which are not read; save numbers: "
            "numpy.save('x.npy', numpy.stack(list(ARRAY)).astype('float32'))"
        )


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype; ``file`` then stands at the first number."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array of the unknown version {version}")
    shape, is_fortran, dtype = read(file)
    return shape, is_fortran, dtype


def hdf5_arrays(path: Path) -> NamedArrays:
    """The datasets of an HDF5 file that hold numbers; those in groups have their path as name."""
    headers: dict[str, Header] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "iuf":
            headers[name] = Header(item.shape, item.dtype.name)

    with open_hdf5(path, max_objects=MAX_ARRAYS) as file:
        file.visititems(note)

    def blocks(name: str) -> Iterator[np.ndarray]:
        with open_hdf5(path, again=True, max_objects=MAX_ARRAYS) as file:
            dataset = file[name]
            yield from (dataset[rows] for rows in row_blocks(len(dataset)))

    def whole(names: list[str]) -> Iterator[np.ndarray]:
        with open_hdf5(path, again=True, max_objects=MAX_ARRAYS) as file:
            yield from (file[name][:] for name in names)

    return NamedArrays("datasets", headers, blocks, whole)


def safetensors_arrays(path: Path) -> NamedArrays:
    """The tensors of a ``.safetensors`` file."""
    headers = {}
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no dict
            tensor = file.get_slice(name)
            dtype = tensor.get_dtype()
            headers[name] = Header(tuple(tensor.get_shape()), _NUMPY_NAMES.get(dtype, dtype))

    def blocks(name: str) -> Iterator[np.ndarray]:
        with safe_open(path, framework="np") as file:
            tensor = file.get_slice(name)
            yield from (tensor[rows] for rows in row_blocks(headers[name].shape[0]))

    def whole(names: list[str]) -> Iterator[np.ndarray]:
        with safe_open(path, framework="np") as file:
            yield from (file.get_tensor(name) for name in names)

    return NamedArrays("tensors", headers, blocks, whole)
