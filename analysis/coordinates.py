"""Coordinates of maps: t-SNE, which takes seconds and is therefore kept in the run's folder, and PCA."""

from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np

from onceover.analysis.sources import PairSample, RunFiles
from onceover.base.files import digest
from onceover.base.formats import MAP, MAP_VERSION
from onceover.base.kept_arrays import KeptArrays

_DIGITS = 5  # of unit vectors' coordinates; vectors that agree in them are equal but for rounding
_ROWS = 8192  # in memory at a time, for PCA
_FEWEST = 5  # different vectors that t-SNE has something to say about


def map_coordinates(run: RunFiles, pairs: PairSample, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The coordinates of the images and then of the captions of pairs, float32 (2 * pairs, 2): kept, or computed."""
    embeddings = run.embeddings
    rows = [pairs.images.tolist(), pairs.captions.tolist()]
    versions = [MAP_VERSION, version("scikit-learn")]
    origin = digest([embeddings.space, embeddings.fingerprints, rows, run.seed, versions])
    file = KeptArrays(run.folder, MAP.format(run.split, len(pairs.images)), origin)

    def build(arrays: dict[str, np.ndarray]) -> np.ndarray:
        points = arrays["points"]
        if points.shape != (2 * len(pairs.images), 2) or points.dtype != np.float32 or not np.isfinite(points).all():
            raise ValueError("no coordinates of these pairs")
        return points

    points = file.read(build)
    if points is None:
        points = compute()
        file.write({"points": points})
    return points


def different_rows(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the different vectors, in their order, and for each vector which of these it is equal to."""
    rounded = np.round(vectors, _DIGITS) + 0.0  # no negative zeros
    _, first, numbers = np.unique(rounded, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    places = np.empty(len(order), int)
    places[order] = np.arange(len(order))
    return first[order], places[numbers.reshape(-1)]


def tsne(vectors: np.ndarray, seed: int) -> np.ndarray:
    """The vectors in two dimensions by t-SNE on cosine distances, float32 (N, 2).

    Equal vectors lie at one place. Of very few different ones this is the PCA.
    """
    from sklearn.manifold import TSNE

    rows, places = different_rows(vectors)
    if len(rows) < _FEWEST:
        return pca(vectors)[0].astype(np.float32)
    perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
    model = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return model.fit_transform(vectors[rows])[places]


def pca(vectors: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The vectors' first two principal components, (N, 2), equal ones at one place, and a label for each component."""
    rows, places = different_rows(vectors)
    if len(rows) == 1:
        return np.zeros((len(vectors), 2)), ["component 1 (no variance)", "component 2 (no variance)"]
    model = PrincipalMap(vectors)
    labels = []
    for number, share in enumerate(model.shares, 1):
        labels.append(f"component {number} ({100 * share:.0f} % of the variance)")
    return model.points(vectors[rows])[places], labels


class PrincipalMap:
    """The two principal components of vectors (PCA), onto which these and other vectors are projected.

    Each component points to where its largest coordinate is positive, so that the same vectors give the same map.

    Args:
        vectors: float32 (N, D), in memory or mapped; D is 2 at least.

    Attributes:
        shares: of the variance of the vectors, that of either component.
    """

    def __init__(self, vectors: np.ndarray):
        self._mean = np.zeros(vectors.shape[1])
        for block in _blocks(vectors):
            self._mean += block.sum(0) / len(vectors)
        covariance = np.zeros((vectors.shape[1], vectors.shape[1]))
        for block in _blocks(vectors):
            centred = block - self._mean
            covariance += centred.T @ centred / len(vectors)
        variances, directions = np.linalg.eigh(covariance)  # in ascending order of the variance
        total = max(float(variances.sum()), np.finfo(float).tiny)
        self.shares = (float(variances[-1]) / total, float(variances[-2]) / total)
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
    """The vectors in float64, ``_ROWS`` rows at a time."""
    for start in range(0, len(vectors), _ROWS):
        yield vectors[start : start + _ROWS].astype(np.float64)
