"""Work that keeps every core busy: threads that compute in one thread each, results in order, and where time went."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from extract.memory import keep_freed_memory


class Speed(NamedTuple):
    """Rows encoded, the seconds that it took, and the seconds that each stage took, summed over threads."""

    rows: int
    seconds: float
    stages: dict[str, float]

    def __str__(self) -> str:
        return f"{self.rows / self.seconds:.1f} rows a second ({shares(self.stages)})"


def shares(stages: dict[str, float]) -> str:
    """What the time goes to, the most first, since that is what limits: ``encode 93 %, decode 6 %, write 1 %``."""
    whole = sum(stages.values())
    return ", ".join(f"{name} {100 * stages[name] / whole:.0f} %" for name in sorted(stages, key=stages.get)[::-1])


def in_order(work: Callable, tasks: Iterable, streams: int) -> Iterator:
    """``work`` of each task, in the order of the tasks, from ``streams`` threads that compute in one thread each.

    Tasks are taken up a little ahead of what has been asked for, so that memory holds a few results at most.
    """
    import torch

    keep_freed_memory()
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > 2 * streams:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
