"""Search: finds the items of a gallery that are nearest to a query: texts and images, added and subtracted.

Load once, then search in milliseconds::

    from onceover.heads.checkpoint import load_run
    from onceover.heads.query import QueryEmbedder
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.search import Query, Searcher, Term

    images = read_embeddings("runs/first/embeddings.h5").gallery("image")  # or Index("runs/first/index/images")
    searcher = Searcher(images, QueryEmbedder(load_run("runs/first")))
    for hit in searcher.search("a dog playing in the park", top_k=5):
        print(hit.rank, hit.score, hit.path, hit.captions)
    searcher.search(Query((Term(text="in the snow", weight=0.4), Term(image="dog.jpg", weight=0.6))))
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import read_bytes
from onceover.extract.pictures import MAX_BYTES, named_errors
from onceover.retrieval.gallery import facing_bias

AT_ONCE = 256  # queries searched together
_EQUAL = 1e-5  # copies have the same score, up to rounding
_SHORTEST = 1e-6  # a sum of terms that is shorter, by the weights, has no direction


class SearchError(OnceoverError):
    """A query that gives no usable embedding, or nothing to search."""


@dataclass(frozen=True)
class Term:
    """One part of a query: a text, an image, or an item of the gallery; exactly one of the three is given.

    Attributes:
        image: the path or address of an image file, or the bytes of one.
        item: the id of an item of the gallery that is searched; its stored vector is taken.
        weight: its factor in the sum of the terms; a negative one subtracts.
        sha256: of the file that the bytes of ``image`` were made of, in hexadecimal, where they are not the file's own;
            an image of the gallery with these bytes is no hit.
    """

    text: str | None = None
    image: str | bytes | None = None
    item: str | None = None
    weight: float = 1.0
    sha256: str | None = None

    @property
    def source(self) -> tuple[str, str | bytes]:
        """What the term names: ``text``, ``image`` or ``item``, and its value.

        Raises:
            SearchError: none of the three, several of them, or an empty one.
        """
        values: dict[str, str | bytes | None] = {"text": self.text, "image": self.image, "item": self.item}
        given = [(kind, value) for kind, value in values.items() if value is not None]
        if len(given) > 1:
            raise SearchError(f"a term is a text, an image or an item; this one has {' and '.join(dict(given))}")
        if not given or not given[0][1]:
            raise SearchError("the query is empty; give a text or an image's path")
        return given[0]


@dataclass(frozen=True)
class Query:
    """A sum of terms: the vector of each one, of length 1, times its weight; the sum is scaled to length 1."""

    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Hit:
    """One result: an image with its captions, or a caption with its image (if it has one).

    Attributes:
        score: the cosine similarity, less the gallery's correction for hubs.
        same: ids of further items that look the same (copies of an image, equal captions) and are not shown again.
    """

    rank: int
    score: float
    id: str
    path: str
    captions: list[str]
    same: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The hit as plain values."""
        return asdict(self)


class Searchable(Protocol):
    """A gallery that can be searched: ``gallery.Gallery``, in memory, or ``index.Index``, on disk."""

    @property
    def kind(self) -> str:
        """``image`` or ``text``."""

    @property
    def biased(self) -> bool:
        """Whether a query gets a 1 as one more coordinate."""

    @property
    def space(self) -> str:
        """Names the heads and encoders that made the vectors."""

    def __len__(self) -> int: ...

    def search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and rows of the best ``k``, for each query."""

    def contents_of(self, rows: list[int]) -> list[str]:
        """For each of the rows a string that is equal for items that look the same."""

    def row_of(self, name: str) -> int | None:
        """The row of the item with this id, or None where there is none."""

    def vector(self, row: int) -> np.ndarray:
        """The vector of a row without its bias, float32 (D,)."""

    def items(self, rows: list[int]) -> list[dict]:
        """The id, path and captions of each of some rows, for hits."""


class Embedder(Protocol):
    """Turns queries into unit vectors: ``heads.query.QueryEmbedder``."""

    space: str

    def embed_texts(self, texts: Sequence[str], /) -> np.ndarray:
        """Unit vectors of texts, float32 (Q, D)."""

    def embed_images(self, images: Sequence[str | bytes], /) -> np.ndarray:
        """Unit vectors of image files, each by its path or its bytes."""


class Searcher:
    """Searches one gallery again and again.

    Args:
        gallery: a ``Gallery`` or an ``Index``.
        embedder: of the run that made the gallery.

    Raises:
        SearchError: the gallery is empty, or was made by other heads or encoders.
    """

    def __init__(self, gallery: Searchable, embedder: Embedder):
        if gallery.space != embedder.space:
            raise SearchError(
                "the gallery was made by other heads or encoders than the run's; build it again with this run"
            )
        if not len(gallery):
            raise SearchError("the gallery is empty")
        self._gallery = gallery
        self._embedder = embedder

    def search(self, query: Query | str, top_k: int = 5, min_score: float | None = None) -> list[Hit]:
        """Finds the best ``top_k`` hits, best first, none that looks like an earlier one; fewer where there are fewer.

        An item that looks like one of the query's terms (the same bytes of an image, the same text) is no hit.

        Args:
            query: a plain string is one text. min_score: leave out hits with a lower score.

        Raises:
            SearchError: ``top_k`` below 1, a query without content, or terms that cancel each other.
        """
        return self.search_many([query], top_k, min_score)[0]

    def search_many(
        self, queries: Sequence[Query | str], top_k: int = 5, min_score: float | None = None
    ) -> list[list[Hit]]:
        """Finds the hits of each query; all texts are encoded together, and all images."""
        asked = [Query((Term(text=query),)) if isinstance(query, str) else query for query in queries]
        if top_k < 1:
            raise SearchError(f"top-k is {top_k}; ask for at least 1 hit")
        check_min_score(min_score)
        if not asked:
            return []
        for query in asked:
            _check_query(query)
        vectors = self._embed(asked)
        if self._gallery.biased:
            shares = [_share_of_others(query, self._gallery.kind) for query in asked]
            vectors = facing_bias(vectors, np.array(shares, np.float32))
        results: list[list[Hit]] = []
        for start in range(0, len(asked), AT_ONCE):
            own = [self._contents_in(query) for query in asked[start : start + AT_ONCE]]
            results += self._search_vectors(vectors[start : start + AT_ONCE], own, top_k)
        if min_score is not None:
            return [at_least(hits, min_score) for hits in results]
        return results

    def _search_vectors(self, vectors: np.ndarray, own: list[set[str]], top_k: int) -> list[list[Hit]]:
        """Finds hits for some vectors; asks for more rows until they hold ``top_k`` and all copies of these hits.

        Args:
            own: for each vector the contents that its query shows itself; they are no hits.
        """
        results: list[list[Hit]] = [[] for _ in vectors]
        unfinished = np.arange(len(vectors))
        rows_wanted = top_k
        while len(unfinished):
            rows_wanted = min(2 * rows_wanted, len(self._gallery))
            is_all = rows_wanted == len(self._gallery)
            short = []
            nearest = self._gallery.search(vectors[unfinished], rows_wanted)
            for number, (scores, rows) in zip(unfinished, nearest, strict=True):
                groups = self._group_copies(rows.tolist(), own[number], top_k)
                if is_all or _is_complete(groups, scores, top_k):
                    results[number] = self._hits(groups, scores, rows)
                else:
                    short.append(number)
            unfinished = np.array(short, int)
        return results

    def _group_copies(self, rows: list[int], own: set[str], top_k: int) -> list[list[int]]:
        """Groups positions in ``rows`` by content, for the first ``top_k`` contents that are not own, best first."""
        groups: dict[str, list[int]] = {}
        for position, content in enumerate(self._gallery.contents_of(rows)):
            if content in own:
                continue
            if content in groups or len(groups) < top_k:
                groups.setdefault(content, []).append(position)
        return list(groups.values())

    def _hits(self, groups: list[list[int]], scores: np.ndarray, rows: np.ndarray) -> list[Hit]:
        positions = [position for group in groups for position in group]
        found = self._gallery.items(rows[positions].tolist())
        items = dict(zip(positions, found, strict=True))
        hits = []
        for rank, (first, *copies) in enumerate(groups, 1):
            same = [items[position]["id"] for position in copies]
            hits.append(Hit(rank, float(scores[first]), **items[first], same=same))
        return hits

    def _embed(self, queries: Sequence[Query]) -> np.ndarray:
        """Unit vectors of the queries, float32 (Q, D).

        Raises:
            SearchError: an item that the gallery does not hold, or terms that cancel each other.
        """
        sources = dict.fromkeys(term.source for query in queries for term in query.terms)
        vectors: dict[tuple[str, str | bytes], np.ndarray] = {}
        texts = [source for source in sources if source[0] == "text"]
        images = [source for source in sources if source[0] == "image"]
        if texts:
            vectors |= zip(texts, self._embedder.embed_texts([str(text) for _, text in texts]), strict=True)
        if images:
            vectors |= zip(images, self._embedder.embed_images([image for _, image in images]), strict=True)
        for source in sources:
            if source[0] == "item":
                vectors[source] = self._gallery.vector(self._row_of(source[1]))
        return np.stack([_weighted_sum(query, vectors) for query in queries])

    def _row_of(self, item: str | bytes) -> int:
        row = self._gallery.row_of(str(item))
        if row is None:
            raise SearchError(f"the gallery holds no item {item!r}; name one by the id that a hit has")
        return row

    def _contents_in(self, query: Query) -> set[str]:
        """The contents, as the gallery writes them, of the query's own terms."""
        contents = set()
        for term in query.terms:
            kind, value = term.source
            if kind == "item":
                contents.update(self._gallery.contents_of([self._row_of(value)]))
            elif kind == self._gallery.kind == "text":
                contents.add(str(value))
            elif kind == self._gallery.kind == "image":
                contents.add(term.sha256 or _sha256(value))
        return contents


def _share_of_others(query: Query, kind: str) -> float:
    """The share of a query's terms, by weight, that are of another kind than the gallery's.

    The biases of images are measured with captions, and those of captions with images: among images, an image meets
    none of them.
    """
    largest = max(abs(term.weight) for term in query.terms)
    weights = {True: 0.0, False: 0.0}
    for term in query.terms:
        is_same = term.source[0] in (kind, "item")
        weights[is_same] += abs(term.weight / largest)
    return weights[False] / (weights[False] + weights[True])


def _weighted_sum(query: Query, vectors: dict[tuple[str, str | bytes], np.ndarray]) -> np.ndarray:
    """The sum of a query's terms, scaled to length 1, float32 (D,).

    Args:
        vectors: by source of a term, float32 (D,), of length 1.

    Raises:
        SearchError: the terms cancel each other.
    """
    largest = max(abs(term.weight) for term in query.terms)
    first = vectors[query.terms[0].source]
    total = np.zeros(first.shape, np.float64)
    for term in query.terms:
        share = term.weight / largest  # so that the sum of huge or tiny weights is a number, too
        total += share * vectors[term.source].astype(np.float64)
    length = np.linalg.norm(total)
    if length < _SHORTEST * sum(abs(term.weight) / largest for term in query.terms):
        raise SearchError("the terms of the query cancel each other; change their weights")
    return (total / length).astype(np.float32)


def _sha256(image: str | bytes) -> str:
    """The SHA-256 of an image file, by its path, its address or its bytes."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    with named_errors(image):
        return hashlib.sha256(read_bytes(image, MAX_BYTES)).hexdigest()


def _check_query(query: Query) -> None:
    """Refuses a query without content, of bytes that are no text, or with a weight that cannot be summed."""
    if not query.terms:
        raise SearchError("the query is empty; give a text or an image's path")
    for term in query.terms:
        kind, value = term.source
        if kind == "text":
            check_encoding(str(value))
        if not math.isfinite(term.weight):
            raise SearchError(f"the weight of a term is {term.weight}; give a number")
    if not any(term.weight for term in query.terms):
        raise SearchError("all terms of the query have the weight 0; raise one")


def check_encoding(text: str) -> None:
    """Refuses a text that holds bytes that are no UTF-8.

    Raises:
        SearchError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SearchError(
            f"the query {text[:60]!r} holds bytes that are no UTF-8; write it in UTF-8, or use another terminal"
        ) from error


def at_least(hits: list[Hit], min_score: float) -> list[Hit]:
    """The hits that score ``min_score`` or more.

    Raises:
        SearchError: ``min_score`` is no finite number.
    """
    check_min_score(min_score)
    return [hit for hit in hits if hit.score >= min_score]


def check_min_score(min_score: float | None) -> None:
    """Refuses a least score that is no number, or an infinite one.

    Raises:
        SearchError: it is.
    """
    if min_score is not None and not math.isfinite(min_score):
        raise SearchError(f"the least score is {min_score}; give a number, such as 0.3")


def _is_complete(groups: list[list[int]], scores: np.ndarray, top_k: int) -> bool:
    """Whether there are ``top_k`` groups, and the last score is so low that no copy of theirs can follow."""
    if len(groups) < top_k:
        return False
    first_of_last_group = groups[-1][0]
    return bool(scores[-1] < scores[first_of_last_group] - _EQUAL)
