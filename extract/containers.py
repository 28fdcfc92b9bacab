"""Files that hold many images, such as tars: whether one is only Git's pointer to it, or was changed on the way."""

from errno import ESTALE
from pathlib import Path

from onceover.base.addresses import is_address

_POINTER = b"version https://git-lfs"  # what Git has in the place of a large file
POINTER_FAULT = "it is Git's pointer to a large file, not the file: run git lfs pull"


def is_pointer(content: bytes) -> bool:
    """Whether a file's first bytes are those of a pointer of Git LFS."""
    return content.startswith(_POINTER)


def stamp_of(path: Path) -> tuple[int, int]:
    """A file's size and modification time in ns, by which a change is seen; (-1, -1) where it is not there."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, stamp: tuple[int, int]) -> None:
    """Refuses a file of this machine that was changed since ``stamp_of`` gave ``stamp``; an address is not asked again.

    Raises:
        OSError: it was changed or removed.
    """
    if not is_address(path) and stamp_of(path) != stamp:
        raise OSError(ESTALE, f"{path} was changed or removed since it was first read")
