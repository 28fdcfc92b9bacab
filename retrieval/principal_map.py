"""Coordinates in two dimensions along the directions in which vectors differ most, computed block by block."""

from collections.abc import Iterator

import numpy as np

BLOCK = 8192  # rows in memory at a time


class PrincipalMap:
    """The two principal components of vectors (PCA), onto which these and other vectors are projected.

    Each component points to where its largest coordinate is positive, so that the same vectors give the same map.

    Args:
        vectors: float32 (N, D), in memory or mapped; D is 2 at least.
    """

    def __init__(self, vectors: np.ndarray):
        self._mean = np.zeros(vectors.shape[1])
        for block in _blocks(vectors):
            self._mean += block.sum(0) / len(vectors)
        covariance = np.zeros((vectors.shape[1], vectors.shape[1]))
        for block in _blocks(vectors):
            centred = block - self._mean
            covariance += centred.T @ centred / len(vectors)
        _, directions = np.linalg.eigh(covariance)  # in ascending order of the variance
        axes = directions[:, [-1, -2]]
        largest = np.abs(axes).argmax(0)
        self._axes = axes * np.sign(axes[largest, [0, 1]])

    def points(self, vectors: np.ndarray) -> np.ndarray:
        """The coordinates of vectors, float32 (N, 2)."""
        points = np.empty((len(vectors), 2), np.float32)
        start = 0
        for block in _blocks(vectors):
            points[start : start + len(block)] = (block - self._mean) @ self._axes
            start += len(block)
        return points


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """The vectors in float64, ``BLOCK`` rows at a time."""
    for start in range(0, len(vectors), BLOCK):
        yield vectors[start : start + BLOCK].astype(np.float64)
