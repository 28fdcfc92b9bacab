"""Several devices of one machine: a process for each, in which an engine encodes its share of the shards."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from onceover.base.registry import Registry
from onceover.base.worker import Worker
from onceover.extract.encode import Encoding, Progress
from onceover.extract.encoding.devices import pick_device
from onceover.extract.engines._forks import ForkError, serve
from onceover.extract.plan import Shard

_Running = dict[Any, BaseProcess]  # by the ends of the pipes that they send to


class SeveralDevices:
    """An engine for several devices of one kind, which share the processors.

    Args:
        engines: the registry that has the engine ``name``, which works on each of them. devices: their names.
    """

    def __init__(self, engines: Registry, name: str, devices: Sequence[str]):
        self._engine = engines.load(name)
        self._load = partial(engines.load, name)
        self._devices = list(devices)

    def workers(self, device: torch.device) -> int:
        """How many batches are under way at a time on all devices."""
        return max(int(self._engine.workers(device)), len(self._devices))

    def describe(self, kind: str, device: torch.device) -> str:
        """The processes, and how many of what work at a time in all of them."""
        return f"a process for each of {', '.join(self._devices)}, {self._engine.describe(kind, device)}"

    def run(self, encoding: Encoding, shards: Sequence[Shard], _device: torch.device) -> Iterator[Progress]:
        """Has each device encode every n-th shard; an error of one of them ends all.

        Raises:
            ForkError: a process was killed.
        """
        context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
        running: _Running = {}
        try:
            for number, name in enumerate(self._devices, 1):
                worker = Worker(number, len(self._devices))
                receiver, sender = context.Pipe(duplex=False)
                work = (sender, self._load, encoding.on(name), worker.own(shards), name, worker)
                process = context.Process(target=_work, args=work)
                process.start()
                sender.close()  # so that the child's end is the only one, and its death ends the pipe
                running[receiver] = process
            while running:
                for ready in connection.wait(list(running)):
                    yield from _reports(ready, running)
        finally:
            for unneeded in running.values():
                unneeded.terminate()
                unneeded.join()


def _reports(receiver: Any, running: _Running) -> Iterator[Progress]:
    """What a process has to tell; it is taken from the running ones at its end.

    Raises:
        ForkError: it was killed. Any other exception is its own.
    """
    try:
        report = receiver.recv()
    except EOFError as error:
        running[receiver].join()
        raise ForkError(
            "a process that works for this one was killed, perhaps for want of memory; run the command again, and it "
            "goes on from here"
        ) from error
    if isinstance(report, BaseException):
        raise report
    if report is None:
        running.pop(receiver).join()
    else:
        yield report


def _work(
    sender: connection.Connection,
    load_engine: Callable[[], Any],
    encoding: Encoding,
    shards: list[Shard],
    name: str,
    worker: Worker,
) -> None:
    """Encodes shards on a device with its share of the processors; sends progress, and an error or None at the end."""
    serve(worker.number)
    threads = max(1, torch.get_num_threads() // worker.count)
    if hasattr(os, "sched_setaffinity"):
        cpus = worker.own(sorted(os.sched_getaffinity(0)))
        os.sched_setaffinity(0, cpus or os.sched_getaffinity(0))
    try:
        device = pick_device(name)
        torch.set_num_threads(threads)
        for progress in load_engine().run(encoding, shards, device):
            sender.send(progress)
        sender.send(None)
    except Exception as error:
        sender.send(error)
