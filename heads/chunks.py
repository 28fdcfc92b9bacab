"""The features that a fit passes over: all in memory, or in shuffled chunks where they do not fit."""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from onceover.base.errors import OnceoverError
from onceover.base.hdf5 import RowsOnDisk
from onceover.base.memory import OVERHEAD
from onceover.extract.store import FeatureStore
from onceover.heads.batches import Batch
from onceover.heads.rows import captions_of

MIN_MEMORY = 2**31  # bytes
CHUNKS_IN_MEMORY = 3  # one is in use, one waits, one is being read
NEIGHBOURS = 256  # images that lie side by side in the store and are read together
BLOCK = 2**20  # numbers read at a time where all are passed over: 4 MiB

#: features of a store, read when rows are asked for, or an array of them
Features = np.ndarray | RowsOnDisk


class ChunkError(OnceoverError):
    """A memory limit in which nothing can be fitted."""


class Chunk(NamedTuple):
    """Some images of a store and all their captions, with their features on the device.

    Attributes:
        image_rows: int64 (P,), rows of the store, ascending. caption_rows: int64 (T,), the same.
        images: float32 (P, V, D), standardised.
        texts: float32 (T, E), standardised.
    """

    image_rows: np.ndarray
    caption_rows: np.ndarray
    images: Tensor
    texts: Tensor

    def within(self, batch: Batch) -> Batch:
        """A batch of rows of the store as rows of this chunk."""
        images = np.searchsorted(self.image_rows, batch.images)
        captions = np.searchsorted(self.caption_rows, batch.captions)
        return batch._replace(images=images, captions=captions)


class Chunks:
    """Deals images with their captions into chunks that fit the memory, anew in each epoch.

    Runs of neighbouring images are shuffled and a chunk is made of many of them, so that its batches are nearly as
    mixed as those over all images, while a disk reads long stretches. The next chunk is read while one is in use.

    Args:
        image_rows: rows of the store, ascending.
        image_index: int64 (M,), the image of each caption.
        standardize: by ``image`` and ``text``, the layers that features go through as they are read.
        count: how many chunks (``chunks_needed``); a single one is read once and kept.

    Attributes:
        views: how many views an image has.
    """

    def __init__(
        self,
        store: FeatureStore,
        image_rows: np.ndarray,
        image_index: np.ndarray,
        standardize: Mapping[str, nn.Module],
        count: int,
        device: str | torch.device,
    ):
        self.views = store.image_features.shape[1]
        self._store = store
        self._image_index = image_index
        self._standardize = standardize
        self._count = count
        self._device = device
        self._runs = np.array_split(image_rows, math.ceil(len(image_rows) / NEIGHBOURS))
        self._whole: Chunk | None = None
        if count == 1:
            self._whole = self._read(image_rows)

    def groups(self, generator: np.random.Generator | None = None) -> list[np.ndarray]:
        """The images of each chunk, in the order of the store, or shuffled by ``generator``.

        Four runs of two images in two chunks::

            runs      [0 1] [2 3] [4 5] [6 7]
            shuffled  [4 5] [0 1] [6 7] [2 3]
            groups    [0 1 4 5] [2 3 6 7]
        """
        runs = self._runs
        if generator is not None and self._count > 1:
            runs = [self._runs[number] for number in generator.permutation(len(self._runs))]
        groups = []
        for numbers in np.array_split(np.arange(len(runs)), self._count):
            if len(numbers):
                groups.append(np.sort(np.concatenate([runs[number] for number in numbers])))
        return groups

    def epoch(self, generator: np.random.Generator) -> Iterator[Chunk]:
        """Yields all images of an epoch, chunk by chunk."""
        if self._whole is not None:
            yield self._whole
            return
        with ThreadPoolExecutor(1) as reader:
            groups = iter(self.groups(generator))
            pending = reader.submit(self._read, next(groups))
            for group in groups:
                chunk = pending.result()
                pending = reader.submit(self._read, group)
                yield chunk
                del chunk
            yield pending.result()

    def _read(self, image_rows: np.ndarray) -> Chunk:
        caption_rows = captions_of(self._image_index, image_rows)
        images = standardised(self._standardize["image"], self._store.image_features, image_rows)
        texts = standardised(self._standardize["text"], self._store.text_features, caption_rows)
        return Chunk(image_rows, caption_rows, images.to(self._device), texts.to(self._device))


def memory_on(device: torch.device, memory: int) -> int:
    """Bytes that features may take: ``memory``, or what is free on the GPU that they are moved to, if that is less.

    Raises:
        ChunkError: the GPU has less than ``MIN_MEMORY``.
    """
    if device.type != "cuda":
        return memory
    free, _ = torch.cuda.mem_get_info(device)
    if free < MIN_MEMORY:
        raise ChunkError(
            f"{device} has {free / 2**20:,.0f} MiB free, too little to fit heads; "
            "free at least 2GiB there, or take --device cpu"
        )
    return min(memory, free)


def chunks_needed(store: FeatureStore, train: np.ndarray, validation: np.ndarray, memory: int) -> int:
    """How many chunks the train images and their captions need, so that ``memory`` bytes suffice.

    A single chunk stays in memory, with the features of the validation images beside it.

    Raises:
        ChunkError: less than ``MIN_MEMORY``.
    """
    if memory < MIN_MEMORY:
        raise ChunkError(f"a memory of {memory / 2**20:,.0f} MiB is too little to fit heads; give at least 2GiB")
    if _size(store, np.union1d(train, validation)) <= memory - OVERHEAD:
        return 1
    return max(2, math.ceil(CHUNKS_IN_MEMORY * _size(store, train) / (memory - OVERHEAD)))


def _size(store: FeatureStore, image_rows: np.ndarray) -> int:
    """Bytes of the float32 features of images and their captions."""
    captions = int(np.count_nonzero(np.isin(store.image_index, image_rows)))
    images_size = len(image_rows) * math.prod(store.image_features.shape[1:])
    texts_size = captions * math.prod(store.text_features.shape[1:])
    return 4 * (images_size + texts_size)


def blocks(features: Features, rows: np.ndarray | None = None) -> Iterator[Tensor]:
    """Yields features, or some rows of them, in their order, block by block: float32 (b, ...)."""
    size = max(1, BLOCK // math.prod(features.shape[1:]))
    count = len(features) if rows is None else len(rows)
    for start in range(0, count, size):
        block = slice(start, start + size)
        values = features[block] if rows is None else features[rows[block]]
        yield torch.tensor(np.asarray(values)).float()


@torch.no_grad()
def standardised(layer: nn.Module, features: Features, rows: np.ndarray) -> Tensor:
    """Some rows of features, in their order, through a layer that keeps their shape: float32 (n, ...), on the CPU."""
    result = torch.empty(len(rows), *features.shape[1:])
    start = 0
    for block in blocks(features, rows):
        result[start : start + len(block)] = layer(block)
        start += len(block)
    return result
