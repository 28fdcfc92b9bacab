"""Processes that read, decode and tokenise, while this one keeps a GPU busy and threads write the shards.

A batch is begun before the last one is waited for.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from typing import Any

import torch
from PIL import Image

from onceover.base.threads import ahead, available_cpus
from onceover.extract.encode import DecodedImages, EncodedBatch, Encoding, ImageEncoding, Progress
from onceover.extract.encoding.devices import STREAMS
from onceover.extract.engines._forks import deaths_told, in_processes, shared
from onceover.extract.plan import Shard

PIECE = 16  # images that a process decodes at a time
MAX_PROCESSES = 64  # each holds some files open, and up to two pieces of memory
WRITERS = 3  # threads: while one waits for the disk, others prepare and write; so many shards are held in memory
TOKENISERS = 4  # processes; more take longer to begin than they save


def workers(_device: torch.device) -> int:
    """How many processes decode: one for each processor that may be used."""
    return min(available_cpus(), MAX_PROCESSES)


def describe(kind: str, device: torch.device) -> str:
    """How many processes decode."""
    if kind == "text":
        return f"{min(TOKENISERS, workers(device))} processes tokenise"
    return f"{workers(device)} processes decode"


def run(encoding: Encoding, shards: Sequence[Shard], device: torch.device) -> Iterator[Progress]:
    """Has every shard encoded on the device, in their order, and written as soon as its last batch is there."""
    batches = _tokenised(encoding, shards, device)
    if isinstance(encoding, ImageEncoding):
        batches = _decoded(encoding, shards, workers(device))
    encoded = ahead(lambda task: _begun(encoding, *task), batches, STREAMS)
    with deaths_told(), ThreadPoolExecutor(WRITERS) as writers, contextlib.closing(encoded):
        writing: deque[Future[float]] = deque()
        shard_batches: list[EncodedBatch] = []
        rows = 0
        last = time.perf_counter()
        for shard, begun, batch in encoded:
            now = time.perf_counter()
            decode = {name: seconds / workers(device) for name, seconds in batch.seconds.items()}
            yield Progress(batch.size, decode | {"encode": now - max(begun, last)})
            last = now
            shard_batches.append(batch)
            rows += batch.size
            if rows < shard.size:
                continue
            while writing and (writing[0].done() or len(writing) == WRITERS):  # what failed ends it now
                yield Progress(0, {"write": writing.popleft().result()})
            writing.append(writers.submit(_write, encoding, shard, shard_batches))
            shard_batches = []
            rows = 0
        for future in writing:
            yield Progress(0, {"write": future.result()})


def _begun(encoding: Encoding, shard: Shard, batch: Any) -> Callable[[], tuple[Shard, float, EncodedBatch]]:
    """Begins to encode a batch; the call that is returned gives its shard, when it was begun, and the batch."""
    begun = time.perf_counter()
    finish = encoding.begin(batch)
    return lambda: (shard, begun, finish())


def _write(encoding: Encoding, shard: Shard, batches: list[EncodedBatch]) -> float:
    """Writes a shard; gives the seconds that it took, as one of several writers."""
    start = time.perf_counter()
    encoding.write(shard, batches)
    return (time.perf_counter() - start) / WRITERS


def _tokenised(encoding: Encoding, shards: Sequence[Shard], device: torch.device) -> Iterator[tuple[Shard, Any]]:
    """The batches of captions, with their shards, tokenised by processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads would not outlive the fork
    by_shard = in_processes(lambda shard: list(encoding.read(shard)), iter(shards), min(TOKENISERS, workers(device)))
    for shard, batches in zip(shards, by_shard, strict=True):
        for batch in batches:
            yield shard, batch


def _decoded(
    encoding: ImageEncoding, shards: Sequence[Shard], processes: int
) -> Iterator[tuple[Shard, list[DecodedImages]]]:
    """The batches of images, with their shards, each in pieces that processes decode into shared memory."""
    sample = encoding.encoder.preprocessing.pixels(Image.new("RGB", (256, 256))).numpy()
    held = 2 * processes + encoding.batch_size // PIECE + 3  # pieces under way and in a batch
    buffers = shared((held, PIECE, *sample.shape), sample.dtype)
    batches: deque[tuple[Shard, int]] = deque()  # with how many pieces each

    def pieces() -> Iterator[tuple[int, list[int]]]:
        numbers = count()
        for shard in shards:
            for rows in encoding.batches(shard):
                starts = range(0, len(rows), PIECE)
                batches.append((shard, len(starts)))
                for start in starts:
                    yield next(numbers), rows[start : start + PIECE]

    def decode(piece: tuple[int, list[int]]) -> tuple[int, int, DecodedImages]:
        number, rows = piece
        images = encoding.decode(rows)
        size = len(images.pixels)
        if size:
            buffers[number % held, :size] = images.pixels
        return number % held, size, images._replace(pixels=images.pixels[:0])

    with contextlib.closing(in_processes(decode, pieces(), processes)) as results:
        decoded = (images._replace(pixels=buffers[number, :size]) for number, size, images in results)
        for first in decoded:
            shard, size = batches.popleft()
            yield shard, [first, *islice(decoded, size - 1)]
