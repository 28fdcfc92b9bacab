"""Baselines that are linear maps, fitted in closed form: canonical correlation analysis and ridge regression."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from onceover.retrieval.baselines import Pairs, choose, unit_rows

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the ridge, in units of the mean variance
DIMENSIONS = (64, 128, 256, 512)
POWERS = (0, 1, 2, 4)  # of the canonical correlations
_NOISE = 1e-6  # singular values below this share of the largest one are left out


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear map of each modality into one space, float64 (D, K) and (E, K); None: the modality is that space."""

    image_map: np.ndarray | None
    text_map: np.ndarray | None

    def __call__(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of the images and texts of pairs."""
        return _map(pairs.images, self.image_map), _map(pairs.texts, self.text_map)


def _map(rows: np.ndarray, mapping: np.ndarray | None) -> np.ndarray:
    """Unit vectors of mapped rows."""
    if mapping is not None:
        rows = rows @ mapping
    return unit_rows(rows)


def cca(train: Pairs) -> Iterator[tuple[dict, Linear]]:
    """Regularised canonical correlation analysis in closed form (Hotelling 1936; Vinod 1976 for the ridge).

    Each caption is a pair with its image. Projections are weighted by a power of their canonical correlation
    (Gong et al. 2014) and compared by cosine.
    """
    image_moments, text_moments, cross_moments = _moments(train)
    image_values, image_basis = np.linalg.eigh(image_moments)
    text_values, text_basis = np.linalg.eigh(text_moments)
    cross = image_basis.T @ cross_moments @ text_basis
    for strength in STRENGTHS:
        image_scale = _whitening(image_values, strength)
        text_scale = _whitening(text_values, strength)
        left, correlations, right = _leading(image_scale[:, None] * cross * text_scale, max(DIMENSIONS))
        image_map = image_basis @ (image_scale[:, None] * left)
        text_map = text_basis @ (text_scale[:, None] * right)
        for dimensions in sorted({min(wanted, len(correlations)) for wanted in DIMENSIONS}):
            for power in POWERS:
                weights = correlations[:dimensions] ** power
                settings = {"strength": strength, "dimensions": dimensions, "power": power}
                yield settings, Linear(image_map[:, :dimensions] * weights, text_map[:, :dimensions] * weights)


def _whitening(values: np.ndarray, strength: float) -> np.ndarray:
    """Scales that bring the variances ``values`` to 1, but for the ridge."""
    return 1 / np.sqrt(np.maximum(values, 0) + strength * values.mean())


def _leading(matrix: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular vectors, (rows, K) and (columns, K), with their values (K,) between them.

    By the smaller product's eigenvectors, for a fraction of a full decomposition's cost. Values below 1e-6 of the
    largest one, which would be inaccurate, are left out.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = _leading(matrix.T, most)
        return left, values, right
    size = matrix.shape[1]
    squares, vectors = eigh(matrix.T @ matrix, subset_by_index=(max(0, size - most), size - 1))
    values = np.sqrt(np.maximum(squares[::-1], 0))
    is_accurate = values > _NOISE * values[0]
    values = values[is_accurate]
    right = vectors[:, ::-1][:, is_accurate]
    return matrix @ right / values, values, right


def ridge(train: Pairs) -> Iterator[tuple[dict, Linear]]:
    """Ridge regression of one modality's features on the other's (Hoerl and Kennard 1970), compared by cosine there."""
    image_moments, text_moments, cross_moments = _moments(train)
    for strength, mapping in _regressions(text_moments, cross_moments.T):
        yield {"onto": "image", "strength": strength}, Linear(None, mapping)
    for strength, mapping in _regressions(image_moments, cross_moments):
        yield {"onto": "text", "strength": strength}, Linear(mapping, None)


def _regressions(moments: np.ndarray, cross_moments: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """Regression maps of several strengths.

    Args:
        moments: second moments of the features that are mapped, (D, D). cross_moments: with the other ones, (D, E).
    """
    values, basis = np.linalg.eigh(moments)
    cross = basis.T @ cross_moments
    for strength in STRENGTHS:
        yield strength, basis @ (cross / (np.maximum(values, 0) + strength * values.mean())[:, None])


def _moments(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Second moments over captions with their images: of images, of texts, and of both; no row is repeated."""
    counts = np.bincount(pairs.image_index, minlength=len(pairs.images))[:, None]
    text_sums = np.zeros((len(pairs.images), pairs.texts.shape[1]))
    np.add.at(text_sums, pairs.image_index, pairs.texts)
    count = len(pairs.texts)
    return (
        pairs.images.T @ (counts * pairs.images) / count,
        pairs.texts.T @ pairs.texts / count,
        pairs.images.T @ text_sums / count,
    )


def align(
    train: tuple, validation: tuple, refit: bool, step: Callable[[], object] = lambda: None
) -> tuple[dict, list[Linear]]:
    """Fits the regularised CCA that ranks the validation pairs best, for heads that are an ensemble.

    Args:
        train, validation: images (N, D), texts (M, E) and image_index (M,), standardised already.
        refit: fit a second one with the same settings on both; its dimensions are the nearest that there are, since
            more images can have more.

    Returns:
        The settings, and one map or two.
    """
    train_pairs = Pairs(*train)
    validation_pairs = Pairs(*validation)
    settings, chosen = choose(cca(train_pairs), validation_pairs, step)
    if not refit:
        return settings, [chosen]
    alike = []
    for candidate, mapping in cca(_joined(train_pairs, validation_pairs)):
        if candidate["strength"] == settings["strength"] and candidate["power"] == settings["power"]:
            alike.append((abs(candidate["dimensions"] - settings["dimensions"]), mapping))
    _, refitted = min(alike, key=lambda pair: pair[0])
    return settings, [chosen, refitted]


def _joined(first: Pairs, second: Pairs) -> Pairs:
    return Pairs(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.texts, second.texts]),
        np.concatenate([first.image_index, second.image_index + len(first.images)]),
    )
