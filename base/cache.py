"""The folder of this machine that keeps copies of remote files; the oldest go where they grow beyond a size.

``ONCEOVER_CACHE`` names the folder, ``ONCEOVER_CACHE_SIZE`` the size (``200GiB``). Standard library only.
"""

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from onceover.base.errors import OnceoverError
from onceover.base.formats import MANIFEST

DEFAULT_SIZE = 50 * 2**30  # bytes; a quarter of the disk where that is less
_KEPT = 0.9  # of the size, what stays when the oldest copies go
_TAG = "CACHEDIR.TAG"  # the file by which backup programs, too, know a cache (https://bford.info/cachedir/)
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n# copies that onceover fetched; any may be removed\n"
_COPY = re.compile(r"\.?[\w@.-]+\.h5")
_OLD = 86_400  # seconds, after which a hidden file is no longer being written
_IN_USE = 3600  # seconds, in which a manifest that was fetched or looked at stays
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)


class CacheError(OnceoverError):
    """A setting of the cache that cannot be."""


def parse_size(text: str) -> int | None:
    """A number of bytes, of a text such as 500MiB or 2GiB; None of anything else."""
    match = _SIZE.fullmatch(text)
    if not match or not float(match[1]):
        return None
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def cache_folder() -> Path:
    """The folder that ``ONCEOVER_CACHE`` names, or ``onceover`` where the system keeps caches."""
    named = os.environ.get("ONCEOVER_CACHE")
    if named:
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "onceover"


def copies_folder() -> Path:
    """The folder with a folder for each remote one that files were copied of."""
    return cache_folder() / "stores"


def make_copies_folder(folder: Path) -> None:
    """Makes a folder for copies, with a tag; in one that has other files and no tag nothing is ever removed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_tagged(folder) and not any(folder.iterdir()):
        (folder / _TAG).write_text(_SIGNATURE)


def size_limit() -> int:
    """Bytes that copies may take up.

    Raises:
        CacheError: ``ONCEOVER_CACHE_SIZE`` is no size.
    """
    size = named_size()
    if size is None:
        return min(DEFAULT_SIZE, shutil.disk_usage(copies_folder()).total // 4)
    return size


def named_size() -> int | None:
    """Bytes that ``ONCEOVER_CACHE_SIZE`` names; None where it is not set.

    Raises:
        CacheError: it is no size.
    """
    text = os.environ.get("ONCEOVER_CACHE_SIZE")
    if not text:
        return None
    size = parse_size(text)
    if size is None:
        raise CacheError(f"ONCEOVER_CACHE_SIZE is {text!r}, which is no size; write for example 500MiB or 200GiB")
    return size


_total: dict[Path, int] = {}  # bytes of copies, as far as this process knows
_counting = threading.Lock()


def note_copy(size: int) -> None:
    """Counts a new copy, and removes those that were used longest ago where there is too much of them.

    A process that uses one of these fetches it again. Each process counts for itself, beginning with what is there.
    """
    with _counting:
        _note_copy(copies_folder(), size)


def _note_copy(folder: Path, size: int) -> None:
    if folder in _total:
        _total[folder] += size
    else:
        _total[folder] = sum(status.st_size for _, status in _copies(folder))
    limit = size_limit()
    if _total[folder] <= limit:
        return
    copies = sorted(_copies(folder), key=lambda copy: copy[1].st_atime_ns)
    total = sum(status.st_size for _, status in copies)
    for file, status in copies:
        if total <= _KEPT * limit:
            break
        if file.name == MANIFEST and status.st_atime > time.time() - _IN_USE:
            continue
        file.unlink(missing_ok=True)
        total -= status.st_size
    _total[folder] = total


def _copies(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The copies that may go: whole ones, and those that a killed process has left half-written."""
    for own in folder.iterdir():
        if own.is_symlink() or not _is_tagged(own):
            continue
        for entry in list(os.scandir(own)):
            if not entry.is_file(follow_symlinks=False) or _COPY.fullmatch(entry.name) is None:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # another process has just finished it, or removed it
                continue
            if not entry.name.startswith(".") or status.st_mtime < time.time() - _OLD:
                yield Path(entry.path), status


def _is_tagged(folder: Path) -> bool:
    """Whether this program made a folder, for copies alone."""
    try:
        return (folder / _TAG).read_text() == _SIGNATURE
    except (OSError, ValueError):
        return False


def note_use(path: Path) -> None:
    """Notes that a copy is in use, by the time of its last access, where that may be set."""
    with contextlib.suppress(OSError):  # another user's copy, or one that has just been removed
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
