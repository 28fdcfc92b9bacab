"""Loads the steps of a fine-tuning: a worker's share of each batch, with its noise, while the step before is in use."""

import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from onceover.configs.schema import FinetuneConfig, ModelConfig
from onceover.extract.store import KINDS, FeatureStore
from onceover.heads.batches import Batch, Batches
from onceover.heads.noise import Noise, draw_noise
from onceover.heads.seeds import seed_for
from onceover.heads.towers import MicroBatch, Tower
from onceover.heads.workers import Workers

_CROP_NUMBERS = 5  # area, aspect, left, top, mirror


class Step(NamedTuple):
    """A worker's share of a batch, loaded. Dictionaries are by ``image`` and ``text``.

    Attributes:
        micro_batches: of the share, with positions counted in it.
        noise: of the share's rows.
        transfer: where heads are trained with feature transfer, the stored features (n, D) of the two rows whose
            difference is added to each row.
        bounds: int64 (workers + 1,), which rows of the batch each worker has.
        image_of_text: int64 (T,), of the whole batch, on the device.
    """

    micro_batches: dict[str, list[MicroBatch]]
    noise: dict[str, Noise]
    transfer: dict[str, tuple[Tensor, Tensor]]
    bounds: dict[str, np.ndarray]
    image_of_text: Tensor


class StepLoader:
    """Loads the steps of a fine-tuning's epochs.

    Args:
        train: rows of the images to train on.
        model: of the heads, whose ``variation`` asks for feature transfer, and ``block_dropout`` for blocks.
        towers: by ``image`` and ``text``.

    Attributes:
        steps: how many an epoch has.
    """

    def __init__(
        self,
        store: FeatureStore,
        train: np.ndarray,
        towers: Mapping[str, Tower],
        model: ModelConfig,
        settings: FinetuneConfig,
        workers: Workers,
    ):
        self._store = store
        self._towers = towers
        self._uses_transfer = model.variation > 0
        self._has_blocks = model.block_dropout > 0
        self._seed = settings.seed
        self._workers = workers
        self._views = store.image_features.shape[1]
        sizes = (settings.batch_size, settings.captions_per_image)
        self._batches = Batches(train, store.image_index, self._views, *sizes)
        self.steps = self._batches.steps

    def remaining(self, epoch: int, first: int) -> Iterator[Step]:
        """Yields an epoch's steps from number ``first`` on, each loaded while the one before it is in use."""
        generator = np.random.default_rng(seed_for(self._seed, "order", epoch))
        numbered = itertools.islice(enumerate(self._batches.epoch(generator)), first, None)
        with ThreadPoolExecutor(1) as reader:
            pending: Future[Step] | None = None
            for number, batch in numbered:
                loaded = pending
                pending = reader.submit(self.load, epoch, number, batch)
                if loaded:
                    yield loaded.result()
            if pending:
                yield pending.result()

    def load(self, epoch: int, number: int, batch: Batch) -> Step:
        """Loads this worker's share of a batch: its images, all their captions, and the noise for them.

        A batch of 4 images and 6 captions for 2 workers::

            image_of_text   0 0 1 2 2 3
            bounds image    0 2 4           worker 0 has the images 0 and 1
            bounds text     0 3 6           and the captions 0, 1 and 2

        Args:
            number: of the batch in its epoch, from 0.
        """
        image_bounds = self._workers.bounds(len(batch.images))
        text_bounds = np.searchsorted(batch.image_of_text, image_bounds)
        own_images = self._workers.own(image_bounds)
        own_texts = self._workers.own(text_bounds)
        generator = self._rng("noise", epoch, number)
        image_noise, text_noise = draw_noise(
            generator, batch, self._views, self._store.dims, has_blocks=self._has_blocks
        )
        noise = {"image": image_noise.part(own_images), "text": text_noise.part(own_texts)}
        transfer = {}
        if self._uses_transfer:
            for kind in KINDS:
                transfer[kind] = (self._stored(kind, noise[kind].first), self._stored(kind, noise[kind].second))
        crops = self._rng("crops", epoch, number).random((len(batch.images), _CROP_NUMBERS))
        words_shape = (len(batch.captions), self._towers["text"].longest)
        words = self._rng("words", epoch, number).random(words_shape, np.float32)
        images = self._towers["image"].micro_batches(
            batch.images[own_images], batch.views[own_images], crops[own_images]
        )
        texts = self._towers["text"].micro_batches(batch.captions[own_texts], None, words[own_texts])
        return Step(
            micro_batches={"image": images, "text": texts},
            noise=noise,
            transfer=transfer,
            bounds={"image": image_bounds, "text": text_bounds},
            image_of_text=torch.from_numpy(batch.image_of_text).to(self._workers.device),
        )

    def _rng(self, purpose: str, epoch: int, number: int) -> np.random.Generator:
        return np.random.default_rng([seed_for(self._seed, purpose, epoch), number])

    def _stored(self, kind: str, rows: np.ndarray) -> Tensor:
        """The store's features of rows that noise names, float32 (n, D); of images counted over all views."""
        if kind == "text":
            stored = self._store.text_features[rows]
        else:
            stored = self._store.image_features[rows // self._views, rows % self._views]
        return torch.from_numpy(np.asarray(stored, np.float32))
