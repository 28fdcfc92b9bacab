"""The batches of an epoch, as rows of a feature store. numpy only."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from onceover.heads.rows import captions_of, positions_in, positions_in_group


class Batch(NamedTuple):
    """The images and captions of a step, as rows of a store (or of a chunk of it).

    Attributes:
        images: int64 (B,), each image once.
        views: int64 (B,), the view of each image.
        captions: int64 (T,).
        image_of_text: int64 (T,), the position in ``images`` of each caption's image, ascending.
    """

    images: np.ndarray
    views: np.ndarray
    captions: np.ndarray
    image_of_text: np.ndarray


class Batches:
    """Deals images with their captions into batches: each image at most once a batch, each caption once an epoch.

    An epoch runs in rounds. In a round each image that has captions left brings ``captions_per_image`` of them, in
    an order drawn anew for the epoch, with one view drawn at random.

    Args:
        images: rows of images, int64 (P,). Those without captions are in no batch.
        image_index: int64 (M,), the image of each caption of the store.
        views: how many views an image has.
        batch_size: images of a batch, at most. captions_per_image: of a batch, at most.

    Attributes:
        steps: how many batches an epoch has.
    """

    def __init__(
        self, images: np.ndarray, image_index: np.ndarray, views: int, batch_size: int, captions_per_image: int
    ):
        self._captions = captions_of(image_index, images)
        self._images = image_index[self._captions]
        self._views = views
        self._batch_size = batch_size
        self._captions_per_image = captions_per_image
        counts = np.bincount(self._images)
        self.steps = 0
        for used in range(0, int(counts.max()), self._captions_per_image):
            present = int((counts > used).sum())
            self.steps += math.ceil(present / self._batch_size)

    def epoch(self, generator: np.random.Generator) -> Iterator[Batch]:
        """Yields the batches of one epoch, in an order that ``generator`` decides.

        Six captions of three images, with two captions per image and batches of two images::

            caption         0 1 2 3 4 5
            its image       0 0 0 1 1 2
            shuffled        2 0 1 4 3 5      the captions of each image in a random order
            round           0 0 1 0 0 0      their position among those of their image, // 2

        If the images of round 0 come in the order 2 0 1, the batches are::

            round  images  captions  image_of_text
            0      2 0     5 2 0     0 1 1
            0      1       4 3       0 0
            1      0       1         0
        """
        draws = generator.random(len(self._captions))
        order = np.lexsort((draws, self._images))
        images = self._images[order]
        captions = self._captions[order]
        rounds = positions_in_group(images) // self._captions_per_image
        for number in range(int(rounds.max()) + 1):
            in_round = rounds == number
            yield from self._round(images[in_round], captions[in_round], generator)

    def _round(self, images: np.ndarray, captions: np.ndarray, generator: np.random.Generator) -> Iterator[Batch]:
        """Yields the batches of one round. ``images``: int64 (T,), ascending, the image of each of ``captions``."""
        present = generator.permutation(np.unique(images))
        positions = positions_in(images, present)
        by_position = np.argsort(positions, kind="stable")
        positions = positions[by_position]
        captions = captions[by_position]
        count = math.ceil(len(present) / self._batch_size)
        for batch in np.array_split(np.arange(len(present)), count):
            start, stop = np.searchsorted(positions, [batch[0], batch[-1] + 1])
            views = generator.integers(self._views, size=len(batch))
            yield Batch(present[batch], views, captions[start:stop], positions[start:stop] - batch[0])
