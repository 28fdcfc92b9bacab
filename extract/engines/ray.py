"""A cluster of Ray: actors that hold an encoder, one for each GPU or for a few processors, to which shards are handed.

Ray places the actors, starts those anew that die, and hands them again what they had under way; this process seals the
store. All nodes need the folder of the store, and the dataset, at the same paths. Shards are Ray Core's actor calls and
no blocks of Ray Data, which cuts its data anew, so that a resumed store would not equal an uninterrupted one.
"""

import math
import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from onceover.base.errors import OnceoverError, first_line
from onceover.base.extras import Extra
from onceover.base.files import FileError
from onceover.base.memory import keep_freed_memory
from onceover.extract.encode import Encoding, Progress
from onceover.extract.encoding.devices import pick_device
from onceover.extract.plan import Shard

Unit = TypeVar("Unit")
Result = TypeVar("Result")
RAY = Extra("ray", "ray", "ray")
CORES = 4  # processors of an actor: its threads share one encoder
RESTARTS = 8  # of an actor that dies, so that a shard that kills whoever encodes it ends the work
GPU_ROWS = 16_384  # about what an actor with a GPU is handed at a time, since its pipeline has to fill and to drain


class RayError(OnceoverError):
    """A cluster that cannot be reached, or that cannot do the work."""


class _Team(NamedTuple):
    """How many actors a cluster has room for, and the processors and GPUs that each of them asks for."""

    actors: int
    cpus: int
    gpus: int

    @property
    def at_once(self) -> int:
        """How many shards an actor has under way: one for a GPU, or one for each of its processors."""
        return 1 if self.gpus else self.cpus


def connect(address: str | None = None) -> None:
    """Connects to a cluster, if this process is in none: that at ``address`` or in ``RAY_ADDRESS``, or a local one.

    A local one that runs already is taken; else one is started, which ends with this process.

    Raises:
        RayError: the cluster cannot be reached. MissingPackageError: Ray is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = RAY.imported("--engine ray")
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "on this machine"
        raise RayError(
            f"the cluster of Ray {where} cannot be reached ({first_line(error)}); start one with ray start, and give "
            "its --address"
        ) from error


def actors(device: torch.device) -> int:
    """How many actors there are."""
    return _team(device).actors


def workers(device: torch.device) -> int:
    """How many shards are under way at a time."""
    team = _team(device)
    return team.actors * team.at_once


def describe(_kind: str, device: torch.device) -> str:
    """How many actors there are, and how many shards at a time."""
    return f"{actors(device)} workers of Ray, {workers(device)} shards at a time"


def run(encoding: Encoding, shards: Sequence[Shard], device: torch.device) -> Iterator[Progress]:
    """Has every shard encoded by one of the actors; what a lost one had under way is done by another.

    Raises:
        RayError: an actor died again and again.
    """
    work = partial(_encode, encoding.on(device.type), device.type)
    yield from spread(work, _handed(shards, device), device, in_threads=device.type == "cpu")


def spread(
    work: Callable[[Unit], Result], units: Sequence[Unit], device: torch.device, in_threads: bool = False
) -> Iterator[Result]:
    """The results of some work on each unit, in whatever order, from actors that each keep their copy of ``work``.

    Args:
        work: can be pickled. in_threads: an actor works on as many units at a time as it has processors.

    Raises:
        RayError: an actor died again and again. Any other error is the work's own.
    """
    connect()
    import ray
    from ray.util import ActorPool

    team = _team(device)
    at_once = team.at_once if in_threads else 1
    actor_class = ray.remote(_Actor).options(
        num_cpus=team.cpus,
        num_gpus=team.gpus,
        max_concurrency=at_once,
        max_restarts=RESTARTS,
        max_task_retries=-1,  # calls fail and are repeated, too, until the cluster knows that a node is lost
    )
    copied = ray.put(work)
    threads = 1 if in_threads else team.cpus
    count = min(team.actors, math.ceil(len(units) / at_once))
    places = [actor_class.remote(threads) for _ in range(count)] * at_once
    pool: Any = ActorPool(places)
    del places  # an actor ends when nothing refers to it
    for unit in units:
        pool.submit(lambda actor, unit: actor.do.remote([copied], unit), unit)
    while pool.has_next():
        while pool.pop_idle() is not None:  # nothing is left for it, and a lost one may need its place
            pass
        try:
            result = pool.get_next_unordered()
        except ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", None) or error from None
        except ray.exceptions.RayError as error:
            raise RayError(
                f"a worker of Ray died {RESTARTS + 1} times, perhaps for want of memory "
                f"({first_line(error)}); run the command again, and it goes on from here"
            ) from error
        yield result


class _Actor:
    """Keeps a copy of some work, and does it in so many threads of arithmetic."""

    def __init__(self, threads: int):
        keep_freed_memory()
        self._threads = threads
        self._work: Callable[[Any], Any] | None = None
        self._lock = threading.Lock()

    def do(self, copied: list[Any], unit: Any) -> Any:
        """The result of the work on a unit.

        Args:
            copied: a reference to the work, in a list so that Ray does not fetch the work for each unit.
        """
        import ray

        with self._lock:
            if self._work is None:
                self._work = ray.get(copied[0])
        torch.set_num_threads(self._threads)
        return self._work(unit)


def _encode(encoding: Encoding, device_type: str, shards: Sequence[Shard]) -> Progress:
    """Encodes those of some shards that are not there yet."""
    folder = shards[0].file.parent
    if not folder.is_dir():
        raise FileError(
            f"{folder} is not on the node {platform.node()}; --engine ray needs a store in a folder that all nodes "
            "share at the same path"
        )
    reports: list[Progress] = []
    todo = [shard for shard in shards if not shard.file.exists()]
    if device_type == "cpu":
        for shard in todo:
            encoding(shard, reports.append)
    else:
        from onceover.extract.engines import processes

        reports += processes.run(encoding, todo, pick_device(device_type))
    seconds: dict[str, float] = {}
    for report in reports:
        for stage, taken in report.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + taken
    return Progress(sum(shard.size for shard in shards), seconds)


def _handed(shards: Sequence[Shard], device: torch.device) -> list[list[Shard]]:
    """The shards in runs that an actor is handed at a time."""
    length = 1
    if device.type != "cpu" and shards:
        length = max(1, GPU_ROWS // shards[0].size)
    return [list(shards[start : start + length]) for start in range(0, len(shards), length)]


def _team(device: torch.device) -> _Team:
    """The actors for the nodes that are up: one for each GPU, or for up to four processors.

    Raises:
        RayError: there is room for none.
    """
    connect()
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if device.type == "cuda":
        gpus = [int(node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
        cpus = [int(node.get("CPU", 0)) // int(node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
        team = _Team(sum(gpus), min(cpus, default=0), 1)
    else:
        team = _cpu_team([int(node.get("CPU", 0)) for node in nodes])
    if not team.actors:
        raise RayError(f"no node of the cluster has a place for {device.type}; start nodes that have, or name --device")
    return team


def _cpu_team(cpus: Sequence[int]) -> _Team:
    """Actors of up to ``CORES`` processors that leave the fewest idle of nodes that have so many."""
    teams = []
    for share in range(1, CORES + 1):
        teams.append(_Team(sum(count // share for count in cpus), share, 0))
    return max(teams, key=lambda team: (team.actors * team.cpus, team.cpus))
