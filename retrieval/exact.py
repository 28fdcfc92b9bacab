"""Exact search: the rows of a gallery with the largest inner products."""

from typing import Any

import numpy as np

from onceover.base.errors import OnceoverError


class QueryError(OnceoverError):
    """Queries that cannot be searched with."""


def load_faiss() -> Any:
    """Loads faiss, which fits and encodings do without, and returns it."""
    import faiss

    # queries above which faiss multiplies matrices with BLAS (default: 128,000); with 4 it is five times as fast
    faiss.cvar.distance_compute_blas_threshold = 4
    return faiss


def exact_search(gallery: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the ``k`` rows of ``gallery`` with the largest inner products, best first; all of them where k is larger.

    Args:
        gallery: float (N, D). queries: float (Q, D). They are compared in float32.

    Returns:
        Scores float32 (Q, min(k, N)) and rows int64 (Q, min(k, N)).

    Raises:
        QueryError: queries of another shape, or that are not finite.
    """
    faiss = load_faiss()
    queries = checked_queries(queries, gallery.shape[1])
    rows = np.ascontiguousarray(gallery, dtype=np.float32)
    return faiss.knn(queries, rows, min(k, len(gallery)), metric=faiss.METRIC_INNER_PRODUCT)


def checked_queries(queries: np.ndarray, dim: int) -> np.ndarray:
    """Returns queries as contiguous float32 (Q, ``dim``).

    Raises:
        QueryError: another shape, or numbers that are not finite, for which faiss would return the row -1.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise QueryError(f"queries of shape {queries.shape} do not fit a gallery of {dim} dimensions")
    if not np.isfinite(queries).all():
        raise QueryError("a query's embedding is not finite; the heads have diverged: fit again")
    return queries
