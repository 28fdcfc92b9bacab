"""Training pairs as a bridge between the modalities (the transfer of Ordonez et al. 2011, softened)."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from scipy.sparse import csr_array

from onceover.retrieval.baselines import Candidate, Embed, Pairs, unit_rows
from onceover.retrieval.exact import exact_search

NEIGHBOURS = (1, 3, 10, 30, 100, 300)
SHARPNESS = (0.02, 0.05, 0.1, 0.2)  # softmax temperature of the neighbours' weights
CANDIDATES = len(SHARPNESS) * (len(NEIGHBOURS) - 1) + 1  # one neighbour has the same weight at any sharpness
_BLOCK_BYTES = 8 * 2**20  # of values that are multiplied at a time


class Bridge:
    """Carries one modality, a query's, into the space of the other by its nearest training items; a ``Family``.

    With the images as values (``text_knn``) a caption enters the image space as the weighted mean of the images of its
    nearest training captions; else (``image_knn``) an image enters the caption space by the captions of its nearest
    training images.
    """

    def __init__(self, train: Pairs, *, moves_texts: bool):
        self._moves_texts = moves_texts
        if moves_texts:
            self._memory = unit_rows(train.texts).astype(np.float32)  # as it is searched
            self._values = unit_rows(train.images)
            self._value_of = train.image_index  # an image serves each of its captions
        else:
            having, image = np.unique(train.image_index, return_inverse=True)
            self._memory = unit_rows(train.images[having]).astype(np.float32)
            self._values = np.zeros((len(having), train.texts.shape[1]))
            np.add.at(self._values, image, unit_rows(train.texts))
            self._values /= np.bincount(image)[:, None]
            self._value_of = np.arange(len(having))

    def candidates(self, validation: Pairs) -> Iterator[Candidate]:
        """The vectors of the validation pairs by all numbers of neighbours, for one sharpness after the other."""
        unmoved, queries = self._split(validation)
        counts = sorted({min(count, len(self._memory)) for count in NEIGHBOURS})
        scores, rows = exact_search(self._memory, queries, counts[-1])
        for sharpness in SHARPNESS:
            moved = np.zeros((len(queries), self._values.shape[1]))
            nearer = 0
            for count in counts:
                moved += self._mixture(scores, rows, nearer, count, sharpness)
                nearer = count
                if count > 1 or sharpness == SHARPNESS[0]:  # the weight of a single one does not matter
                    yield Candidate({"neighbours": count, "sharpness": sharpness}, *self._ordered(unmoved, moved))

    def fit(self, settings: dict) -> Embed:
        """The bridge over some neighbours, at most as many as there are."""
        count = min(settings["neighbours"], len(self._memory))
        return partial(self._embed, count, settings["sharpness"])

    def _embed(self, count: int, sharpness: float, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of images (N, K) and texts (M, K) by so many neighbours."""
        unmoved, queries = self._split(pairs)
        scores, rows = exact_search(self._memory, queries, count)
        return self._ordered(unmoved, self._mixture(scores, rows, 0, count, sharpness))

    def _split(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of the modality that stays, and of the one that is carried over, float64 (rows, D) each."""
        if self._moves_texts:
            return unit_rows(pairs.images), unit_rows(pairs.texts)
        return unit_rows(pairs.texts), unit_rows(pairs.images)

    def _ordered(self, unmoved: np.ndarray, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of images and of texts."""
        if self._moves_texts:
            return unmoved, unit_rows(moved)
        return unit_rows(moved), unmoved

    def _mixture(self, scores: np.ndarray, rows: np.ndarray, first: int, last: int, sharpness: float) -> np.ndarray:
        """The weighted sum of the values of each query's neighbours from number ``first`` to ``last``, (Q, K)."""
        weights = np.exp((scores[:, first:last] - scores[:, :1]) / sharpness)
        starts = np.arange(0, weights.size + 1, weights.shape[1])
        values = self._value_of[rows[:, first:last]].ravel()
        return _product(csr_array((weights.ravel(), values, starts), (len(rows), len(self._values))), self._values)


def _product(weights: csr_array, values: np.ndarray) -> np.ndarray:
    """A sparse matrix times a dense one, (Q, N) @ (N, K), by columns of this that stay in a processor's caches."""
    columns = max(1, _BLOCK_BYTES // (values.itemsize * len(values)))
    product = np.empty((weights.shape[0], values.shape[1]))
    for start in range(0, values.shape[1], columns):
        block = slice(start, start + columns)
        product[:, block] = weights @ np.ascontiguousarray(values[:, block])
    return product
