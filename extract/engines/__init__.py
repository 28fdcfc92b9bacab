"""Engines: ways to have shards encoded, each one file here, or a module of another package.

Another package adds an engine by an entry point of the group ``onceover.engines``. An engine is a module, or an object,
with what ``Engine`` lists. It may call an encoding for each shard, in any order, in other processes or on other
machines, since an encoding can be pickled; or overlap the encoding's steps.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from onceover.base.registry import Registry
from onceover.extract.encode import Encoding, Progress
from onceover.extract.engines._several import SeveralDevices
from onceover.extract.plan import Shard

ENGINES = Registry("onceover.extract.engines", "onceover.engines", "engine")
AUTO = "auto"


class Engine(Protocol):
    """A way to have shards encoded."""

    def workers(self, device: torch.device) -> int:
        """How many batches are under way at a time."""

    def describe(self, kind: str, device: torch.device) -> str:
        """How many of what work at a time, for a message: ``2 at a time``."""

    def run(self, encoding: Encoding, shards: Sequence[Shard], device: torch.device) -> Iterator[Progress]:
        """Has every shard encoded and written, in whatever order, and yields what is done as it is done.

        An error ends it; what is written stays.
        """


def engine_for(name: str, devices: Sequence[torch.device]) -> tuple[str, Engine]:
    """An engine for one or several devices, and its name.

    ``auto`` takes threads on a processor, and processes that feed another device.

    Raises:
        RegistryError: there is no such engine.
    """
    if name == AUTO:
        name = "threads" if devices[0].type == "cpu" else "processes"
    if len(devices) > 1:
        return name, SeveralDevices(ENGINES, name, [str(device) for device in devices])
    return name, ENGINES.load(name)
