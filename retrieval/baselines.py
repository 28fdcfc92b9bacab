"""Baselines that the trained heads have to beat: spaces in which nothing is learned, and nearest neighbours.

``retrieval.closed_form`` holds those that are linear maps. The fitted ones see the train images' features, averaged
over an image's views and standardised, and like the heads they are chosen on the validation images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np
from scipy.sparse import csr_array

from onceover.retrieval.exact import exact_search
from onceover.retrieval.metrics import quality
from onceover.retrieval.ranks import MetricsError, Ranks, rank

MAPS = 10  # random maps averaged: a single one strays from chance by luck
NEIGHBOURS = (1, 3, 10, 30, 100, 300)
SHARPNESS = (0.02, 0.05, 0.1, 0.2)  # softmax temperature of the neighbours' weights


@dataclass(frozen=True, eq=False)
class Pairs:
    """Features of N images, float (N, D), and of their M captions, (M, E), with the caption map, int64 (M,)."""

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray


#: a function from pairs to image and text vectors of one space
Embed = Callable[[Pairs], tuple[np.ndarray, np.ndarray]]
#: a baseline that may be chosen: its settings, and its function
Candidate = tuple[dict, Embed]
_Embed = TypeVar("_Embed", bound=Embed)


def choose(
    candidates: Iterator[tuple[dict, _Embed]], validation: Pairs, step: Callable[[], object] = lambda: None
) -> tuple[dict, _Embed]:
    """Chooses the candidate with the best rsum on the validation pairs; its settings get that rsum.

    Args:
        step: called after each candidate.

    Raises:
        MetricsError: there are no candidates.
    """
    best_rsum = -1.0
    best: tuple[dict, _Embed] | None = None
    for settings, embed in candidates:
        rsum = quality(*embed(validation), validation.image_index)["rsum"]
        if rsum > best_rsum:
            best_rsum = rsum
            best = (settings | {"selection_rsum": round(rsum, 1)}, embed)
        step()
    if best is None:
        raise MetricsError("no candidate of the baseline could be made")
    return best


def standardised(train: Pairs, *others: Pairs) -> list[Pairs]:
    """All pairs with each feature at mean 0 and deviation 1 over ``train``, float64, as in the heads' first layer.

    Features that are never negative over ``train`` are square-rooted first; one that is constant there becomes 0.
    """
    images = _Standardiser(train.images)
    texts = _Standardiser(train.texts)
    return [Pairs(images(pairs.images), texts(pairs.texts), pairs.image_index) for pairs in (train, *others)]


class _Standardiser:
    """Brings features to mean 0 and deviation 1 over the train features that it is made with."""

    def __init__(self, train: np.ndarray):
        self._takes_root = train.min() >= 0
        rows = self._rooted(train)
        deviation = rows.std(0)
        is_constant = deviation <= np.finfo(np.float32).eps * np.abs(rows).max(0)
        self._mean = rows.mean(0)
        self._scale = np.where(is_constant, 0, 1 / np.where(is_constant, 1, deviation))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (self._rooted(features) - self._mean) * self._scale

    def _rooted(self, features: np.ndarray) -> np.ndarray:
        if self._takes_root:
            return np.sqrt(np.maximum(features, 0), dtype=np.float64)
        return features.astype(np.float64)


def neighbours(train: Pairs, kind: str) -> Iterator[Candidate]:
    """Training pairs as a bridge between the modalities (the transfer of Ordonez et al. 2011, softened).

    Args:
        kind: ``text_knn``: a caption enters the image space as the weighted mean of the images of its nearest
            training captions; ``image_knn``: an image enters the caption space by the captions of its nearest
            training images.
    """
    bridge = _Bridge(train, kind)
    for count in sorted({min(count, bridge.size) for count in NEIGHBOURS}):
        for sharpness in SHARPNESS if count > 1 else SHARPNESS[:1]:
            yield {"neighbours": count, "sharpness": sharpness}, partial(bridge.embed, count, sharpness)


class _Bridge:
    """Carries one modality (a query's) into the space of the other by its nearest training items.

    Attributes:
        size: how many training items there are to be near.
    """

    def __init__(self, train: Pairs, kind: str):
        self._moves_texts = kind == "text_knn"
        images = unit_rows(train.images)
        texts = unit_rows(train.texts)
        if self._moves_texts:
            self._memory = texts
            self._values = images
            self._value_of = train.image_index  # an image serves each of its captions
        else:
            having, image = np.unique(train.image_index, return_inverse=True)
            sums = np.zeros((len(having), texts.shape[1]))
            np.add.at(sums, image, texts)
            self._memory = images[having]
            self._values = sums / np.bincount(image)[:, None]
            self._value_of = np.arange(len(having))
        self.size = len(self._memory)
        self._nearest = lru_cache(maxsize=1)(self._search)  # settings that follow each other share a search

    def embed(self, count: int, sharpness: float, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of images and texts by so many neighbours."""
        unmoved, scores, rows = self._nearest(pairs)
        weights = np.exp((scores[:, :count] - scores[:, :1]) / sharpness)
        starts = np.arange(0, weights.size + 1, weights.shape[1])
        values = self._value_of[rows[:, :count]].ravel()
        mixture = csr_array((weights.ravel(), values, starts), (len(rows), len(self._values)))
        moved = unit_rows(mixture @ self._values)
        if self._moves_texts:
            return unmoved, moved
        return moved, unmoved

    def _search(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The vectors that are not moved, and the scores and rows of the nearest training items of the others."""
        unmoved = pairs.images
        queries = pairs.texts
        if not self._moves_texts:
            unmoved = pairs.texts
            queries = pairs.images
        unmoved = unit_rows(unmoved)
        scores, rows = exact_search(self._memory, unit_rows(queries), max(NEIGHBOURS))
        return unmoved, scores, rows


def zero_shot(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """A dual encoder's own features, compared by cosine: nothing is learned here."""
    return unit_rows(pairs.images), unit_rows(pairs.texts)


def unlearned(
    space: np.ndarray,
    others: np.ndarray,
    image_index: np.ndarray,
    *,
    images_are_space: bool,
    seed: int = 0,
    step: Callable[[], object] = lambda: None,
) -> list[tuple[Ranks, Ranks]]:
    """Ranks in one modality's feature space that the other one enters by a random orthogonal map, once for each map.

    Args:
        space: features whose space is used, (rows, D). others: features mapped into it, (rows, E).
        images_are_space: ``image_only`` if true, else ``text_only``.
        step: called after each of the ``MAPS`` maps.

    Raises:
        MetricsError: features that are not finite, or a row without direction.
    """
    space = unit_rows(space)
    others = unit_rows(others)
    pairs = []
    for number in range(MAPS):
        mapping = random_orthogonal(others.shape[1], space.shape[1], [seed, images_are_space, number])
        if mapping.shape[0] < mapping.shape[1]:
            # a map into more dimensions keeps lengths, so that the fewer dimensions give the same scores
            in_space = space @ mapping.T
            moved = others
        else:
            in_space = space
            moved = unit_rows(others @ mapping)
        if images_are_space:
            pairs.append(rank(in_space, moved, image_index))
        else:
            pairs.append(rank(moved, in_space, image_index))
        step()
    return pairs


def random_orthogonal(rows: int, columns: int, seed: int | list[int]) -> np.ndarray:
    """A Haar-random matrix, float64 (rows, columns): its rows or its columns are orthonormal (Mezzadri 2007)."""
    gaussian = np.random.default_rng(seed).standard_normal((max(rows, columns), min(rows, columns)))
    basis, upper = np.linalg.qr(gaussian)
    basis *= np.sign(np.diag(upper))
    return basis if rows >= columns else basis.T


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64.

    Raises:
        MetricsError: a row that is not finite, or zero.
    """
    features = np.asarray(features, np.float64)
    norms = np.sqrt(np.einsum("rd,rd->r", features, features))[:, None]  # without an array of squares
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise MetricsError("features that are not finite, or zero, have no direction; verify the store")
    return features / norms
