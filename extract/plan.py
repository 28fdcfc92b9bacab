"""The plan of an extraction: the rows to encode and the shards in which they are encoded, fixed before the first one.

A shard is a run of whole batches that lies in one file in the end. Batches depend on the plan alone, so that features
do not depend on how many workers there are, or on which of them encodes a shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onceover.base.files import digest

MAX_BATCHES = 8  # of a shard: what a kill can cost each worker
SHARDS_PER_WORKER = 32  # where there are so many batches: workers then end nearly together
CAPTION_BLOCK = 1024  # captions that are sorted by length together
CAPTIONS_PER_IMAGE = 4  # in a batch: a caption takes that much less memory and time


@dataclass(frozen=True)
class Shard:
    """A unit of work.

    Attributes:
        file: the file that it becomes.
        rows: of the dataset, those of its block: for images its own, for captions of all shards of the block.
        batches: the numbers of its batches among those of the block.
        size: how many rows it has.
    """

    file: Path
    rows: list[int]
    batches: range
    size: int


def plan_shards(kind: str, rows: list[int], batch_size: int, workers: int, blocks: int = 1) -> dict:
    """The plan for some rows of a kind, as plain values.

    Args:
        batch_size: images in a batch.
        workers: how many shards are encoded at a time.
        blocks: times ``CAPTION_BLOCK`` that captions are sorted in, for devices with large batches.

    Returns:
        ``todo``: the rows; ``batch``: rows in a batch; ``batches``: batches in a shard; ``block``: rows in a block.
    """
    batch = batch_size
    if kind == "text":
        batch = batch_size * CAPTIONS_PER_IMAGE
    batches = max(1, min(MAX_BATCHES, len(rows) // (batch * workers * SHARDS_PER_WORKER)))
    block = batch * batches
    if kind == "text":
        block = max(batch, CAPTION_BLOCK * blocks // batch * batch)
    return {"todo": rows, "batch": batch, "batches": batches, "block": block}


def is_plan(plan: dict) -> bool:
    """Whether plain values, read from a file, are a plan of ``plan_shards``."""
    numbers = [plan.get(name) for name in ("batch", "batches", "block")]
    return isinstance(plan.get("todo"), list) and all(isinstance(number, int) and number > 0 for number in numbers)


def shards_of(plan: dict, kind: str, folder: Path) -> list[Shard]:
    """The shards of a plan, in their order; their files, in ``folder``, are named after the plan.

    Of captions in batches of 64 and shards of 8 batches, a block of 1,024 has two shards::

        plan["todo"]:  [ block 0: 1,024 rows              ][ block 1: 1,024 rows              ][ block 2: 100 rows ]
        batches:         0 1 2 3 4 5 6 7 | 8 9 ... 14 15     0 1 2 3 4 5 6 7 | 8 9 ... 14 15     0 1
        files:           text-…-00000.h5 | text-…-00001.h5   text-…-00002.h5 | text-…-00003.h5   text-…-00004.h5
    """
    tag = digest(plan)[:12]
    shards = []
    for number, (rows, batches) in enumerate(_batches_by_shard(plan)):
        first = batches.start * plan["batch"]
        last = min(batches.stop * plan["batch"], len(rows))
        shards.append(Shard(folder / f"{kind}-{tag}-{number:05d}.h5", rows, batches, last - first))
    return shards


def _batches_by_shard(plan: dict) -> Iterator[tuple[list[int], range]]:
    """For each shard the rows of its block, and the numbers of its batches among those of the block."""
    todo = plan["todo"]
    for start in range(0, len(todo), plan["block"]):
        rows = todo[start : start + plan["block"]]
        count = -(-len(rows) // plan["batch"])
        for first in range(0, count, plan["batches"]):
            yield rows, range(first, min(first + plan["batches"], count))
