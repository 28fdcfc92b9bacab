"""Retrieval metrics over two sets of embeddings, in numpy alone.

Ranks are exact: every score is computed, none approximated. Ties are broken at random in expectation, so a collapsed
model scores chance and the order of rows never matters. R@K, as this field writes it, is hit@K: the probability that
a correct item is among the first K; ``true_recall@K`` is the share of a query's correct items among them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onceover.base.errors import OnceoverError

RECALL_AT = (1, 5, 10)
TIE = 1e-12  # of the scores' scale: float64 scores that differ by less are equal, rounding stays below 1e-13
MEMORY = 256 * 2**20  # bytes that a block of scores may take
DRAWS = 1000  # bootstrap resamples
_BLOCK_ROWS = 256  # more images a block would only leave the processor's caches
_BLOCK_BYTES = 24  # a score, with what is counted beside it
_CROWDED = 1 / 64  # share of a block in doubt, beyond which the whole block is multiplied again in float64
_NUMBERS = 2**22  # of the rows that are taken up at a time where scores are float64
_RESAMPLES = 100  # drawn at a time
_INTERVAL = (2.5, 97.5)
DIRECTIONS = ("image_to_text", "text_to_image")


class MetricsError(OnceoverError):
    """Embeddings that no honest number can be computed from."""


@dataclass(frozen=True)
class Ranks:
    """Where the correct items of Q queries stand, as P pairs of a query and one of its correct items.

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
        return np.bincount(self.query[self._best], minlength=len(self.group))

    @cached_property
    def tied(self) -> np.ndarray:
        """int64 (Q,), wrong items that share the best correct score."""
        level = np.zeros(len(self.group), np.int64)
        level[self.query[self._best]] = self.level[self._best]
        return np.maximum(level - self.correct, 0)

    @property
    def _best(self) -> np.ndarray:
        return self.above == self.greater[self.query]

    def hit_at(self, k: int) -> np.ndarray:
        """Probability, float64 (Q,), that a correct item is among the first ``k`` when ties are broken at random."""
        places = np.clip(k - self.greater, 0, self.tied + self.correct)  # of the tied block, within the first k
        missed = np.ones(len(self.greater))
        for place in range(int(places.max(initial=0))):
            open_ = place < places
            missed[open_] *= np.clip(self.tied[open_] - place, 0, None) / (self.tied + self.correct - place)[open_]
        return 1 - missed

    def true_recall_at(self, k: int) -> np.ndarray:
        """Expected share, float64 (Q,), of a query's correct items that are among the first ``k``."""
        within = np.clip((k - self.above) / self.level, 0, 1)
        return np.bincount(self.query, within) / np.bincount(self.query)

    def expected_rank(self) -> np.ndarray:
        """Expected place, float64 (Q,), of the first correct item, counted from 1."""
        return self.greater + 1 + self.tied / (self.correct + 1)

    def expected_reciprocal_rank(self) -> np.ndarray:
        """Expected 1/rank, float64 (Q,), of the first correct item."""
        result = 1 / (self.greater + 1)
        contested = np.flatnonzero(self.tied)
        counts = np.stack([self.greater, self.tied, self.correct])[:, contested]
        cases, which = np.unique(counts, axis=1, return_inverse=True)
        values = np.empty(cases.shape[1])
        for number, (greater, tied, correct) in enumerate(cases.T):
            places = np.arange(tied + 1)
            # P(first correct item at a place) = P(none before) * P(here | none before)
            none_before = np.cumprod(np.r_[1.0, (tied - places[:-1]) / (tied + correct - places[:-1])])
            values[number] = np.sum(none_before * correct / (tied + correct - places) / (greater + 1 + places))
        result[contested] = values[which]
        return result


def rank(
    images: np.ndarray,
    texts: np.ndarray,
    image_index: np.ndarray,
    *,
    image_bias: np.ndarray | None = None,
    text_bias: np.ndarray | None = None,
    memory: int = MEMORY,
) -> tuple[Ranks, Ranks]:
    """Ranks of image-to-text and text-to-image search by inner product; a query without a correct item is left out.

    Scores are multiplied in float32, block by block; whatever lies so near to a correct item's score that float32
    cannot order the two (the bound of Higham 2002, section 3.1) is computed again in float64, so that the ranks are
    those of float64.

    Args:
        images: (N, D). texts: (M, D). Any float type, any scale.
        image_index: int (M,), the image of each caption; any number of captions an image, none included.
        image_bias, text_bias: float (N,), (M,), added to an item's scores where it is what is searched for.
        memory: bytes that a block of scores may take. Beside it stand float32 copies of the embeddings, unless they
            are float32 already, and a few numbers a row.

    Raises:
        MetricsError: shapes that do not fit, non-finite numbers, an index outside the images.
    """
    image_index = np.asarray(image_index)
    _check(images, texts, image_index)
    scores = _Scores(images, texts, image_index, image_bias, text_bias)
    above, level = np.zeros((2, 2, len(texts)), np.int64)  # a row for each direction, image to text first
    rows = max(1, min(_BLOCK_ROWS, memory // (_BLOCK_BYTES * len(texts))))
    for start in range(0, len(images), rows):
        _count_block(scores, slice(start, min(start + rows, len(images))), above, level)
    return _ranks(above, level, image_index, len(images))


def rank_scores(scores: np.ndarray, image_index: np.ndarray) -> tuple[Ranks, Ranks]:
    """Ranks of both directions from a full score matrix, (N, M), for scores that are no inner products of embeddings.

    Raises:
        MetricsError: scores that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise MetricsError("the scores are not all finite")
    return rank(np.eye(len(scores)), scores.T, image_index)


def chance(n_images: int, image_index: np.ndarray) -> tuple[Ranks, Ranks]:
    """Ranks of a model that scores everything alike: exact chance for this gallery."""
    above, level = np.zeros((2, 2, len(image_index)), np.int64)
    level += np.array([[len(image_index)], [n_images]])
    return _ranks(above, level, np.asarray(image_index), n_images)


def _check(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> None:
    if (
        images.ndim != 2
        or texts.ndim != 2
        or images.shape[1:] != texts.shape[1:]
        or image_index.shape != texts.shape[:1]
    ):
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
        own: float64 (2, M), each caption's score with its image; a row for each direction, image to text first.
        tie: two scores that differ by no more are equal.
        doubt: two float32 scores that differ by no more may stand in the wrong order.
    """

    def __init__(self, images, texts, image_index, image_bias, text_bias):
        (self._images, image_size), (self._texts, text_size) = _tame(images), _tame(texts)
        self._images32, self._texts32 = (rows.astype(np.float32, copy=False) for rows in (self._images, self._texts))
        self.image_index = image_index
        counts = np.bincount(image_index, minlength=len(images))
        self.captions, self.counts, self.first = (
            np.argsort(image_index, kind="stable"),
            counts,
            counts.cumsum() - counts,
        )
        self._bias = []
        for bias, rows in ((text_bias, texts), (image_bias, images)):
            bias = np.zeros(len(rows)) if bias is None else np.asarray(bias, np.float64) / (image_size * text_size)
            if bias.shape != rows.shape[:1] or not np.isfinite(bias).all():
                raise MetricsError("the biases are not one finite number for each item")
            self._bias.append(bias)
        longest = (float(np.linalg.norm(rows, axis=1).max()) for rows in (self._images32, self._texts32))
        largest = np.prod(list(longest)) + max(np.abs(bias).max() for bias in self._bias)
        self.tie, self.doubt = TIE * largest, (images.shape[1] + 8) * 2.0**-24 * largest
        captions = np.arange(len(texts))
        self.own = np.stack([self.exact(image_index, captions, direction) for direction in (0, 1)])

    def exact(self, pictures: np.ndarray, captions: np.ndarray, direction: int) -> np.ndarray:
        """Float64 scores of P pairs of an image and a caption, (P,)."""
        result = np.empty(len(pictures))
        for part in self._parts(len(result)):
            left, right = self._images[pictures[part]], self._texts[captions[part]]
            result[part] = np.einsum("pd,pd->p", left, right, dtype=np.float64)
        return result + self._bias[direction][pictures if direction else captions]

    def block(self, rows: slice, dtype: type) -> np.ndarray:
        """Scores without bias of some images with all captions, (rows, M)."""
        if dtype == np.float32:
            return self._images32[rows] @ self._texts32.T
        images, result = self._images[rows].astype(np.float64), np.empty((rows.stop - rows.start, len(self._texts)))
        for part in self._parts(len(self._texts)):
            np.matmul(images, self._texts[part].astype(np.float64).T, out=result[:, part])
        return result

    def _parts(self, rows: int) -> Iterator[slice]:
        step = max(1, _NUMBERS // self._images.shape[1])
        return (slice(start, start + step) for start in range(0, rows, step))

    def biased(self, block: np.ndarray, rows: slice, direction: int) -> np.ndarray:
        """A block's scores in one direction: a row for each query, images or (direction 1) captions."""
        bias = self._bias[direction].astype(block.dtype, copy=False)
        if direction:
            return (block + bias[rows, None] if bias.any() else block).T
        return block + bias if bias.any() else block


def _tame(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """``rows``, divided by their largest number where float32 could not hold their products; and the divisor."""
    size = float(max(rows.max(), -rows.min()))
    return (rows, 1.0) if size == 0 or 1e-9 < size < 1e9 else (rows.astype(np.float64) / size, size)


def _count_block(scores: _Scores, rows: slice, above: np.ndarray, level: np.ndarray) -> None:
    """Adds what a block of images holds to the counts of items above and level with each correct pair."""
    counted = _counted(scores, scores.block(rows, np.float32), rows)
    if counted is None:  # many scores are nearly equal, as in a collapsed model
        counted = _counted(scores, scores.block(rows, np.float64), rows)
    for direction, captions, higher, same in counted:
        above[direction, captions] += higher
        level[direction, captions] += same


def _counted(scores: _Scores, block: np.ndarray, rows: slice) -> list | None:
    """(direction, captions, items above, items level) of a block; None where float32 leaves too much in doubt."""
    counted = []
    for direction, captions, table in _tables(scores, block, rows):
        own = scores.own[direction, captions]
        if block.dtype == np.float64:
            higher, same, _ = _compare(table, own, scores.tie)
            counted.append((direction, captions, higher, same))
            continue
        higher, near, (above, within) = _compare(table, own, scores.doubt)
        pictures = scores.image_index[captions]
        same = ((pictures >= rows.start) & (pictures < rows.stop)).astype(np.int64)  # the pair itself
        doubtful = np.flatnonzero(near > same)
        if near[doubtful].sum() > _CROWDED * table.size:
            return None
        query, item = np.nonzero(within[doubtful] ^ above[doubtful])
        query = doubtful[query]
        pair = (rows.start + item, captions[query]) if direction else (pictures[query], item)
        gap = scores.exact(*pair, direction) - own[query]
        higher += np.bincount(query[gap > scores.tie], minlength=len(own))
        same[doubtful] = np.bincount(query[np.abs(gap) <= scores.tie], minlength=len(own))[doubtful]
        counted.append((direction, captions, higher, same))
    return counted


def _tables(scores: _Scores, block: np.ndarray, rows: slice) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(direction, captions, scores): a row for each correct pair, given by its caption, and a column for each item."""
    yield 1, np.arange(block.shape[1]), scores.biased(block, rows, 1)
    table, counts = scores.biased(block, rows, 0), scores.counts[rows]
    for number in range(counts.max(initial=0)):
        having = np.flatnonzero(counts > number)
        captions = scores.captions[scores.first[rows][having] + number]
        yield 0, captions, table if len(having) == len(table) else table[having]


def _compare(table: np.ndarray, own: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Numbers in each row of ``table`` above ``own`` by more than ``margin``, and within it; which ones, (> and >=)."""
    low, high = ((own + side).astype(table.dtype)[:, None] for side in (-margin, margin))
    masks = table > high, table >= low
    higher, rest = (np.add.reduce(mask.view(np.uint8), axis=1, dtype=np.int32).astype(np.int64) for mask in masks)
    return higher, rest - higher, masks


def _ranks(above: np.ndarray, level: np.ndarray, image_index: np.ndarray, n_images: int) -> tuple[Ranks, Ranks]:
    asked, query = np.unique(image_index, return_inverse=True)
    captions = np.arange(len(image_index))
    return (
        Ranks(query, above[0], level[0], len(image_index), asked),
        Ranks(captions, above[1], level[1], n_images, image_index),
    )


def report(pairs: list[tuple[Ranks, Ranks]], draws: int = DRAWS, seed: int = 0) -> dict:
    """Both directions' R@1, R@5, R@10 and true recalls in percent, median and mean rank, MRR; rsum, the sum of all R@K.

    Each pair is of the same queries (a baseline's several random maps): their numbers are averaged, and with more than
    one, ``R@K_sd`` and ``rsum_sd`` are the spread between them. ``…_ci`` are 95 % intervals: images are resampled
    with their queries, the same ones in both directions, while the gallery stays (percentile bootstrap, Efron 1979).
    ``draws=0`` leaves them out.
    """
    directions = list(zip(*pairs, strict=True))
    values = [_mean_values(several) for several in directions]
    result = _summary(values, [several[0].group for several in directions], draws, seed)
    for direction, several in zip(DIRECTIONS, directions, strict=True):
        side = result[direction]
        side["median_rank"] = float(np.mean([np.median(one.expected_rank()) for one in several]))
        side["queries"], side["gallery"] = len(several[0].group), several[0].gallery
        if len(several) > 1:
            for k in RECALL_AT:
                side[f"R@{k}_sd"] = float(np.std([100 * one.hit_at(k).mean() for one in several], ddof=1))
    if len(pairs) > 1:
        rsums = [sum(100 * side.hit_at(k).mean() for side in pair for k in RECALL_AT) for pair in pairs]
        result["rsum_sd"] = float(np.std(rsums, ddof=1))
    return result


def quality(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> dict:
    """``report`` without intervals, for choosing a model while it trains."""
    return report([rank(images, texts, image_index)], draws=0)


def compare(
    first: Sequence[tuple[Ranks, Ranks]], second: Sequence[tuple[Ranks, Ranks]], draws: int = DRAWS, seed: int = 0
) -> dict:
    """Differences, second minus first, in the numbers of ``report``, each with its paired interval.

    Both are as ``report`` takes them; a model's several pairs (its seeds) count as their mean, query by query.

    Raises:
        MetricsError: the two do not rank the same queries in galleries of the same size.
    """
    values = []
    for one, other in zip(zip(*first, strict=True), zip(*second, strict=True), strict=True):
        for ranks in (*one, *other):
            if ranks.gallery != one[0].gallery or not np.array_equal(ranks.group, one[0].group):
                raise MetricsError("the two rank different queries or galleries; they cannot be paired")
        before, after = _mean_values(one), _mean_values(other)
        values.append({name: after[name] - before[name] for name in after})
    return _summary(values, [side.group for side in first[0]], draws, seed)


def _mean_values(several: tuple[Ranks, ...] | list[Ranks]) -> dict[str, np.ndarray]:
    """What each query contributes to the numbers that are means over queries, averaged over several rankings."""
    values = {f"R@{k}": [100 * one.hit_at(k) for one in several] for k in RECALL_AT}
    values |= {f"true_recall@{k}": [100 * one.true_recall_at(k) for one in several] for k in RECALL_AT}
    values["mean_rank"] = [one.expected_rank() for one in several]
    values["mrr"] = [one.expected_reciprocal_rank() for one in several]
    return {name: np.mean(columns, axis=0) for name, columns in values.items()}


def _summary(values: list[dict[str, np.ndarray]], groups: list[np.ndarray], draws: int, seed: int) -> dict:
    """Means over queries of each direction's values, rsum, and the intervals of all of them."""
    result: dict = {}
    drawn_rsum = 0.0
    estimates = _resampled(values, groups, draws, seed) if draws else [{}, {}]
    for direction, columns, drawn in zip(DIRECTIONS, values, estimates, strict=True):
        side = result[direction] = {}
        for name, column in columns.items():
            side[name] = float(column.mean())
            if draws:
                side[f"{name}_ci"] = _interval(drawn[name])
        drawn_rsum = drawn_rsum + sum(drawn.get(f"R@{k}", 0.0) for k in RECALL_AT)
    result["rsum"] = sum(result[direction][f"R@{k}"] for direction in DIRECTIONS for k in RECALL_AT)
    return result | ({"rsum_ci": _interval(drawn_rsum), "rsum_se": float(np.std(drawn_rsum))} if draws else {})


def _interval(estimates: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(estimates, _INTERVAL)]


def _resampled(
    values: list[dict[str, np.ndarray]], groups: list[np.ndarray], draws: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Each direction's means in ``draws`` resamples of the images, float64 (draws,) each."""
    pictures, inverse = np.unique(np.concatenate(groups), return_inverse=True)
    queries = np.split(inverse, np.cumsum([len(group) for group in groups])[:-1])
    # per image, of each direction: the sum of each value over its queries, and how many queries it has
    sums = [
        np.stack([*(np.bincount(group, column, len(pictures)) for column in columns.values()),
                  np.bincount(group, minlength=len(pictures))], axis=1)
        for columns, group in zip(values, queries, strict=True)
    ]  # fmt: skip
    generator = np.random.default_rng(seed)
    totals: list[list[np.ndarray]] = [[] for _ in sums]
    for start in range(0, draws, _RESAMPLES):
        times_drawn = _times_drawn(generator, min(_RESAMPLES, draws - start), len(pictures))
        for total, per_picture in zip(totals, sums, strict=True):
            total.append(times_drawn @ per_picture)
    means = [total[:, :-1] / total[:, -1:] for total in map(np.concatenate, totals)]
    return [dict(zip(columns, mean.T, strict=True)) for columns, mean in zip(values, means, strict=True)]


def _times_drawn(generator: np.random.Generator, draws: int, pictures: int) -> np.ndarray:
    """How often each image is drawn when as many are drawn with replacement, float64 (draws, images)."""
    drawn = generator.integers(pictures, size=(draws, pictures)) + pictures * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * pictures).reshape(draws, pictures).astype(np.float64)
