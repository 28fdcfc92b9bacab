"""Baselines that are linear maps, fitted in closed form: canonical correlation analysis and ridge regression."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from onceover.base.threads import ahead, available_cpus, worker_threads
from onceover.retrieval.baselines import Candidate, Pairs, choose, unit_rows
from onceover.retrieval.ranks import MetricsError

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, in units of the mean variance
DIMENSIONS = (64, 128, 256, 512)
POWERS = (0, 1, 2, 4)  # of the canonical correlations
CCA_CANDIDATES = len(STRENGTHS) * len(DIMENSIONS) * len(POWERS)
CANDIDATES = CCA_CANDIDATES + 2 * len(STRENGTHS)  # ridge regression: both ways
_NOISE = 1e-6  # singular values below this share of the largest one are left out
_NO_VARIANCE = 1e-10  # share of the largest variance below which a direction of few rows is none
_AT_ONCE_BYTES = 2**28  # that the strengths which are computed at the same time may take, unless it is one alone

#: applies a function to several arguments: ``map``, or in threads
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


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


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The second moments of features over rows, by their eigenvectors; directions without any variance may be missing.

    Attributes:
        values: the variances along the eigenvectors, float64 (K,). basis: the eigenvectors, float64 (D, K).
        mean: the mean variance of the D features.
    """

    values: np.ndarray
    basis: np.ndarray
    mean: float


@dataclass(frozen=True, eq=False)
class Moments:
    """The second moments of pairs, each caption with its image: what every linear baseline is made of.

    Attributes:
        image, text: those of the images and of the texts. cross: those of both, in their bases, float64 (K, L).
    """

    image: Spectrum
    text: Spectrum
    cross: np.ndarray

    @classmethod
    def of(cls, pairs: Pairs, apply: Map = map) -> "Moments":
        """Computes them; no row is repeated, and nothing is larger than images by images where these are few."""
        count = len(pairs.texts)
        captions = np.bincount(pairs.image_index, minlength=len(pairs.images))[:, None]
        own = csr_array((np.ones(count), (pairs.image_index, np.arange(count))), (len(pairs.images), count))
        text_sums = own @ pairs.texts
        image, text = apply(_spectrum, [pairs.images * np.sqrt(captions / count), pairs.texts / np.sqrt(count)])
        cross = image.basis.T @ (pairs.images.T @ text_sums / count) @ text.basis
        return cls(image, text, cross)


def _spectrum(rows: np.ndarray) -> Spectrum:
    """The spectrum of the second moments ``rows.T @ rows``.

    Raises:
        MetricsError: all features are zero, which standardised ones are where they do not differ.
    """
    count, dim = rows.shape
    if count >= dim:
        values, basis = np.linalg.eigh(rows.T @ rows)
    else:  # the same, from the products of the few rows with each other
        values, vectors = np.linalg.eigh(rows @ rows.T)
        has_variance = values > _NO_VARIANCE * values[-1]
        values = values[has_variance]
        basis = rows.T @ vectors[:, has_variance] / np.sqrt(values)
    values = np.maximum(values, 0)
    if not values.any():
        raise MetricsError("the features of the train images or captions are all alike")
    return Spectrum(values, basis, values.sum() / dim)


class CCA:
    """Regularised canonical correlation analysis in closed form (Hotelling 1936; Vinod 1976 for the ridge).

    A ``Family``. Each caption is a pair with its image. Projections are weighted by a power of their canonical
    correlation (Gong et al. 2014) and compared by cosine.
    """

    def __init__(self, moments: Moments, apply: Map = map):
        """``apply``: computes what each strength of the ridge takes."""
        self._moments = moments
        self._apply = apply

    def candidates(self, validation: Pairs) -> Iterator[Candidate]:
        """The vectors of the validation pairs with each strength of the ridge, number of dimensions and power."""
        images = validation.images @ self._moments.image.basis
        texts = validation.texts @ self._moments.text.basis
        for strength, directions in zip(STRENGTHS, self._apply(self._directions, STRENGTHS), strict=True):
            image_map, correlations, text_map = directions
            moved_images = images @ image_map
            moved_texts = texts @ text_map
            for dimensions in sorted({min(wanted, len(correlations)) for wanted in DIMENSIONS}):
                for power in POWERS:
                    weights = correlations[:dimensions] ** power
                    settings = {"strength": strength, "dimensions": dimensions, "power": power}
                    image_vectors = unit_rows(moved_images[:, :dimensions] * weights)
                    yield Candidate(settings, image_vectors, unit_rows(moved_texts[:, :dimensions] * weights))

    def fit(self, settings: dict) -> Linear:
        """The maps with some settings, in at most as many dimensions as there are correlations."""
        image_map, correlations, text_map = self._directions(settings["strength"])
        dimensions = min(settings["dimensions"], len(correlations))
        weights = correlations[:dimensions] ** settings["power"]
        return Linear(
            self._moments.image.basis @ (image_map[:, :dimensions] * weights),
            self._moments.text.basis @ (text_map[:, :dimensions] * weights),
        )

    def _directions(self, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The leading canonical directions in the bases, (K, C) and (L, C), with their correlations (C,) between."""
        image_scale = _whitening(self._moments.image, strength)
        text_scale = _whitening(self._moments.text, strength)
        whitened = image_scale[:, None] * self._moments.cross * text_scale
        left, correlations, right = _leading(whitened, max(DIMENSIONS))
        return image_scale[:, None] * left, correlations, text_scale[:, None] * right


def _whitening(spectrum: Spectrum, strength: float) -> np.ndarray:
    """Scales that bring the variances of a spectrum to 1, but for the ridge."""
    return 1 / np.sqrt(spectrum.values + strength * spectrum.mean)


def _leading(matrix: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular vectors, (rows, K) and (columns, K), with their values (K,) between them.

    By the smaller product's eigenvectors, for a fraction of a full decomposition's cost. Values below 1e-6 of the
    largest one, which would be inaccurate, are left out.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = _leading(matrix.T, most)
        return left, values, right
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    leading = slice(None, -most - 1, -1)  # the largest ones, which come last
    values = np.sqrt(np.maximum(squares[leading], 0))
    is_accurate = values > _NOISE * values[0]
    values = values[is_accurate]
    right = vectors[:, leading][:, is_accurate]
    return matrix @ right / values, values, right


class Ridge:
    """Ridge regression of one modality's features on the other's (Hoerl and Kennard 1970), compared there.

    A ``Family``.
    """

    def __init__(self, moments: Moments):
        self._moments = moments

    def candidates(self, validation: Pairs) -> Iterator[Candidate]:
        """The vectors of the validation pairs with each strength, in the images' space and then in the texts'."""
        image = self._moments.image
        text = self._moments.text
        cross = self._moments.cross
        for strength, texts, images in _predictions(validation.texts, text, cross.T, image, validation.images):
            yield Candidate({"onto": "image", "strength": strength}, images, texts)
        for strength, images, texts in _predictions(validation.images, image, cross, text, validation.texts):
            yield Candidate({"onto": "text", "strength": strength}, images, texts)

    def fit(self, settings: dict) -> Linear:
        """The map with some settings."""
        image = self._moments.image
        text = self._moments.text
        cross = self._moments.cross
        if settings["onto"] == "image":
            return Linear(None, text.basis @ _regression(text, cross.T, settings["strength"]) @ image.basis.T)
        return Linear(image.basis @ _regression(image, cross, settings["strength"]) @ text.basis.T, None)


def _regression(source: Spectrum, cross: np.ndarray, strength: float) -> np.ndarray:
    """The regression map between two bases, (K, L)."""
    return cross / (source.values + strength * source.mean)[:, None]


def _predictions(
    features: np.ndarray, source: Spectrum, cross: np.ndarray, target: Spectrum, others: np.ndarray
) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """Yields each strength with the unit vectors of features, mapped into the other modality, and of ``others``.

    Inner products are those of the other modality's space, but both have fewer dimensions where the mapped vectors
    span fewer.

    Args:
        features: (N, D) with the spectrum ``source``. others: (M, E) with the spectrum ``target``.
        cross: the moments of both in their bases, (K, L).
    """
    coordinates = features @ source.basis
    space = unit_rows(others) @ target.basis
    if cross.shape[0] < cross.shape[1]:
        span, upper = np.linalg.qr(cross.T)
        space = space @ span
        cross = upper.T
    for strength in STRENGTHS:
        yield strength, unit_rows(coordinates @ _regression(source, cross, strength)), space


class Aligned(NamedTuple):
    """A CCA whose settings are chosen.

    Attributes:
        settings: the chosen ones. linear: the maps with them, fitted on the train pairs.
        fit_both: fits the maps with them on train and validation pairs.
    """

    settings: dict
    linear: Linear
    fit_both: Callable[[], Linear]


def align(train: tuple, validation: tuple, step: Callable[[], object] = lambda: None) -> Aligned:
    """Fits the regularised CCA that ranks the validation pairs best, for heads that are an ensemble.

    On all processors, each of which computes alone, so that the result does not depend on their number.

    Args:
        train, validation: images (N, D), texts (M, E) and image_index (M,), standardised already.
        step: called after each candidate.
    """
    train_pairs = Pairs(*train)
    validation_pairs = Pairs(*validation)
    with _in_threads(train_pairs) as apply:
        family = CCA(Moments.of(train_pairs, apply), apply)
        settings = choose(family, validation_pairs, step)
        linear = family.fit(settings)

    def fit_both() -> Linear:
        with _in_threads(train_pairs) as apply:
            return CCA(Moments.of(joined(train_pairs, validation_pairs), apply)).fit(settings)

    return Aligned(settings, linear, fit_both)


@contextlib.contextmanager
def _in_threads(pairs: Pairs) -> Iterator[Map]:
    """Gives a ``Map`` in threads that compute alone; fewer with very wide features, since each takes memory."""
    image_dim = pairs.images.shape[1]
    text_dim = pairs.texts.shape[1]
    smaller = min(image_dim, text_dim)
    bytes_of_each = 8 * (image_dim * text_dim + 5 * smaller**2)  # the whitened moments, and their decomposition
    count = max(0, min(available_cpus(), _AT_ONCE_BYTES // bytes_of_each - 1))
    with worker_threads() as pool:

        def apply(work: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
            return ahead(lambda argument: pool.submit(work, argument).result, arguments, count)

        yield apply


def joined(first: Pairs, second: Pairs) -> Pairs:
    """The pairs of two sets of images as those of one."""
    return Pairs(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.texts, second.texts]),
        np.concatenate([first.image_index, second.image_index + len(first.images)]),
    )
