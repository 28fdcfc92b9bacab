"""Work in threads, and work that is begun ahead of its results, which come in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from onceover.base.memory import keep_freed_memory


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
