"""Baselines that the trained heads have to beat: those without learning, and how the settings of others are chosen.

``retrieval.closed_form`` and ``retrieval.neighbours`` hold the fitted ones. They see the train images' features,
averaged over an image's views and standardised, and like the heads they are chosen on the validation images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from onceover.retrieval.metrics import RankPair, quality
from onceover.retrieval.ranks import MetricsError, rank

MAPS = 10  # random maps averaged: a single one strays from chance by luck


@dataclass(frozen=True, eq=False)
class Pairs:
    """Features of N images, float (N, D), and of their M captions, (M, E), with the caption map, int64 (M,)."""

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray


#: a function from pairs to image and text vectors of one space
Embed = Callable[[Pairs], tuple[np.ndarray, np.ndarray]]


class Candidate(NamedTuple):
    """Settings of a baseline, and the unit vectors that it gives the validation pairs with them, (N, K) and (M, K)."""

    settings: dict
    images: np.ndarray
    texts: np.ndarray


class Family(Protocol):
    """A baseline fitted to pairs, with a grid of settings that share what is costly."""

    def candidates(self, validation: Pairs) -> Iterator[Candidate]:
        """The vectors of the validation pairs with each setting of the grid."""

    def fit(self, settings: dict) -> Embed:
        """The baseline with some settings; of a number that is larger than there can be, the largest."""


def choose(family: Family, validation: Pairs, step: Callable[[], object] = lambda: None) -> dict:
    """Chooses the settings with the best rsum on the validation pairs, of equal ones the smallest; adds that rsum.

    Args:
        step: called after each candidate.
    """
    best_rsum = -1.0
    best: dict = {}
    for candidate in family.candidates(validation):
        rsum = quality(candidate.images, candidate.texts, validation.image_index)["rsum"]
        is_smaller = rsum == best_rsum and tuple(candidate.settings.values()) < tuple(best.values())
        if rsum > best_rsum or is_smaller:
            best_rsum = rsum
            best = candidate.settings
        step()
    return best | {"selection_rsum": round(best_rsum, 1)}


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


def zero_shot(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The features as they are, compared by cosine: nothing is learned here."""
    return unit_rows(pairs.images), unit_rows(pairs.texts)


def unlearned(
    space: np.ndarray,
    others: np.ndarray,
    image_index: np.ndarray,
    *,
    images_are_space: bool,
    seed: int = 0,
    step: Callable[[], object] = lambda: None,
) -> list[RankPair]:
    """Ranks in one modality's feature space that the other one enters by a random map, once for each of ``MAPS`` maps.

    A map pairs coordinates of the two at random, each with a random sign, and leaves out what the wider one has more.

    Args:
        space: features whose space is used, (rows, D). others: features mapped into it, (rows, E).
        images_are_space: ``image_only`` if true, else ``text_only``.
        step: called after each map.

    Raises:
        MetricsError: features that are not finite, or a row without direction.
    """
    space = unit_rows(space).astype(np.float32)
    others = unit_rows(others).astype(np.float32)
    pairs = []
    for number in range(MAPS):
        generator = np.random.default_rng([seed, images_are_space, number])
        in_space = space
        if space.shape[1] > others.shape[1]:  # what is left out would be multiplied by 0
            in_space = _signed_choice(space, others.shape[1], generator)
            moved = others
        else:
            moved = _signed_choice(others, space.shape[1], generator)
            lengths = np.linalg.norm(moved, axis=1, keepdims=True)
            moved /= np.where(lengths > 0, lengths, 1)  # a row whose chosen coordinates are all 0 stays there
        if images_are_space:
            pairs.append(rank(in_space, moved, image_index))
        else:
            pairs.append(rank(moved, in_space, image_index))
        step()
    return pairs


def _signed_choice(rows: np.ndarray, columns: int, generator: np.random.Generator) -> np.ndarray:
    """Some columns of ``rows``, (R, columns), in random order and each with a random sign."""
    chosen = generator.permutation(rows.shape[1])[:columns]
    signs = generator.choice(np.array([-1, 1], rows.dtype), columns)
    return rows[:, chosen] * signs


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
