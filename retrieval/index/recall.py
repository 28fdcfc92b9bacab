"""The recall and speed of an index, measured with queries of the other modality when it is written."""

import time
from typing import NamedTuple

import numpy as np

from onceover.retrieval.exact import checked_queries
from onceover.retrieval.index.segments import Segment
from onceover.retrieval.index.types import EFFORTS, IndexingError

K = 10
TIMED = 100  # queries at most, searched one by one
_TIMED_SECONDS = 0.25  # after which the time of those so far is enough
_EQUAL = 1e-5  # scores that differ by less are equal; the arithmetic of faiss's types differs by some 1e-6


class Measurement(NamedTuple):
    """The recall@10 of an index against exact search, the queries it answers per second, and its segments' efforts."""

    recall: float
    queries_per_second: float
    efforts: list[int]


def measure(segments: list[Segment], probes: np.ndarray, min_recall: float) -> Measurement:
    """Raises the segments' effort until the recall suffices, then times single queries.

    Args:
        probes: queries of the other modality, float32 (Q, D).

    Raises:
        IndexingError: no effort reaches ``min_recall``.
    """
    probes = checked_queries(probes, segments[0].dim)
    recall = _raise_effort(segments, probes, min_recall)
    if recall < min_recall:
        raise IndexingError(
            f"the recall@10 against exact search is {recall:.3f}, under {min_recall}; use --type hnsw or flat, or "
            "lower --min-recall"
        )
    return Measurement(recall, _queries_per_second(segments, probes), [segment.effort for segment in segments])


def _queries_per_second(segments: list[Segment], probes: np.ndarray) -> float:
    """How many queries, one after the other, are answered in a second."""
    start = time.perf_counter()
    seconds = 0.0
    count = 0
    while count < min(TIMED, len(probes)) and seconds < _TIMED_SECONDS:
        for segment in segments:
            segment.search(probes[count][None], K)
        count += 1
        seconds = time.perf_counter() - start
    return round(count / seconds, 1)


def _raise_effort(segments: list[Segment], probes: np.ndarray, min_recall: float) -> float:
    """Raises the effort of approximate segments until their recall suffices or is at its limit; returns the recall."""
    approximate = [segment for segment in segments if segment.type != "flat"]
    if not approximate:
        return 1.0
    truth = _best_scores([segment.exact(probes, K) for segment in segments])
    least = [segment.effort for segment in approximate]
    recall = 0.0
    for effort in EFFORTS[approximate[0].type]:
        for segment, before in zip(approximate, least, strict=True):
            segment.effort = max(effort, before)
        recall = _recall(_best_scores([segment.search(probes, K) for segment in segments]), truth)
        if recall >= min_recall:
            break
    return recall


def _best_scores(hits: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The best ten scores over all segments, best first, (Q, at most 10)."""
    scores = np.concatenate([of_segment for of_segment, _ in hits], axis=1)
    return -np.sort(-scores, axis=1)[:, :K]


def _recall(scores: np.ndarray, truth: np.ndarray) -> float:
    """The share of the first ten hits (or of all rows) that score as high as the last exact hit; copies are equal."""
    last = truth[:, -1:] - _EQUAL
    return float((scores[:, : truth.shape[1]] >= last).mean())
