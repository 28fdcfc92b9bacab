"""Forks of this process that decode and tokenise for a GPU, and memory that they share with it.

torch's DataLoader starts them, takes their results in order, and notices when one is killed.
"""

import contextlib
import ctypes
import math
import mmap
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from onceover.base.errors import OnceoverError
from onceover.base.memory import keep_freed_memory
from onceover.base.threads import in_order

_PR_SET_PDEATHSIG = 1


class ForkError(OnceoverError):
    """A process that worked for this one was killed."""


def in_processes(work: Callable[[Any], Any], tasks: Iterable[Any], processes: int) -> Generator[Any, None, None]:
    """``work`` of each task, in the order of the tasks, from forks of this process: threads would wait for each other.

    Results are pickled; what is large goes into ``shared`` memory. Twice as many tasks as processes are under way.
    Elsewhere than on Linux, where forks are not safe, threads work. Used within ``deaths_told``, since the news of a
    killed process comes as a signal.
    """
    keep_freed_memory()
    if sys.platform == "linux":
        yield from DataLoader(
            _Work(work),  # type: ignore[arg-type]  # that has items by task is all that is needed
            batch_size=None,
            sampler=tasks,
            num_workers=processes,
            collate_fn=_as_it_is,
            worker_init_fn=serve,
            multiprocessing_context="fork",
        )
    else:
        yield from in_order(work, tasks, processes)


def shared(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros in memory that is shared with forks of this process, and bounded by nothing but all of it."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


@contextlib.contextmanager
def deaths_told() -> Iterator[None]:
    """Raises ``ForkError`` when one of the processes of ``in_processes`` is killed."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # errors of the work itself name no process
            raise
        raise ForkError(
            f"a process that works for this one was killed ({error}), perhaps for want of memory; "
            "run the command again, and it goes on from here"
        ) from error


def serve(_number: int) -> None:
    """Ends with the process that is worked for, however that ends (prctl(2), Linux), and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Work:
    """Work by task, as a DataLoader wants it."""

    def __init__(self, work: Callable[[Any], Any]):
        self._work = work

    def __getitem__(self, task: Any) -> Any:
        return self._work(task)


def _as_it_is(result: Any) -> Any:
    return result
