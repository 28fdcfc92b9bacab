"""Work that keeps cores and a GPU busy: in threads, in processes, begun ahead; results in order."""

import contextlib
import ctypes
import math
import mmap
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.memory import keep_freed_memory

_PR_SET_PDEATHSIG = 1


class StreamError(OnceoverError):
    """A process that worked for this one was killed."""


def in_order(work: Callable[[Any], Any], tasks: Iterable[Any], streams: int) -> Iterator[Any]:
    """``work`` of each task, in the order of the tasks, from ``streams`` threads that compute in one thread each.

    Tasks are taken up a little ahead of what has been asked for, so that memory holds a few results at most.
    """
    import torch

    keep_freed_memory()
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from ahead(lambda task: pool.submit(work, task).result, tasks, 2 * streams)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def ahead(begin: Callable[[Any], Callable[[], Any]], tasks: Iterable[Any], count: int) -> Generator[Any, None, None]:
    """Results in the order of the tasks, of which ``count`` more are begun before the first is waited for.

    ``begin`` gives for each task the call that waits for its result. A generator of tasks is closed at the end.
    """
    waiting: deque[Callable[[], Any]] = deque()
    try:
        for task in tasks:
            waiting.append(begin(task))
            if len(waiting) > count:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()
    finally:
        getattr(tasks, "close", lambda: None)()


def in_processes(work: Callable[[Any], Any], tasks: Iterable[Any], processes: int) -> Generator[Any, None, None]:
    """``work`` of each task, in the order of the tasks, from forks of this process: threads would wait for each other.

    Results are pickled; what is large goes into ``shared`` memory. Twice as many tasks as processes are under way.
    Elsewhere than on Linux, where forks are not safe, threads work. Used within ``deaths_told``, since the news of a
    killed process comes as a signal.
    """
    from torch.utils.data import DataLoader

    keep_freed_memory()
    if sys.platform == "linux":
        yield from DataLoader(
            _Work(work),  # type: ignore[arg-type]  # that has items by task is all that is needed
            batch_size=None,
            sampler=tasks,
            num_workers=processes,
            collate_fn=_as_it_is,
            worker_init_fn=_serve,
            multiprocessing_context="fork",
        )
    else:
        yield from in_order(work, tasks, processes)


def shared(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros in memory that is shared with forks of this process, and bounded by nothing but all of it."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


@contextlib.contextmanager
def deaths_told() -> Iterator[None]:
    """Raises ``StreamError`` when one of the processes of ``in_processes`` is killed."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # errors of the work itself name no process
            raise
        raise StreamError(
            f"a process that works for this one was killed ({error}), perhaps for want of memory; "
            "run the command again, and it goes on from here"
        ) from error


def _serve(_number: int) -> None:
    """Ends with the process that is worked for, however that ends (prctl(2)), and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Work:
    """Work by task, as a DataLoader wants it."""

    def __init__(self, work: Callable[[Any], Any]):
        self._work = work

    def __getitem__(self, task: Any) -> Any:
        return self._work(task)


def _as_it_is(result: Any) -> Any:
    return result
