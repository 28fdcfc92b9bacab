"""Ranks of correct items in image-to-text and text-to-image search, in numpy alone.

Ranks are exact: every score is computed, none approximated. Ties are broken at random in expectation, so a collapsed
model scores chance and the order of rows never matters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypedDict

import numpy as np

from onceover.base.errors import OnceoverError

TIE = 1e-12  # of the scores' scale: float64 scores that differ by less are equal, rounding stays below 1e-13
MEMORY = 256 * 2**20  # bytes that a block of scores may take
_TO_TEXT = 0  # the direction from image to text, as a row of arrays with a row for each direction
_TO_IMAGE = 1
_BLOCK_ROWS = 256  # more images a block would only leave the processor's caches
_BLOCK_BYTES = 24  # a score, with what is counted beside it
_CROWDED = 1 / 64  # share of a block in doubt, beyond which the whole block is multiplied again in float64
_NUMBERS = 2**22  # of the rows that are taken up at a time where scores are float64
_ROUNDING = 1e-9  # of a mean of probabilities, at most
_TINY = 1e-9  # embeddings whose largest number is outside these bounds are scaled
_HUGE = 1e9


class MetricsError(OnceoverError):
    """Embeddings that no honest number can be computed from."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of the correct items of Q queries, as P pairs of a query and one of its correct items.

    Attributes:
        query: int64 (P,), the query of each pair, 0 to Q - 1; every query has at least one.
        above: int64 (P,), items of the gallery that score higher than the pair's.
        level: int64 (P,), items that score the same, the pair's own included.
        gallery: how many items are ranked.
        group: int64 (Q,), the image that a query belongs to, the unit of resampling.
    """

    query: np.ndarray
    above: np.ndarray
    level: np.ndarray
    gallery: int
    group: np.ndarray

    @cached_property
    def greater(self) -> np.ndarray:
        """int64 (Q,), wrong items that score higher than the best correct one."""
        best = np.full(len(self.group), self.gallery, np.int64)
        np.minimum.at(best, self.query, self.above)
        return best

    @cached_property
    def correct(self) -> np.ndarray:
        """int64 (Q,), correct items that share the best correct score."""
        return np.bincount(self.query[self._is_best], minlength=len(self.group))

    @cached_property
    def tied(self) -> np.ndarray:
        """int64 (Q,), wrong items that share the best correct score."""
        level = np.zeros(len(self.group), np.int64)
        level[self.query[self._is_best]] = self.level[self._is_best]
        return np.maximum(level - self.correct, 0)

    @property
    def _is_best(self) -> np.ndarray:
        """bool (P,), pairs whose item is the best correct one of its query, or level with it."""
        return self.above == self.greater[self.query]

    def hit_at(self, k: int) -> np.ndarray:
        """Probability, float64 (Q,), that a correct item is among the first ``k`` when ties are broken at random."""
        block = self.tied + self.correct
        drawn = np.clip(k - self.greater, 0, block)  # items of the tied block within the first k
        # C(block - correct, drawn) / C(block, drawn) = C(block - drawn, correct) / C(block, correct)
        fewer = np.minimum(drawn, self.correct)
        more = np.maximum(drawn, self.correct)
        missed = np.ones(len(self.greater))
        for number in range(int(fewer.max(initial=0))):
            is_open = number < fewer
            wrong = np.clip((block - more)[is_open] - number, 0, None)
            missed[is_open] *= wrong / (block[is_open] - number)
        return 1 - missed

    def true_recall_at(self, k: int) -> np.ndarray:
        """Expected share, float64 (Q,), of a query's correct items that are among the first ``k``."""
        within = np.clip((k - self.above) / self.level, 0, 1)
        return np.bincount(self.query, within) / np.bincount(self.query)

    def expected_rank(self) -> np.ndarray:
        """Expected rank, float64 (Q,), of the first correct item, counted from 1."""
        return self.greater + 1 + self.tied / (self.correct + 1)

    def median_rank(self) -> float:
        """The median of the first correct items' ranks over all queries and all ways to break ties."""
        if not self.tied.any():
            return float(np.median(self.greater + 1))
        lower = self._first_rank(0.5 - _ROUNDING)
        upper = self._first_rank(0.5 + _ROUNDING)
        return (lower + upper) / 2

    def _first_rank(self, share: float) -> int:
        """The least rank within which more than a share of the queries have a correct item."""
        below = 0
        reached = self.gallery
        while reached - below > 1:
            middle = (below + reached) // 2
            if self.hit_at(middle).mean() > share:
                reached = middle
            else:
                below = middle
        return reached

    def expected_reciprocal_rank(self) -> np.ndarray:
        """Expected 1/rank, float64 (Q,), of the first correct item."""
        result = 1 / (self.greater + 1)
        contested = np.flatnonzero(self.tied)
        counts = np.stack([self.greater, self.tied, self.correct])[:, contested]
        cases, case_of = np.unique(counts, axis=1, return_inverse=True)
        values = np.empty(cases.shape[1])
        for number, (greater, tied, correct) in enumerate(cases.T):
            values[number] = _mean_reciprocal(greater, tied, correct)
        result[contested] = values[case_of]
        return result


def _mean_reciprocal(greater: int, tied: int, correct: int) -> float:
    """Expected 1/rank of the first correct item, where ``correct`` and ``tied`` wrong items share its score."""
    before = np.arange(tied + 1)  # wrong items of the tied block that come first
    # P(first correct item after so many) = P(none earlier) * P(here | none earlier)
    none_earlier = np.cumprod(np.r_[1.0, (tied - before[:-1]) / (tied + correct - before[:-1])])
    return np.sum(none_earlier * correct / (tied + correct - before) / (greater + 1 + before))


class Biases(TypedDict, total=False):
    """Biases that are added to the scores of images, float (N,), and of captions, (M,); either may be missing."""

    image_bias: np.ndarray
    text_bias: np.ndarray


def rank(
    images: np.ndarray,
    texts: np.ndarray,
    image_index: np.ndarray,
    *,
    image_bias: np.ndarray | None = None,
    text_bias: np.ndarray | None = None,
    memory: int = MEMORY,
) -> tuple[Ranks, Ranks]:
    """Ranks image-to-text and text-to-image search by inner product; a query without a correct item is left out.

    Scores are multiplied in float32, block by block; scores so near to a correct item's that float32 cannot order the
    two (the bound of Higham 2002, section 3.1) are computed again in float64, so that the ranks are those of float64.

    Args:
        images: (N, D). texts: (M, D). Any float type, any scale.
        image_index: int (M,), the image of each caption; any number of captions per image, none included.
        image_bias, text_bias: float (N,), (M,), added to an item's scores where it is searched for.
        memory: bytes that a block of scores may take. Beside it stand float32 copies of the embeddings, unless they
            are float32 already, and a few numbers per row.

    Returns:
        The ranks of image-to-text search, and those of text-to-image search.

    Raises:
        MetricsError: shapes that do not fit, non-finite numbers, an index outside the images.
    """
    image_index = np.asarray(image_index)
    _check(images, texts, image_index)
    scores = _Scores(images, texts, image_index, image_bias, text_bias)
    above = np.zeros((2, len(texts)), np.int64)  # a row for each direction
    level = np.zeros((2, len(texts)), np.int64)
    rows = max(1, min(_BLOCK_ROWS, memory // (_BLOCK_BYTES * len(texts))))
    for start in range(0, len(images), rows):
        _count_block(scores, slice(start, min(start + rows, len(images))), above, level)
    return ranks_from_counts(above, level, image_index, len(images))


def rank_scores(scores: np.ndarray, image_index: np.ndarray) -> tuple[Ranks, Ranks]:
    """Ranks both directions by a full score matrix, (N, M), for scores that are no inner products of embeddings.

    Raises:
        MetricsError: scores that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise MetricsError("the scores are not all finite")
    return rank(np.eye(len(scores)), scores.T, image_index)


def chance(n_images: int, image_index: np.ndarray) -> tuple[Ranks, Ranks]:
    """Ranks of a model that scores everything alike: exact chance for this gallery."""
    n_captions = len(image_index)
    above = np.zeros((2, n_captions), np.int64)
    level = np.zeros((2, n_captions), np.int64)
    level[_TO_TEXT] = n_captions
    level[_TO_IMAGE] = n_images
    return ranks_from_counts(above, level, np.asarray(image_index), n_images)


def _check(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> None:
    """Refuses embeddings that cannot be ranked."""
    is_matrix = images.ndim == 2 and texts.ndim == 2
    if not is_matrix or images.shape[1:] != texts.shape[1:] or image_index.shape != texts.shape[:1]:
        raise MetricsError(f"shapes do not fit: images {images.shape}, texts {texts.shape}, map {image_index.shape}")
    if not len(images) or not len(texts):
        raise MetricsError(f"nothing to rank: {len(images)} images, {len(texts)} captions")
    for name, rows in (("image", images), ("text", texts)):
        bad = int((~np.isfinite(rows).all(1)).sum())
        if bad:
            raise MetricsError(
                f"{bad} {name} embeddings are not finite; the heads have diverged or the file is damaged"
            )
    if image_index.min() < 0 or image_index.max() >= len(images):
        raise MetricsError("the caption map points outside the images")


class _Scores:
    """Scores block by block in float32 or float64, or pair by pair in float64, without and with the biases.

    Attributes:
        captions: int64 (M,), the captions sorted by their image; those of image n are ``counts[n]`` from ``first[n]``.
        own: float64 (2, M), each caption's score with its image; a row for each direction.
        tie: two scores that differ by no more are equal.
        doubt: two float32 scores that differ by no more may be in the wrong order.
    """

    def __init__(
        self,
        images: np.ndarray,
        texts: np.ndarray,
        image_index: np.ndarray,
        image_bias: np.ndarray | None,
        text_bias: np.ndarray | None,
    ):
        self._images, image_scale = _scaled(images)
        self._texts, text_scale = _scaled(texts)
        self._images32 = self._images.astype(np.float32, copy=False)
        self._texts32 = self._texts.astype(np.float32, copy=False)
        scale = image_scale * text_scale
        # of the items that are searched for, by direction
        self._biases = (_scaled_bias(text_bias, len(texts), scale), _scaled_bias(image_bias, len(images), scale))
        self.image_index = image_index
        self.captions = np.argsort(image_index, kind="stable")
        self.counts = np.bincount(image_index, minlength=len(images))
        self.first = self.counts.cumsum() - self.counts
        largest = _longest(self._images32) * _longest(self._texts32)
        largest += max(np.abs(bias).max() for bias in self._biases)
        self.tie = TIE * largest
        self.doubt = (images.shape[1] + 8) * 2.0**-24 * largest
        captions = np.arange(len(texts))
        self.own = np.stack([self.exact(image_index, captions, direction) for direction in (_TO_TEXT, _TO_IMAGE)])

    def exact(self, images: np.ndarray, captions: np.ndarray, direction: int) -> np.ndarray:
        """Float64 scores of P pairs of an image and a caption, (P,)."""
        result = np.empty(len(images))
        for part in self._parts(len(result)):
            left = self._images[images[part]]
            right = self._texts[captions[part]]
            result[part] = np.einsum("pd,pd->p", left, right, dtype=np.float64)
        items = captions if direction == _TO_TEXT else images
        return result + self._biases[direction][items]

    def block(self, rows: slice, dtype: type) -> np.ndarray:
        """Scores without bias of some images with all captions, (rows, M)."""
        if dtype == np.float32:
            return self._images32[rows] @ self._texts32.T
        images = self._images[rows].astype(np.float64)
        result = np.empty((rows.stop - rows.start, len(self._texts)))
        for part in self._parts(len(self._texts)):
            np.matmul(images, self._texts[part].astype(np.float64).T, out=result[:, part])
        return result

    def _parts(self, rows: int) -> Iterator[slice]:
        step = max(1, _NUMBERS // self._images.shape[1])
        return (slice(start, start + step) for start in range(0, rows, step))

    def biased(self, block: np.ndarray, rows: slice, direction: int) -> np.ndarray:
        """A block's scores in one direction: a row for each query, images or captions."""
        bias = self._biases[direction].astype(block.dtype, copy=False)
        if direction == _TO_IMAGE:
            if bias.any():
                block = block + bias[rows, None]
            return block.T
        if bias.any():
            block = block + bias
        return block


def _scaled(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Rows, divided by their largest number where float32 could not hold their products; and the divisor."""
    size = float(max(rows.max(), -rows.min()))
    if size == 0 or _TINY < size < _HUGE:
        return rows, 1.0
    return rows.astype(np.float64) / size, size


def _scaled_bias(bias: np.ndarray | None, items: int, scale: float) -> np.ndarray:
    """A bias for each item, float64 (items,), divided like the scores."""
    if bias is None:
        return np.zeros(items)
    bias = np.asarray(bias, np.float64) / scale
    if bias.shape != (items,) or not np.isfinite(bias).all():
        raise MetricsError("the biases are not one finite number for each item")
    return bias


def _longest(rows: np.ndarray) -> float:
    """The length of the longest row."""
    return float(np.linalg.norm(rows, axis=1).max())


class _PairCounts(NamedTuple):
    """Items above and level with the correct pairs of some captions in one direction, each (pairs,)."""

    direction: int
    captions: np.ndarray
    above: np.ndarray
    level: np.ndarray


class _ScoreTable(NamedTuple):
    """Scores with a row for each correct pair, given by its caption, and a column for each item of a block."""

    direction: int
    captions: np.ndarray
    scores: np.ndarray


class _Comparison(NamedTuple):
    """Scores of a table against each row's own score.

    Attributes:
        higher: int64 (pairs,), scores above the own one by more than a margin. near: within it.
        is_higher, is_not_lower: bool (pairs, items), the scores that are higher, and those that are higher or near.
    """

    higher: np.ndarray
    near: np.ndarray
    is_higher: np.ndarray
    is_not_lower: np.ndarray


def _count_block(scores: _Scores, rows: slice, above: np.ndarray, level: np.ndarray) -> None:
    """Counts, for a block of images, the items above and level with each correct pair, and adds them up."""
    counts = _count_float32(scores, rows)
    if counts is None:  # many scores are nearly equal, as in a collapsed model
        counts = _count_float64(scores, rows)
    for pairs in counts:
        above[pairs.direction, pairs.captions] += pairs.above
        level[pairs.direction, pairs.captions] += pairs.level


def _count_float64(scores: _Scores, rows: slice) -> list[_PairCounts]:
    counts = []
    for table in _tables(scores, scores.block(rows, np.float64), rows):
        compared = _compare(table.scores, scores.own[table.direction, table.captions], scores.tie)
        counts.append(_PairCounts(table.direction, table.captions, compared.higher, compared.near))
    return counts


def _count_float32(scores: _Scores, rows: slice) -> list[_PairCounts] | None:
    """Counts in float32, and scores in doubt once more in float64; None where too many are in doubt."""
    counts = []
    for direction, captions, table in _tables(scores, scores.block(rows, np.float32), rows):
        own = scores.own[direction, captions]
        compared = _compare(table, own, scores.doubt)
        higher = compared.higher
        images = scores.image_index[captions]
        level = ((images >= rows.start) & (images < rows.stop)).astype(np.int64)  # the pair itself
        doubtful = np.flatnonzero(compared.near > level)
        if compared.near[doubtful].sum() > _CROWDED * table.size:
            return None
        is_near = compared.is_not_lower[doubtful] ^ compared.is_higher[doubtful]
        query, item = np.nonzero(is_near)
        query = doubtful[query]
        if direction == _TO_IMAGE:
            exact = scores.exact(rows.start + item, captions[query], direction)
        else:
            exact = scores.exact(images[query], item, direction)
        gap = exact - own[query]
        higher += np.bincount(query[gap > scores.tie], minlength=len(own))
        level[doubtful] = np.bincount(query[np.abs(gap) <= scores.tie], minlength=len(own))[doubtful]
        counts.append(_PairCounts(direction, captions, higher, level))
    return counts


def _tables(scores: _Scores, block: np.ndarray, rows: slice) -> Iterator[_ScoreTable]:
    """Tables of all correct pairs with the items of a block of images.

    To images, each caption is a query, and the block's images are items. To texts, each of the block's images is a
    query, and all captions are items: a table for the first captions of the images, one for the second captions, …
    """
    yield _ScoreTable(_TO_IMAGE, np.arange(block.shape[1]), scores.biased(block, rows, _TO_IMAGE))
    table = scores.biased(block, rows, _TO_TEXT)
    counts = scores.counts[rows]
    for number in range(counts.max(initial=0)):
        having = np.flatnonzero(counts > number)
        captions = scores.captions[scores.first[rows][having] + number]
        is_all = len(having) == len(table)
        yield _ScoreTable(_TO_TEXT, captions, table if is_all else table[having])


def _compare(table: np.ndarray, own: np.ndarray, margin: float) -> _Comparison:
    """Compares the scores in each row of ``table`` with the row's own score."""
    low = (own - margin).astype(table.dtype)[:, None]
    high = (own + margin).astype(table.dtype)[:, None]
    is_higher = table > high
    is_not_lower = table >= low
    higher = _count_true(is_higher)
    return _Comparison(higher, _count_true(is_not_lower) - higher, is_higher, is_not_lower)


def _count_true(mask: np.ndarray) -> np.ndarray:
    """The number of true values in each row, int64 (rows,)."""
    return np.add.reduce(mask.view(np.uint8), axis=1, dtype=np.int32).astype(np.int64)


def ranks_from_counts(
    above: np.ndarray, level: np.ndarray, image_index: np.ndarray, n_images: int
) -> tuple[Ranks, Ranks]:
    """Ranks of both directions from counts for each caption with its image, int64 (2, M), image-to-text first."""
    images, query = np.unique(image_index, return_inverse=True)
    captions = np.arange(len(image_index))
    to_text = Ranks(query, above[_TO_TEXT], level[_TO_TEXT], len(image_index), images)
    to_image = Ranks(captions, above[_TO_IMAGE], level[_TO_IMAGE], n_images, image_index)
    return to_text, to_image


def counts_of(pair: tuple[Ranks, Ranks]) -> np.ndarray:
    """The counts that ranks were made of (``ranks_from_counts``), int64 (2, 2, M): above and level, each both ways."""
    return np.array([[ranks.above for ranks in pair], [ranks.level for ranks in pair]])
