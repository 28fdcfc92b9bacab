"""Text -> pictures and picture -> captions over an embeddings file."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from configs import OnceoverError
from retrieval.embeddings import Embeddings
from retrieval.index import exact_search

MODES = ("text2image", "image2text")


class SearchError(OnceoverError):
    """A query that gives no usable embedding, or nothing to search."""


@dataclass(frozen=True)
class Hit:
    """One result: a picture with its captions (text2image), or a caption with its picture (image2text).

    ``score`` is the cosine similarity; ``image_row`` the picture's row in the embeddings file.
    """

    rank: int
    score: float
    id: str
    path: str
    captions: list[str]
    image_row: int

    def to_dict(self) -> dict:
        """The hit as plain values."""
        return asdict(self)


def check_query(query: str, mode: str) -> None:
    """Refuses a query that cannot be meant for ``mode``, before any model is loaded.

    Raises:
        SearchError: an empty query, a sentence where a picture's path is wanted, or a picture where a sentence is.
    """
    if not query.strip():
        raise SearchError("the query is empty; give a sentence or a picture's path")
    is_file = os.path.isfile(query)  # noqa: PTH113 (False, not an error, for a text too long to be a path)
    if mode == "image2text" and not is_file:
        what = "is a folder" if os.path.isdir(query) else "is no file"  # noqa: PTH112
        raise SearchError(
            f"{query[:200]!r} {what}; image2text takes a picture's path (for a sentence: --mode text2image)"
        )
    if mode == "text2image" and is_file and "." in query:
        raise SearchError(f"{query!r} is a file; to search by a picture, add --mode image2text")


class Searcher:
    """Searches a gallery again and again.

    Args:
        embeddings: the gallery.
        embed_query: turns a query (a sentence, a picture's path) into a unit vector, float32 (D,).
        split: search the pictures and captions of this split alone.
    """

    def __init__(self, embeddings: Embeddings, embed_query: Callable[[str], np.ndarray], split: str | None = None):
        self._embeddings, self._embed_query = embeddings, embed_query
        if split is None:
            self._pictures, self._captions = np.arange(len(embeddings.ids)), np.arange(len(embeddings.captions))
        else:
            self._pictures, self._captions, _ = embeddings.split(split)

    def search(self, query: str, mode: str, top_k: int = 5) -> list[Hit]:
        """The best ``top_k`` hits, best first; fewer where the gallery is smaller.

        Raises:
            SearchError: ``top_k`` below 1, an empty query, or one whose embedding is not finite.
        """
        if mode not in MODES:
            raise SearchError(f"unknown mode {mode!r}; use {' or '.join(MODES)}")
        if top_k < 1:
            raise SearchError(f"top-k is {top_k}; ask for at least 1 hit")
        check_query(query, mode)
        vector = self._embed_query(query)
        if not np.isfinite(vector).all():
            raise SearchError("the query's embedding is not finite; the heads have diverged: fit again")
        rows, gallery = self._pictures, self._embeddings.images
        if mode == "image2text":
            rows, gallery = self._captions, self._embeddings.texts
        scores, found = exact_search(gallery[rows], vector[None], top_k)
        return [
            self._hit(place, float(score), int(rows[row]), mode)
            for place, (score, row) in enumerate(zip(scores[0], found[0], strict=True), 1)
        ]

    def _hit(self, place: int, score: float, row: int, mode: str) -> Hit:
        store = self._embeddings
        if mode == "text2image":
            picture = row
            captions = [store.captions[caption] for caption in np.flatnonzero(store.image_index == picture)]
        else:
            picture, captions = int(store.image_index[row]), [store.captions[row]]
        return Hit(place, score, store.ids[picture], store.paths[picture], captions, picture)
