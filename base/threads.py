"""How many threads there may be, work in threads, and work that is begun ahead of its results, which come in order."""

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onceover.base.memory import keep_freed_memory

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_V1 = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # read when a library is loaded


def available_cpus() -> int:
    """How many processors this process may use: the machine's, or fewer by its affinity or by other limits."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(count, _limit())))


def _limit() -> float:
    """The processors that a container's quota or ``OMP_THREAD_LIMIT`` leaves; infinite without either."""
    thread_limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if thread_limit.isdecimal():
        return min(_cpu_quota(), int(thread_limit))
    return _cpu_quota()


def _cpu_quota() -> float:
    """The processors' time that a container may take, in processors; infinite without a quota."""
    try:
        if _QUOTA.is_file():
            quota, period = _QUOTA.read_text().split()
        else:
            quota, period = (path.read_text().strip() for path in _QUOTA_V1)
        if float(quota) > 0:  # no number: "max", or -1
            return float(quota) / float(period)
    except (OSError, ValueError):
        pass
    return math.inf


def bound_threads() -> None:
    """Bounds the threads of libraries that are loaded from now on by a container's quota or ``OMP_THREAD_LIMIT``.

    They see the machine's processors and this process's affinity themselves, but no quota, and faiss waits for ever for
    threads that the limit denies it. What the user has set stays.
    """
    if math.isfinite(_limit()):
        for variable in _VARIABLES:
            os.environ.setdefault(variable, str(available_cpus()))


class _AlgebraLimit:
    """The limit of one thread for linear algebra, of the whole process; the last one who leaves lifts it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: Any = None

    def enter(self) -> None:
        """Sets the limit, unless somebody has set it before."""
        from threadpoolctl import threadpool_limits

        with self._lock:
            if not self._users:
                self._limits = threadpool_limits(1, user_api="blas")
            self._users += 1

    def leave(self) -> None:
        """Lifts the limit, unless somebody still needs it."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._limits.restore_original_limits()


_algebra_limit = _AlgebraLimit()


@contextlib.contextmanager
def single_threaded_algebra() -> Iterator[None]:
    """Within, the linear algebra of NumPy, SciPy and faiss computes in the thread that calls it, in this whole process.

    Each of these libraries has threads of its own, which wait for each other in a loop: on a busy machine that takes
    ten times as long as one thread does.
    """
    _algebra_limit.enter()
    try:
        yield
    finally:
        _algebra_limit.leave()


@contextlib.contextmanager
def worker_threads() -> Iterator[ThreadPoolExecutor]:
    """Gives a pool of a thread for each processor, each of which computes alone (``single_threaded_algebra``)."""
    from threadpoolctl import threadpool_limits

    with single_threaded_algebra():
        pool = ThreadPoolExecutor(available_cpus(), initializer=threadpool_limits, initargs=(1, "openmp"))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def in_order(work: Callable[[Any], Any], tasks: Iterable[Any], workers: int) -> Iterator[Any]:
    """``work`` of each task, in the order of the tasks, from ``workers`` threads that compute in one thread each.

    Tasks are taken up a little ahead of what has been asked for, so that memory holds a few results at most.
    """
    import torch

    keep_freed_memory()
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from ahead(lambda task: pool.submit(work, task).result, tasks, 2 * workers)
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
