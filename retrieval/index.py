"""Exact inner-product search with faiss. The only importer of faiss."""

import faiss
import numpy as np


def exact_search(gallery: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` rows of ``gallery`` with the largest inner products, best first; all of them where k is larger.

    Args:
        gallery: float32 (N, D). queries: float32 (Q, D).

    Returns:
        Scores float32 (Q, min(k, N)) and rows int64 (Q, min(k, N)).
    """
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(np.ascontiguousarray(gallery, dtype=np.float32))
    return index.search(np.ascontiguousarray(queries, dtype=np.float32), min(k, len(gallery)))
