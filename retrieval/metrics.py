"""Retrieval metrics of ranks, with bootstrap intervals, and differences between two models, in numpy alone.

R@K, as this field writes it, is hit@K: the probability that a correct item is among the first K; ``true_recall@K`` is
the share of a query's correct items among them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from onceover.retrieval.ranks import MetricsError, Ranks, rank

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
DRAWS = 1000  # bootstrap resamples
CLEARLY = 1.5  # standard errors of a difference in rsum by which another setting has to be better than the usual one
MIN_SEPARATION = 0.8  # of a model that has learned more than next to nothing; measured (docs/notes/few-images.md)
_RESAMPLES = 100  # drawn at a time
_INTERVAL = (2.5, 97.5)  # percentiles

RankPair = tuple[Ranks, Ranks]  # of image-to-text and of text-to-image search
Columns = dict[str, np.ndarray]  # a number for each query, by the number's name


def report(pairs: Sequence[RankPair], draws: int = DRAWS, seed: int = 0) -> dict:
    """Both directions' R@1, R@5, R@10 and true recalls in percent, median and mean rank, MRR; rsum, the sum of all R@K.

    Intervals (``…_ci``, 95 %) resample images with their queries, the same ones in both directions, while the gallery
    stays (percentile bootstrap, Efron 1979).

    Args:
        pairs: of the same queries; of several (a baseline's random maps) the numbers are averaged, and ``R@K_sd`` and
            ``rsum_sd`` are the spread between them.
        draws: resamples; 0 leaves the intervals out.
    """
    directions = list(zip(*pairs, strict=True))
    values = [_mean_values(several) for several in directions]
    result = _summary(values, [several[0].group for several in directions], draws, seed)
    for direction, several in zip(DIRECTIONS, directions, strict=True):
        numbers = result[direction]
        numbers["median_rank"] = float(np.mean([ranks.median_rank() for ranks in several]))
        numbers["queries"] = len(several[0].group)
        numbers["gallery"] = several[0].gallery
        if len(several) > 1:
            for k in RECALL_AT:
                recalls = [100 * ranks.hit_at(k).mean() for ranks in several]
                numbers[f"R@{k}_sd"] = float(np.std(recalls, ddof=1))
    if len(pairs) > 1:
        result["rsum_sd"] = float(np.std([_rsum(pair) for pair in pairs], ddof=1))
    return result


def quality(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> dict:
    """``report`` without intervals, for choosing a model while it trains."""
    return report([rank(images, texts, image_index)], draws=0)


def compare(first: Sequence[RankPair], second: Sequence[RankPair], draws: int = DRAWS, seed: int = 0) -> dict:
    """Differences, second minus first, in the numbers of ``report``, each with its paired interval.

    Both are as ``report`` takes them; a model's several pairs (its seeds) count as their mean, query by query.

    Raises:
        MetricsError: the two do not rank the same queries in galleries of the same size.
    """
    differences = []
    for before, after in zip(zip(*first, strict=True), zip(*second, strict=True), strict=True):
        _check_same_queries([*before, *after])
        values_before = _mean_values(before)
        values_after = _mean_values(after)
        differences.append({name: values_after[name] - values_before[name] for name in values_after})
    return _summary(differences, [ranks.group for ranks in first[0]], draws, seed)


def clearly_best(candidates: Mapping[float, RankPair], usual: float) -> float:
    """The usual candidate, unless the one with the best rsum is better by more than ``CLEARLY`` standard errors.

    Of few queries the best candidate is often the luckiest one.
    """
    differences = {value: compare([candidates[usual]], [pair]) for value, pair in candidates.items()}
    best = max(candidates, key=lambda value: differences[value]["rsum"])
    if differences[best]["rsum"] > CLEARLY * differences[best]["rsum_se"]:
        return best
    return usual


def separation(pair: RankPair) -> float:
    """How often a caption ranks its image before another one, from 0 to 1; by chance 0.5 (area under the ROC curve).

    It takes all ranks into account, and so tells more of a few queries than recalls do.
    """
    by_caption = pair[1]
    others = max(1, by_caption.gallery - 1)
    return 1 - (float(by_caption.expected_rank().mean()) - 1) / others


def is_mostly_noise(*models: RankPair) -> bool:
    """Whether models have learned next to nothing, by their ranks of the validation pairs."""
    return max(separation(ranks) for ranks in models) < MIN_SEPARATION


def rsum_text(rsum: float | None) -> str:
    """A run's rsum on the validation images, for a message; None: fine-tuning left none of them to measure it on."""
    return "rsum not measured" if rsum is None else f"rsum {rsum:.1f}"


def _check_same_queries(rankings: Sequence[Ranks]) -> None:
    for ranks in rankings:
        if ranks.gallery != rankings[0].gallery or not np.array_equal(ranks.group, rankings[0].group):
            raise MetricsError("the two rank different queries or galleries; they cannot be paired")


def _rsum(pair: RankPair) -> float:
    """The sum of all R@K of both directions, in percent."""
    total = 0
    for ranks in pair:
        for k in RECALL_AT:
            total += 100 * ranks.hit_at(k).mean()
    return total


def _mean_values(several: Sequence[Ranks]) -> Columns:
    """The contribution of each query to the numbers that are means over queries, averaged over several rankings."""
    values = {f"R@{k}": [100 * ranks.hit_at(k) for ranks in several] for k in RECALL_AT}
    values |= {f"true_recall@{k}": [100 * ranks.true_recall_at(k) for ranks in several] for k in RECALL_AT}
    values["mean_rank"] = [ranks.expected_rank() for ranks in several]
    values["mrr"] = [ranks.expected_reciprocal_rank() for ranks in several]
    return {name: np.mean(columns, axis=0) for name, columns in values.items()}


def _summary(values: list[Columns], groups: list[np.ndarray], draws: int, seed: int) -> dict:
    """Means over queries of each direction's values, rsum, and the intervals of all of them."""
    result: dict = {}
    rsum = 0.0
    for direction, columns in zip(DIRECTIONS, values, strict=True):
        result[direction] = {name: float(column.mean()) for name, column in columns.items()}
        for k in RECALL_AT:
            rsum += result[direction][f"R@{k}"]
    result["rsum"] = rsum
    if draws:
        _add_intervals(result, _resampled(values, groups, draws, seed))
    return result


def _add_intervals(result: dict, estimates: list[Columns]) -> None:
    """Adds to each mean its interval, and to rsum its standard error as well."""
    rsum = np.zeros(())
    for direction, columns in zip(DIRECTIONS, estimates, strict=True):
        means = result[direction]
        result[direction] = {}
        for name, mean in means.items():
            result[direction][name] = mean
            result[direction][f"{name}_ci"] = _interval(columns[name])
        rsum = rsum + sum(columns[f"R@{k}"] for k in RECALL_AT)
    result["rsum_ci"] = _interval(rsum)
    result["rsum_se"] = float(np.std(rsum))


def _interval(estimates: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(estimates, _INTERVAL)]


def _resampled(values: list[Columns], groups: list[np.ndarray], draws: int, seed: int) -> list[Columns]:
    """Each direction's means in ``draws`` resamples of the images, float64 (draws,) each."""
    images, inverse = np.unique(np.concatenate(groups), return_inverse=True)
    image_of_query = np.split(inverse, np.cumsum([len(group) for group in groups])[:-1])
    sums = [
        _sums_by_image(columns, owners, len(images)) for columns, owners in zip(values, image_of_query, strict=True)
    ]
    generator = np.random.default_rng(seed)
    totals: list[list[np.ndarray]] = [[] for _ in sums]
    for start in range(0, draws, _RESAMPLES):
        times_drawn = _times_drawn(generator, min(_RESAMPLES, draws - start), len(images))
        for total, by_image in zip(totals, sums, strict=True):
            total.append(times_drawn @ by_image)
    estimates = []
    for columns, blocks in zip(values, totals, strict=True):
        joined = np.concatenate(blocks)
        means = joined[:, :-1] / joined[:, -1:]
        estimates.append(dict(zip(columns, means.T, strict=True)))
    return estimates


def _sums_by_image(columns: Columns, image_of_query: np.ndarray, images: int) -> np.ndarray:
    """For each image the sum of each value over its queries, and last how many queries it has: (images, values + 1)."""
    sums = [np.bincount(image_of_query, column, images) for column in columns.values()]
    sums.append(np.bincount(image_of_query, minlength=images))
    return np.stack(sums, axis=1)


def _times_drawn(generator: np.random.Generator, draws: int, images: int) -> np.ndarray:
    """How often each image is drawn when as many are drawn with replacement, float64 (draws, images)."""
    drawn = generator.integers(images, size=(draws, images)) + images * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * images).reshape(draws, images).astype(np.float64)
