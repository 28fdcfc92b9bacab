"""What the trained heads have to beat: one modality's own space with nothing learned."""

from collections.abc import Callable

import numpy as np

from retrieval.metrics import MetricsError, Ranks, rank

MAPS = 20  # random maps averaged: a single one strays from chance by luck


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
        mapped = _unit(others @ random_orthogonal(others.shape[1], space.shape[1], [seed, images_are_space, number]))
        images, texts = (space, mapped) if images_are_space else (mapped, space)
        pairs.append(rank(images, texts, image_index))
        step()
    return pairs


def random_orthogonal(rows: int, columns: int, seed: int | list[int]) -> np.ndarray:
    """Haar-random, float64 (rows, columns): its rows or columns, the fewer, are orthonormal (Mezzadri 2007)."""
    gaussian = np.random.default_rng(seed).standard_normal((max(rows, columns), min(rows, columns)))
    basis, upper = np.linalg.qr(gaussian)
    basis *= np.sign(np.diag(upper))
    return basis if rows >= columns else basis.T


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise MetricsError("features that are not finite, or zero, have no direction; verify the store")
    return features / norms
