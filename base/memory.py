"""How much memory there is, how much a piece of work takes, and how it is kept. Standard library only."""

import contextlib
import ctypes
import os
import resource
from collections.abc import Callable
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_STATUS = Path("/proc/self/status")
OVERHEAD = 7 * 2**28  # bytes beside the data; libraries that have computed a step map 0.9 GiB of writable memory
_MALLOPT = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_ARENA_MAX": -8}


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less where a container or ``ulimit`` says so."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if _CGROUP_LIMIT.is_file():
        text = _CGROUP_LIMIT.read_text().strip()
        if text.isdigit():
            limits.append(int(text))
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            limits.append(limit)
    return min(limits)


def default_memory() -> int:
    """Half of the memory there is, in bytes: what a command takes unless told otherwise."""
    return total_memory() // 2


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes by which this process grows at most while ``work`` runs; 0 where the system does not tell (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts a new high-water mark
    except OSError:
        work()
        return 0
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def keep_freed_memory() -> None:
    """Lets threads take freed memory up again, instead of having fresh pages cleared for every array.

    Three settings of glibc's ``mallopt`` (mallopt(3)): one arena for all threads; arrays up to its bound of 32 MiB from
    it, larger ones in maps of their own; nothing given back, but for what is free now. Elsewhere than on glibc nothing
    happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for name, value in (("M_ARENA_MAX", 1), ("M_MMAP_THRESHOLD", 32 << 20), ("M_TRIM_THRESHOLD", 2**31 - 1)):
            library.mallopt(_MALLOPT[name], value)
        library.malloc_trim(0)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
