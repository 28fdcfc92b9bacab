"""Rows of a feature store: the captions of some images, and where rows stand in a subset. numpy only."""

import numpy as np


def captions_of(image_index: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Rows of the captions of some images, ascending: int64 (T,).

    Args:
        image_index: int64 (M,), the image of each caption of the store.
        images: int64 (P,), rows of images.
    """
    return np.flatnonzero(np.isin(image_index, images))


def positions_in_group(groups: np.ndarray) -> np.ndarray:
    """The position of each item within its group: int64 (n,); ``groups`` (n,) ascending.

    >>> positions_in_group(np.array([4, 4, 4, 7, 9, 9])).tolist()
    [0, 1, 2, 0, 0, 1]
    """
    starts = np.r_[0, np.flatnonzero(np.diff(groups)) + 1]
    sizes = np.diff(np.r_[starts, len(groups)])
    return np.arange(len(groups)) - np.repeat(starts, sizes)


def positions_in(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The position in ``order`` of each of ``rows``: int64 (n,); ``order`` holds all of them, each once.

    >>> positions_in(np.array([5, 5, 8]), np.array([8, 2, 5])).tolist()
    [2, 2, 0]
    """
    ascending = np.argsort(order)
    return ascending[np.searchsorted(order[ascending], rows)]
