"""What the trained heads have to beat: spaces in which nothing is learned, neighbours, and closed-form alignments.

The learned ones see the train images' features, averaged over an image's views and standardised, and like the heads
they are chosen on the validation images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csr_array

from onceover.retrieval.exact import exact_search
from onceover.retrieval.metrics import MetricsError, Ranks, quality, rank

MAPS = 10  # random maps averaged: a single one strays from chance by luck
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the ridge, in units of the mean variance
DIMENSIONS = (64, 128, 256, 512)
POWERS = (0, 1, 2, 4)  # of the canonical correlations
NEIGHBOURS = (1, 3, 10, 30, 100, 300)
SHARPNESS = (0.02, 0.05, 0.1, 0.2)  # softmax temperature of the neighbours' weights


@dataclass(frozen=True, eq=False)
class Pairs:
    """Features of N images, float (N, D), and of their M captions, (M, E), with the caption map, int64 (M,)."""

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray


#: what a baseline is: settings, and a function from pairs to image and text vectors of one space
Candidate = tuple[dict, Callable[[Pairs], tuple[np.ndarray, np.ndarray]]]


def choose(
    candidates: Iterator[Candidate], selection: Pairs, step: Callable[[], object] = lambda: None
) -> tuple[dict, Callable[[Pairs], tuple[np.ndarray, np.ndarray]]]:
    """The candidate with the best rsum on the selection pairs; its settings get that rsum."""
    best, found = -1.0, None
    for settings, embed in candidates:
        rsum = quality(*embed(selection), selection.image_index)["rsum"]
        if rsum > best:
            best, found = rsum, (settings | {"selection_rsum": round(rsum, 1)}, embed)
        step()
    if found is None:
        raise MetricsError("no candidate of the baseline could be made")
    return found


def standardised(train: Pairs, *others: Pairs) -> list[Pairs]:
    """All pairs with each feature at mean 0 and deviation 1 over ``train``, float64, as in the heads' first layer.

    Features that are never negative over ``train`` are square-rooted first; one that is constant there becomes 0.
    """
    transforms = []
    for features in (train.images, train.texts):
        root = features.min() >= 0
        rows = np.sqrt(features, dtype=np.float64) if root else features.astype(np.float64)
        mean, deviation = rows.mean(0), rows.std(0)
        constant = deviation <= np.finfo(np.float32).eps * np.abs(rows).max(0)
        transforms.append((root, mean, np.where(constant, 0, 1 / np.where(constant, 1, deviation))))

    def apply(features: np.ndarray, transform: tuple) -> np.ndarray:
        root, mean, scale = transform
        rows = np.sqrt(np.maximum(features, 0), dtype=np.float64) if root else features.astype(np.float64)
        return (rows - mean) * scale

    return [Pairs(apply(pairs.images, transforms[0]), apply(pairs.texts, transforms[1]), pairs.image_index)
            for pairs in (train, *others)]  # fmt: skip


def cca(train: Pairs) -> Iterator[Candidate]:
    """Regularised canonical correlation analysis in closed form (Hotelling 1936; Vinod 1976 for the ridge).

    Each caption is a pair with its image. Projections are weighted by a power of their canonical correlation
    (Gong et al. 2014) and compared by cosine.
    """
    of_images, of_texts, cross = _moments(train)
    (image_values, image_basis), (text_values, text_basis) = np.linalg.eigh(of_images), np.linalg.eigh(of_texts)
    cross = image_basis.T @ cross @ text_basis
    for strength in STRENGTHS:
        image_scale, text_scale = (
            1 / np.sqrt(np.maximum(values, 0) + strength * values.mean()) for values in (image_values, text_values)
        )
        left, correlations, right = _leading(image_scale[:, None] * cross * text_scale, max(DIMENSIONS))
        image_map, text_map = image_basis @ (image_scale[:, None] * left), text_basis @ (text_scale[:, None] * right)
        for dimensions in sorted({min(wanted, len(correlations)) for wanted in DIMENSIONS}):
            for power in POWERS:
                weights = correlations[:dimensions] ** power
                maps = image_map[:, :dimensions] * weights, text_map[:, :dimensions] * weights
                yield {"strength": strength, "dimensions": dimensions, "power": power}, Linear(*maps)


def _leading(matrix: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular vectors, (rows, K) and (columns, K), with their values (K,) between them.

    By the smaller product's eigenvectors, for a fraction of a full decomposition's cost. What lies below 1e-6 of the
    largest value, and would be blurred, is left out.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = _leading(matrix.T, most)
        return left, values, right
    size = matrix.shape[1]
    squares, right = eigh(matrix.T @ matrix, subset_by_index=(max(0, size - most), size - 1))
    values = np.sqrt(np.maximum(squares[::-1], 0))
    kept = values > 1e-6 * values[0]
    right = right[:, ::-1][:, kept]
    return matrix @ right / values[kept], values[kept], right


def ridge(train: Pairs) -> Iterator[Candidate]:
    """Ridge regression of one side's features on the other's (Hoerl and Kennard 1970), compared by cosine there."""
    of_images, of_texts, cross = _moments(train)
    for onto, known, shared in (("image", of_texts, cross.T), ("text", of_images, cross)):
        values, basis = np.linalg.eigh(known)
        shared = basis.T @ shared
        for strength in STRENGTHS:
            mapping = basis @ (shared / (np.maximum(values, 0) + strength * values.mean())[:, None])
            maps = (None, mapping) if onto == "image" else (mapping, None)
            yield {"onto": onto, "strength": strength}, Linear(*maps)


def _moments(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Second moments over captions with their pictures: of images, of texts, and of both; no row is repeated."""
    counts = np.bincount(pairs.image_index, minlength=len(pairs.images))[:, None]
    said = np.zeros((len(pairs.images), pairs.texts.shape[1]))
    np.add.at(said, pairs.image_index, pairs.texts)
    count = len(pairs.texts)
    return (
        pairs.images.T @ (counts * pairs.images) / count,
        pairs.texts.T @ pairs.texts / count,
        pairs.images.T @ said / count,
    )


def neighbours(train: Pairs, kind: str) -> Iterator[Candidate]:
    """Training pairs as a bridge (the transfer of Ordonez et al. 2011, softened).

    ``text_knn``: a caption enters the image space as the weighted mean of the images of its nearest training
    captions; ``image_knn``: an image enters the caption space by the captions of its nearest training images.
    """
    images, texts = _unit(train.images), _unit(train.texts)
    if kind == "text_knn":
        memory, values, carried = texts, images, train.image_index
    else:
        asked, picture = np.unique(train.image_index, return_inverse=True)
        sums = np.zeros((len(asked), texts.shape[1]))
        np.add.at(sums, picture, texts)
        memory, values, carried = images[asked], sums / np.bincount(picture)[:, None], np.arange(len(asked))

    @lru_cache(maxsize=1)
    def nearest(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept, moved = (pairs.images, pairs.texts) if kind == "text_knn" else (pairs.texts, pairs.images)
        return _unit(kept), *exact_search(memory, _unit(moved), max(NEIGHBOURS))

    def bridge(count: int, sharpness: float, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        kept, scores, rows = nearest(pairs)
        weights = np.exp((scores[:, :count] - scores[:, :1]) / sharpness)
        starts = np.arange(0, weights.size + 1, weights.shape[1])
        places = carried[rows[:, :count]].ravel()  # an image stands there once for each of its captions
        moved = csr_array((weights.ravel(), places, starts), (len(rows), len(values))) @ values
        return (kept, _unit(moved)) if kind == "text_knn" else (_unit(moved), kept)

    for count in sorted({min(count, len(memory)) for count in NEIGHBOURS}):
        for sharpness in SHARPNESS if count > 1 else SHARPNESS[:1]:
            yield {"neighbours": count, "sharpness": sharpness}, partial(bridge, count, sharpness)


def zero_shot(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """A dual encoder's own features, compared by cosine: nothing is learned here."""
    return _unit(pairs.images), _unit(pairs.texts)


def unlearned(
    space: np.ndarray,
    others: np.ndarray,
    image_index: np.ndarray,
    *,
    images_are_space: bool,
    seed: int = 0,
    step: Callable[[], object] = lambda: None,
) -> list[tuple[Ranks, Ranks]]:
    """Ranks in one modality's feature space that the other one enters by a random orthogonal map, once for each map.

    Args:
        space: features whose space is used, (rows, D). others: features mapped into it, (rows, E).
        images_are_space: ``image_only`` if true, else ``text_only``.
        step: called after each of the ``MAPS`` maps.

    Raises:
        MetricsError: features that are not finite, or a row without direction.
    """
    space, others = _unit(space), _unit(others)
    pairs = []
    for number in range(MAPS):
        mapping = random_orthogonal(others.shape[1], space.shape[1], [seed, images_are_space, number])
        # a map into more dimensions keeps lengths, so that the same scores are had in the fewer ones
        sides = (space @ mapping.T, others) if len(mapping) < len(mapping.T) else (space, _unit(others @ mapping))
        images, texts = sides if images_are_space else reversed(sides)
        pairs.append(rank(images, texts, image_index))
        step()
    return pairs


def random_orthogonal(rows: int, columns: int, seed: int | list[int]) -> np.ndarray:
    """Haar-random, float64 (rows, columns): its rows or columns, the fewer, are orthonormal (Mezzadri 2007)."""
    gaussian = np.random.default_rng(seed).standard_normal((max(rows, columns), min(rows, columns)))
    basis, upper = np.linalg.qr(gaussian)
    basis *= np.sign(np.diag(upper))
    return basis if rows >= columns else basis.T


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear map of each side into one space, float64 (D, K) and (E, K); None: the side is that space."""

    image_map: np.ndarray | None
    text_map: np.ndarray | None

    def __call__(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of pairs."""
        sides = ((pairs.images, self.image_map), (pairs.texts, self.text_map))
        return tuple(_unit(rows if mapping is None else rows @ mapping) for rows, mapping in sides)


def align(
    train: tuple, selection: tuple, refit: bool, step: Callable[[], object] = lambda: None
) -> tuple[dict, list[Linear]]:
    """The regularised CCA that ranks the selection pairs best, with its settings; for heads that are an ensemble.

    Args:
        train, selection: images (N, D), texts (M, E) and image_index (M,), standardised already.
        refit: whether there is to be a second one, fitted with the same settings on both; as near to them as there is,
            since more images can have more dimensions.
    """
    settings, chosen = choose(cca(Pairs(*train)), Pairs(*selection), step)
    if not refit:
        return settings, [chosen]
    (images, texts, index), (more_images, more_texts, more_index) = train, selection
    both = np.concatenate([images, more_images]), np.concatenate([texts, more_texts])
    candidates = cca(Pairs(*both, np.concatenate([index, more_index + len(images)])))
    same = (each for each in candidates if all(each[0][key] == settings[key] for key in ("strength", "power")))
    _, again = min(same, key=lambda each: abs(each[0]["dimensions"] - settings["dimensions"]))
    return settings, [chosen, again]


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    norms = np.sqrt(np.einsum("rd,rd->r", features, features))[:, None]  # without an array of squares
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise MetricsError("features that are not finite, or zero, have no direction; verify the store")
    return features / norms
