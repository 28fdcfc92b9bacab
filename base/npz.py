"""Arrays in a .npz file: uncompressed, without pickled objects, and refused where they are anything else."""

import io
import zipfile
from pathlib import Path

import numpy as np

from onceover.base.files import MAX_TEXT, read_bytes


def npz_bytes(arrays: dict[str, np.ndarray]) -> memoryview:
    """The content of a .npz file of some arrays by name."""
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    return data.getbuffer()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name, whatever they are; each is as it was written (zip's checksums).

    Raises:
        Exception: of whatever kind, where the file is missing, damaged, or no such file.
    """
    data = io.BytesIO(read_bytes(path, MAX_TEXT))
    with zipfile.ZipFile(data) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed arrays, which are not written here")
    with np.load(data, allow_pickle=False) as arrays:
        return dict(arrays)
