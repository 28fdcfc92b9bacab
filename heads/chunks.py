"""The features that a fit passes over: in memory at once, or in shuffled chunks of a store that is larger."""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from onceover.base.errors import OnceoverError
from onceover.base.memory import OVERHEAD
from onceover.extract.store import FeatureStore

MIN_MEMORY = 2**31
AT_A_TIME = 3  # chunks: one is in use, one waits, one is being read
NEIGHBOURS = 256  # images that lie side by side in the store and are read together
BLOCK = 2**20  # numbers read at a time where all are passed over: 4 MiB


class ChunkError(OnceoverError):
    """A budget of memory in which nothing can be done."""


class Chunk(NamedTuple):
    """Some images, rows of the store in ascending order, and all their captions, with their features.

    ``images``: float32 (P, V, D). ``texts``: float32 (T, E).
    """

    pictures: np.ndarray
    captions: np.ndarray
    images: Tensor
    texts: Tensor

    def place(self, pictures: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows of the store stand in this chunk."""
        return np.searchsorted(self.pictures, pictures), np.searchsorted(self.captions, captions)


class Chunks:
    """Deals images with their captions into chunks that fit the memory, anew in each epoch.

    Runs of neighbouring images are shuffled and a chunk is made of many of them, so that its batches are nearly as
    mixed as those over all images, while a disk reads long stretches. The next chunk is read while one is in use.

    Args:
        pictures: rows of the store, ascending. image_index: int64 (M,), each caption's image.
        standardize: by ``image`` and ``text``, the layers that features go through as they are read.
        count: into how many (``chunks_for``); a single one is read once and kept.

    Attributes:
        views: V, of each image.
    """

    def __init__(
        self,
        store: FeatureStore,
        pictures: np.ndarray,
        image_index: np.ndarray,
        standardize: Mapping[str, nn.Module],
        count: int,
        device: str | torch.device,
    ):
        self._store, self._image_index, self._standardize = store, image_index, standardize
        self._count, self._device, self.views = count, device, store.image_features.shape[1]
        self._runs = np.array_split(pictures, math.ceil(len(pictures) / NEIGHBOURS))
        self._whole = self._read(pictures) if count == 1 else None

    def groups(self, generator: np.random.Generator | None = None) -> list[np.ndarray]:
        """The images of each chunk: of an epoch whose ``generator`` shuffles, or in the order of the store."""
        runs = self._runs
        if generator is not None and self._count > 1:
            runs = [self._runs[number] for number in generator.permutation(len(self._runs))]
        parts = np.array_split(np.arange(len(runs)), self._count)
        return [np.sort(np.concatenate([runs[number] for number in part])) for part in parts if len(part)]

    def epoch(self, generator: np.random.Generator) -> Iterator[Chunk]:
        """All images, chunk by chunk."""
        if self._whole is not None:
            yield self._whole
            return
        with ThreadPoolExecutor(1) as reader:
            groups = iter(self.groups(generator))
            coming = reader.submit(self._read, next(groups))
            for group in groups:
                chunk, coming = coming.result(), reader.submit(self._read, group)
                yield chunk
                del chunk
            yield coming.result()

    def _read(self, pictures: np.ndarray) -> Chunk:
        captions = np.flatnonzero(np.isin(self._image_index, pictures))
        images = standardised(self._standardize["image"], self._store.image_features, pictures)
        texts = standardised(self._standardize["text"], self._store.text_features, captions)
        return Chunk(pictures, captions, images.to(self._device), texts.to(self._device))


def memory_on(device: torch.device, memory: int) -> int:
    """Bytes that features may take: ``memory``, or what a card that they are moved to has free, if that is less.

    Raises:
        ChunkError: the card has less than ``MIN_MEMORY``.
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


def chunks_for(store: FeatureStore, train: np.ndarray, selection: np.ndarray, memory: int) -> int:
    """Into how many chunks the train images and their captions have to be dealt for ``memory`` bytes to suffice.

    A single chunk stays, with the features of the validation images beside it.

    Raises:
        ChunkError: less than ``MIN_MEMORY``.
    """
    if memory < MIN_MEMORY:
        raise ChunkError(f"a memory of {memory / 2**20:,.0f} MiB is too little to fit heads; give at least 2GiB")
    if _size(store, np.union1d(train, selection)) <= memory - OVERHEAD:
        return 1
    return max(2, math.ceil(AT_A_TIME * _size(store, train) / (memory - OVERHEAD)))


def _size(store: FeatureStore, pictures: np.ndarray) -> int:
    """Bytes of the float32 features of images and their captions."""
    captions = np.count_nonzero(np.isin(store.image_index, pictures))
    sides = ((store.image_features, len(pictures)), (store.text_features, captions))
    return sum(4 * rows * math.prod(features.shape[1:]) for features, rows in sides)


def blocks(features: np.ndarray, rows: np.ndarray | None = None) -> Iterator[Tensor]:
    """All features, or some rows of them, in their order, float32, a block at a time."""
    most = max(1, BLOCK // math.prod(features.shape[1:]))
    for start in range(0, len(features) if rows is None else len(rows), most):
        block = slice(start, start + most)
        yield torch.tensor(np.asarray(features[block if rows is None else rows[block]])).float()


@torch.no_grad()
def standardised(layer: nn.Module, features: np.ndarray, rows: np.ndarray) -> Tensor:
    """Some rows of features, in their order, through a layer that keeps their shape: float32, on the processor."""
    filled, start = torch.empty(len(rows), *features.shape[1:]), 0
    for block in blocks(features, rows):
        filled[start : start + len(block)] = layer(block)
        start += len(block)
    return filled
