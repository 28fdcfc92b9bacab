"""The plan of an extraction: the rows to encode and the shards in which they are encoded, fixed before the first one.

A shard is a run of whole batches that lies in one file in the end. Batches depend on the plan alone, so that features
do not depend on how many workers there are, or on which of them encodes a shard.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from onceover.base.files import digest

MAX_BATCHES = 8  # of a shard: what a kill can cost each worker
SHARDS_PER_WORKER = 32  # where there are so many batches: workers then end nearly together
CAPTION_BLOCK = 1024  # captions that are sorted by length together
CAPTIONS_PER_IMAGE = 4  # in a batch: a caption takes that much less memory and time


def batch_rows(kind: str, batch_size: int) -> int:
    """The rows of a kind in a batch, of ``batch_size`` images."""
    return batch_size * (CAPTIONS_PER_IMAGE if kind == "text" else 1)


@dataclass(frozen=True)
class Shard:
    """A unit of work.

    Attributes:
        file: the file that it becomes.
        runs: the rows of its block in the dataset, for images its own, for captions of all shards of the block: of each
            run of neighbours the first row, and the one behind the last.
        batches: the numbers of its batches among those of the block.
        size: how many rows it has.
    """

    file: Path
    runs: Sequence[int]
    batches: range
    size: int

    @property
    def rows(self) -> list[int]:
        """The rows of its block."""
        return list(chain.from_iterable(map(range, self.runs[::2], self.runs[1::2])))


def plan_shards(kind: str, rows: np.ndarray, batch_size: int, workers: int, blocks: int = 1) -> dict:
    """The plan for some rows of a kind, as plain values.

    Args:
        rows: int64 (n,), ascending.
        batch_size: images in a batch.
        workers: how many shards are encoded at a time.
        blocks: times ``CAPTION_BLOCK`` that captions are sorted in, for devices with large batches.

    Returns:
        ``runs``: the rows, as in ``Shard``; ``batch``: rows in a batch; ``batches``: batches in a shard; ``block``:
        rows in a block.
    """
    batch = batch_rows(kind, batch_size)
    batches = max(1, min(MAX_BATCHES, len(rows) // (batch * workers * SHARDS_PER_WORKER)))
    block = batch * batches
    if kind == "text":
        block = max(batch, CAPTION_BLOCK * blocks // batch * batch)
    return {"runs": _runs(rows).ravel().tolist(), "batch": batch, "batches": batches, "block": block}


def _runs(rows: np.ndarray) -> np.ndarray:
    """Ascending rows as runs of neighbours, int64 (R, 2): ``[3, 4, 5, 9]`` -> ``[[3, 6], [9, 10]]``."""
    if not len(rows):
        return np.zeros((0, 2), np.int64)
    ends = np.flatnonzero(np.diff(rows) > 1)
    starts = rows[np.concatenate([[0], ends + 1])]
    stops = rows[np.concatenate([ends, [-1]])] + 1
    return np.stack([starts, stops], axis=1)


def is_plan(plan: dict) -> bool:
    """Whether plain values, read from a file, are a plan of ``plan_shards``, or one of an earlier version."""
    numbers = [plan.get(name) for name in ("batch", "batches", "block")]
    has_rows = isinstance(plan.get("runs"), list) or isinstance(plan.get("todo"), list)
    return has_rows and all(isinstance(number, int) and number > 0 for number in numbers)


def shards_of(plan: dict, kind: str, folder: Path) -> list[Shard]:
    """The shards of a plan, in their order; their files, in ``folder``, are named after the plan.

    Of captions in batches of 64 and shards of 8 batches, a block of 1,024 has two shards::

        the rows:      [ block 0: 1,024 rows              ][ block 1: 1,024 rows              ][ block 2: 100 rows ]
        batches:         0 1 2 3 4 5 6 7 | 8 9 ... 14 15     0 1 2 3 4 5 6 7 | 8 9 ... 14 15     0 1
        files:           text-…-00000.h5 | text-…-00001.h5   text-…-00002.h5 | text-…-00003.h5   text-…-00004.h5
    """
    tag = digest(plan)[:12]
    shards = []
    for number, (runs, rows, batches) in enumerate(_batches_by_shard(plan)):
        first = batches.start * plan["batch"]
        last = min(batches.stop * plan["batch"], rows)
        shards.append(Shard(folder / f"{kind}-{tag}-{number:05d}.h5", runs, batches, last - first))
    return shards


def _batches_by_shard(plan: dict) -> "Iterator[tuple[array[int], int, range]]":
    """For each shard the runs and the number of rows of its block, and the numbers of its batches among the block's."""
    for runs, rows in _blocks(plan):
        count = -(-rows // plan["batch"])
        for first in range(0, count, plan["batches"]):
            yield runs, rows, range(first, min(first + plan["batches"], count))


def _blocks(plan: dict) -> "Iterator[tuple[array[int], int]]":
    """The rows of a plan in blocks: the runs of each, and how many rows they are."""
    all_runs = np.array(plan.get("runs", []), np.int64).reshape(-1, 2)
    if "todo" in plan:  # of an earlier version, which listed the rows
        all_runs = _runs(np.array(plan["todo"]))
    runs = array("q")
    rows = 0
    for start, stop in all_runs.tolist():
        while start < stop:
            end = min(stop, start + plan["block"] - rows)
            runs.extend((start, end))
            rows += end - start
            start = end
            if rows == plan["block"]:
                yield runs, rows
                runs = array("q")
                rows = 0
    if rows:
        yield runs, rows
