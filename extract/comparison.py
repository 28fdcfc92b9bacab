"""Compares two arrays of features of the same records. numpy only."""

import numpy as np


def relative_error(features: np.ndarray, reference: np.ndarray, spread: np.ndarray | None = None) -> float:
    """Root-mean-square difference of two (N, ...) arrays, in units of the spread of the features over the N records.

    A cosine says little, since features of different images can agree to 0.998. The spread is that of ``reference``
    unless a larger sample (N', ...) of such features is given. A single record has no spread: infinite.
    """
    if spread is None:
        spread = reference
    if len(spread) < 2:
        return float("inf")
    deviation = float(np.std(spread, axis=0, dtype=np.float64).mean())
    error = float(np.sqrt(np.mean(np.square(features.astype(np.float64) - reference))))
    return error / max(deviation, float(np.finfo(np.float32).tiny))


def neighbour_overlap(features: np.ndarray, reference: np.ndarray, k: int) -> float:
    """Share of each record's ``k`` nearest others, by cosine, that two (N, D) arrays of features have in common."""

    def nearest(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(np.finfo(np.float32).tiny)
        scores = rows @ rows.T
        np.fill_diagonal(scores, -np.inf)
        return np.argsort(-scores, axis=1, kind="stable")[:, :k]

    pairs = zip(nearest(features), nearest(reference), strict=True)
    return float(np.mean([len(np.intersect1d(*pair)) / k for pair in pairs]))
