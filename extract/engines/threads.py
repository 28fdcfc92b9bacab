"""Threads of this process, each of which encodes shards in one thread of arithmetic.

Every core has work at any time, and none waits for another.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from onceover.base.memory import keep_freed_memory
from onceover.extract.encode import Encoding, Progress
from onceover.extract.plan import Shard


class _Stopped(Exception):
    """Another shard has failed, or the user wants to stop."""


def workers(_device: torch.device) -> int:
    """As many as torch would compute with."""
    return torch.get_num_threads()


def describe(_kind: str, device: torch.device) -> str:
    """How many batches are encoded at a time."""
    return f"{workers(device)} at a time"


def run(encoding: Encoding, shards: Sequence[Shard], device: torch.device) -> Iterator[Progress]:
    """Has every shard encoded by one of the threads; after an error the others end with the batch they are at."""
    keep_freed_memory()
    reports: queue.SimpleQueue[Progress | Future] = queue.SimpleQueue()
    stopping = threading.Event()

    def report(progress: Progress) -> None:
        if stopping.is_set():
            raise _Stopped
        reports.put(progress)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers(device), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for shard in shards:
            pool.submit(encoding, shard, report).add_done_callback(reports.put)
        unfinished = len(shards)
        while unfinished:
            progress = reports.get()
            if isinstance(progress, Future):
                progress.result()
                unfinished -= 1
            else:
                yield progress
    finally:
        stopping.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
