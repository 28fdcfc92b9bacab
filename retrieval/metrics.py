"""Retrieval metrics over two sets of embeddings, in numpy alone.

Ranks are exact: every score is computed, none approximated. Ties are broken at random in expectation, so a collapsed
model scores chance and the order of rows never matters. R@K, as this field writes it, is hit@K: the probability that
a correct item is among the first K.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from configs import OnceoverError

RECALL_AT = (1, 5, 10)
TIE = 1e-12  # of the scores' scale: float64 scores that differ by less are equal, rounding stays below 1e-13
BLOCK_BYTES = 256 * 2**20
_Z95 = (2.5, 97.5)


class MetricsError(OnceoverError):
    """Embeddings that no honest number can be computed from."""


@dataclass(frozen=True)
class Ranks:
    """Where the truth stands, query by query.

    Attributes:
        greater: int64 (Q,), wrong items that score above the best correct one.
        tied: int64 (Q,), wrong items that score the same.
        correct: int64 (Q,), correct items that share the best correct score; 0: the query has no correct item.
        gallery: how many items are ranked.
        group: int64 (Q,), the picture a query belongs to, the unit of resampling.
    """

    greater: np.ndarray
    tied: np.ndarray
    correct: np.ndarray
    gallery: int
    group: np.ndarray

    def hit_at(self, k: int) -> np.ndarray:
        """Probability, float64 (Q,), that a correct item is among the first ``k`` when ties are broken at random."""
        places = np.clip(k - self.greater, 0, self.tied + self.correct)  # of the tied block, within the first k
        missed = np.ones(len(self.greater))
        for place in range(int(places.max(initial=0))):
            open_ = place < places
            missed[open_] *= np.clip(self.tied[open_] - place, 0, None) / (self.tied + self.correct - place)[open_]
        return 1 - missed

    def expected_rank(self) -> np.ndarray:
        """Expected place, float64 (Q,), of the first correct item, counted from 1."""
        return self.greater + 1 + self.tied / (self.correct + 1)

    def expected_reciprocal_rank(self) -> np.ndarray:
        """Expected 1/rank, float64 (Q,), of the first correct item."""
        result = 1 / (self.greater + 1.0)
        for row in np.flatnonzero(self.tied):
            block, correct = self.tied[row] + self.correct[row], self.correct[row]
            places = np.arange(self.tied[row] + 1)
            # P(first correct item at a place) = P(none before) * P(here | none before)
            none_before = np.cumprod(np.r_[1.0, (self.tied[row] - places[:-1]) / (block - places[:-1])])
            result[row] = np.sum(none_before * correct / (block - places) / (self.greater[row] + 1 + places))
        return result


def rank(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> tuple[Ranks, Ranks]:
    """Ranks of image-to-text and text-to-image search.

    Similarities are inner products in float64, block by block; a query without a correct item is left out.

    Args:
        images: (N, D). texts: (M, D). Any float type.
        image_index: int (M,), the picture of each caption; any number of captions a picture.

    Raises:
        MetricsError: shapes that do not fit, non-finite numbers, an index outside the pictures.
    """
    image_index = np.asarray(image_index)
    if (
        images.ndim != 2
        or texts.ndim != 2
        or images.shape[1:] != texts.shape[1:]
        or image_index.shape != texts.shape[:1]
    ):
        raise MetricsError(f"shapes do not fit: images {images.shape}, texts {texts.shape}, map {image_index.shape}")
    if not len(images) or not len(texts):
        raise MetricsError(f"nothing to rank: {len(images)} pictures, {len(texts)} captions")
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    for name, rows in (("image", images), ("text", texts)):
        bad = int((~np.isfinite(rows).all(1)).sum())
        if bad:
            raise MetricsError(
                f"{bad} {name} embeddings are not finite; the heads have diverged or the file is damaged"
            )
    if image_index.min() < 0 or image_index.max() >= len(images):
        raise MetricsError("the caption map points outside the pictures")
    own = np.einsum("md,md->m", images[image_index], texts)
    rows = max(1, BLOCK_BYTES // (8 * len(texts)))
    blocks = (images[start : start + rows] @ texts.T for start in range(0, len(images), rows))
    scale = np.linalg.norm(images, axis=1).max() * np.linalg.norm(texts, axis=1).max()
    return _count(blocks, own, image_index, len(images), TIE * scale)


def rank_scores(scores: np.ndarray, image_index: np.ndarray) -> tuple[Ranks, Ranks]:
    """Ranks of both directions from a full score matrix, (N, M), for scores that are no inner products of embeddings.

    Raises:
        MetricsError: scores that are not finite.
    """
    scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        raise MetricsError("the scores are not all finite")
    own = scores[image_index, np.arange(len(image_index))]
    return _count([scores], own, np.asarray(image_index), len(scores), TIE * np.abs(scores).max())


def _count(
    blocks: Iterable[np.ndarray], own: np.ndarray, image_index: np.ndarray, n_images: int, tie: float
) -> tuple[Ranks, Ranks]:
    """Ranks from score blocks (rows, M) that cover the pictures in order; ``own`` (M,): captions with their picture."""
    n_texts = len(image_index)
    best = np.full(n_images, -np.inf)
    np.maximum.at(best, image_index, own)
    text_greater, text_tied = np.zeros(n_texts, np.int64), np.zeros(n_texts, np.int64)
    image_greater, image_tied = np.zeros(n_images, np.int64), np.zeros(n_images, np.int64)
    start = 0
    for block in blocks:
        rows = slice(start, start + len(block))
        above, least = (block > own + tie).sum(0), (block >= own - tie).sum(0)
        text_greater += above
        text_tied += least - above
        image_greater[rows] = (block > best[rows, None] + tie).sum(1)
        image_tied[rows] = (block >= best[rows, None] - tie).sum(1) - image_greater[rows]
        start += len(block)
    correct = np.bincount(image_index[own >= best[image_index] - tie], minlength=n_images)
    asked = np.unique(image_index)
    to_text = Ranks(image_greater[asked], (image_tied - correct)[asked], correct[asked], n_texts, asked)
    return to_text, Ranks(text_greater, text_tied - 1, np.ones(n_texts, np.int64), n_images, image_index)


def chance(n_images: int, image_index: np.ndarray) -> tuple[Ranks, Ranks]:
    """Ranks of a model that scores everything alike: exact chance for this gallery."""
    counts = np.bincount(image_index, minlength=n_images)
    asked = np.flatnonzero(counts)
    zeros = np.zeros(len(asked), np.int64)
    to_text = Ranks(zeros, len(image_index) - counts[asked], counts[asked], len(image_index), asked)
    ones = np.ones(len(image_index), np.int64)
    return to_text, Ranks(np.zeros_like(ones), ones * (n_images - 1), ones, n_images, np.asarray(image_index))


def summarise(ranks: list[Ranks], draws: int = 1000, seed: int = 0) -> dict[str, float | list[float]]:
    """R@1, R@5, R@10 in percent with 95 % intervals, median and mean rank, MRR; the mean over several rankings.

    Each ranking is of the same queries (a baseline's several random maps); with more than one, ``R@K_sd`` is the
    spread between them. Intervals resample pictures with their queries (percentile bootstrap, Efron 1979); the
    gallery stays. ``draws=0`` leaves them out.
    """
    result: dict[str, float | list[float]] = {}
    weights, group = _resamples(ranks[0].group, draws, seed) if draws else (None, None)
    for k in RECALL_AT:
        hits = np.stack([100 * one.hit_at(k) for one in ranks])
        result[f"R@{k}"] = float(hits.mean())
        if len(ranks) > 1:
            result[f"R@{k}_sd"] = float(hits.mean(1).std(ddof=1))
        if weights is not None:
            sums = np.bincount(group, hits.mean(0)), np.bincount(group)
            estimates = (weights @ sums[0]) / (weights @ sums[1])
            result[f"R@{k}_ci"] = [float(bound) for bound in np.percentile(estimates, _Z95)]
    places = [one.expected_rank() for one in ranks]
    result["median_rank"] = float(np.mean([np.median(place) for place in places]))
    result["mean_rank"] = float(np.mean(places))
    result["mrr"] = float(np.mean([one.expected_reciprocal_rank().mean() for one in ranks]))
    return result


def _resamples(group: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each picture is drawn, float64 (draws, pictures), and each query's picture, counted from 0."""
    _, group = np.unique(group, return_inverse=True)
    pictures = int(group.max()) + 1
    generator = np.random.default_rng(seed)
    return generator.multinomial(pictures, np.full(pictures, 1 / pictures), size=draws).astype(np.float64), group


def report(pairs: list[tuple[Ranks, Ranks]], draws: int = 1000, seed: int = 0) -> dict:
    """Both directions' summaries and rsum, the sum of their six recalls."""
    both = {
        "image_to_text": summarise([pair[0] for pair in pairs], draws, seed),
        "text_to_image": summarise([pair[1] for pair in pairs], draws, seed),
    }
    return both | {"rsum": sum(float(side[f"R@{k}"]) for side in both.values() for k in RECALL_AT)}


def quality(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> dict:
    """``report`` without intervals, for choosing a model while it trains."""
    return report([rank(images, texts, image_index)], draws=0)
