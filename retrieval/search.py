"""Sentences, images, or both together -> hits of a gallery.

Load once, then search in milliseconds::

    from onceover.heads.checkpoint import load_run
    from onceover.heads.query import QueryEmbedder
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.search import Query, Searcher

    images = read_embeddings("runs/first/embeddings.h5").gallery("image")  # or Index("runs/first/index/images")
    searcher = Searcher(images, QueryEmbedder(load_run("runs/first")))
    for hit in searcher.search("a dog playing in the park", top_k=5):
        print(hit.rank, hit.score, hit.path, hit.captions)
    searcher.search(Query(sentence="in the snow", picture="dog.jpg", weight=0.4))
"""

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import BinaryIO, Protocol

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.retrieval.embeddings import Gallery, facing_bias

_A_PICTURES_NAME = re.compile(r"\S+\.(jpe?g|png|gif|bmp|webp|tiff?)", re.IGNORECASE)
AT_ONCE = 256  # queries searched together
MAX_QUERY = 10_000  # characters of a line of queries
_EQUAL = 1e-5  # copies have the same score, but for the arithmetic


class SearchError(OnceoverError):
    """A query that gives no usable embedding, or nothing to search."""


@dataclass(frozen=True)
class Query:
    """A sentence, an image file's path, or both: then the sentence counts ``weight`` and the image the rest."""

    sentence: str | None = None
    picture: str | None = None
    weight: float = 0.5


@dataclass(frozen=True)
class Hit:
    """One result: an image with its captions, or a caption with its image (if it has one).

    ``score`` is the cosine similarity, less what the gallery's correction for hubs takes off; ``same`` lists the ids
    of further items that look the same (copies of an image, the same sentence) and are not shown again.
    ``thumbnail`` is a small JPEG, where the searcher was asked for thumbnails and the gallery has them.
    """

    rank: int
    score: float
    id: str
    path: str
    captions: list[str]
    same: list[str] = field(default_factory=list)
    thumbnail: bytes | None = field(default=None, repr=False)

    def to_dict(self) -> dict:
        """The hit as plain values, without its thumbnail."""
        values = asdict(self)
        del values["thumbnail"]
        return values


class Searchable(Protocol):
    """What ``retrieval.embeddings.Gallery``, exact, and ``retrieval.index.Index``, on disk, have in common."""

    kind: str
    biased: bool
    space: str

    def __len__(self) -> int: ...

    def search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and rows of the best ``k``, for each query."""

    def contents_of(self, rows: list[int]) -> list[str]:
        """For each of the rows what is equal where two look the same."""

    def item(self, row: int) -> dict:
        """What a hit shows of a row."""

    def without_thumbnails(self) -> "Searchable":
        """The same, whose items come without thumbnails; not of a ``Gallery``."""


def _without_thumbnails(gallery: Searchable) -> Searchable:
    return replace(gallery, thumbnails=None) if isinstance(gallery, Gallery) else gallery.without_thumbnails()


class Embedder(Protocol):
    """What turns queries into unit vectors: ``heads.query.QueryEmbedder``."""

    space: str
    sentences: Callable[[Sequence[str]], np.ndarray]
    pictures: Callable[[Sequence[str]], np.ndarray]
    mixed: Callable[[Sequence[str], Sequence[str], float], np.ndarray]


def check_query(query: str, mode: str) -> None:
    """Refuses a query that cannot be meant for ``mode``, before any model is loaded.

    Raises:
        SearchError: an empty query, a sentence where an image's path is wanted, an image where a sentence is, or
            bytes that are no text.
    """
    if not query.strip():
        raise SearchError("the query is empty; give a sentence or an image's path")
    if mode == "text2image":
        _check_text(query)
    is_file = os.path.isfile(query)  # noqa: PTH113 (False, not an error, for a text too long to be a path)
    if mode == "image2text" and not is_file:
        what = "is a folder" if os.path.isdir(query) else "is no file"  # noqa: PTH112
        raise SearchError(
            f"{query[:200]!r} {what}; image2text takes an image's path (for a sentence: --mode text2image)"
        )
    if mode == "text2image" and not is_file and _A_PICTURES_NAME.fullmatch(query.strip()):
        raise SearchError(f"there is no file {query!r}; to search by an image, give its path and --mode image2text")
    if mode == "text2image" and is_file and "." in query:
        raise SearchError(f"{query!r} is a file; to search by an image, add --mode image2text")


def read_queries(file: BinaryIO, name: str, say: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """Queries, one a line, as they are read; empty lines are left out, and counted at the end.

    Raises:
        SearchError: no UTF-8, a line longer than ``MAX_QUERY`` characters, or no queries.
    """
    lines = io.TextIOWrapper(file, encoding="utf-8-sig")
    number = queries = 0
    try:
        while line := lines.readline(MAX_QUERY + 2):
            number += 1
            if len(line.rstrip("\n")) > MAX_QUERY:
                raise SearchError(
                    f"{name}, line {number:,} has more than {MAX_QUERY:,} characters; write one query a line"
                )
            if query := line.strip():
                queries += 1
                yield query
    except UnicodeDecodeError as error:
        raise SearchError(f"{name} is not UTF-8; convert it, for example with iconv") from error
    finally:
        lines.detach()
    if not queries:
        raise SearchError(f"{name} holds no queries; write one a line")
    if number > queries:
        say(f"empty lines left out: {number - queries}")


def _check_text(sentence: str) -> None:
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise SearchError(
            f"the query {sentence[:60]!r} holds bytes that are no UTF-8; write it in UTF-8, or use another terminal"
        ) from error


class Searcher:
    """Searches one gallery again and again.

    Args:
        gallery: a ``Gallery`` or an ``Index``.
        embedder: of the run that made the gallery.
        thumbnails: read the thumbnails of hits, too.

    Raises:
        SearchError: the gallery is empty, or was made by other heads or encoders.
    """

    def __init__(self, gallery: Searchable, embedder: Embedder, thumbnails: bool = False):
        if gallery.space != embedder.space:
            raise SearchError(
                "the gallery was made by other heads or encoders than the run's; build it again with this run"
            )
        if not len(gallery):
            raise SearchError("the gallery is empty")
        self._gallery = gallery if thumbnails else _without_thumbnails(gallery)
        self._embedder = embedder

    def search(self, query: Query | str, top_k: int = 5) -> list[Hit]:
        """The best ``top_k`` hits, best first, none that looks like an earlier one; fewer where there are fewer.

        A plain string is a sentence.

        Raises:
            SearchError: ``top_k`` below 1, or a query without content or with a weight outside [0, 1].
        """
        return self.search_many([query], top_k)[0]

    def search_many(self, queries: Sequence[Query | str], top_k: int = 5) -> list[list[Hit]]:
        """The hits of each query; what is encoded is encoded in batches."""
        queries = [Query(sentence=query) if isinstance(query, str) else query for query in queries]
        if top_k < 1:
            raise SearchError(f"top-k is {top_k}; ask for at least 1 hit")
        vectors = self._embedded(queries)
        if self._gallery.biased:
            vectors = facing_bias(vectors)
        results: list[list[Hit]] = []
        for start in range(0, len(vectors), AT_ONCE):
            results += self._found(vectors[start : start + AT_ONCE], top_k)
        return results

    def _found(self, vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        """The hits of some queries; more rows are asked for until they hold ``top_k`` and all of these hits' copies."""
        results: list[list[Hit]] = [[] for _ in vectors]
        open_, wanted = np.arange(len(vectors)), top_k
        while len(open_):
            wanted = min(2 * wanted, len(self._gallery))
            short = []
            for number, (scores, rows) in zip(open_, self._gallery.search(vectors[open_], wanted), strict=True):
                groups = self._groups(rows.tolist(), top_k)
                last = groups[-1][0] if len(groups) == top_k else None
                if wanted < len(self._gallery) and (last is None or scores[-1] >= scores[last] - _EQUAL):
                    short.append(number)
                else:
                    results[number] = self._hits(groups, scores, rows)
            open_ = np.array(short, int)
        return results

    def _groups(self, rows: list[int], top_k: int) -> list[list[int]]:
        """Places in ``rows`` of what looks the same, for the first ``top_k`` different contents, best first."""
        groups: dict[str, list[int]] = {}
        for place, content in enumerate(self._gallery.contents_of(rows)):
            if content in groups or len(groups) < top_k:
                groups.setdefault(content, []).append(place)
        return list(groups.values())

    def _hits(self, groups: list[list[int]], scores: np.ndarray, rows: np.ndarray) -> list[Hit]:
        hits = []
        for rank, (first, *others) in enumerate(groups, 1):
            same = [self._gallery.item(int(rows[place]))["id"] for place in others]
            hits.append(Hit(rank, float(scores[first]), **self._gallery.item(int(rows[first])), same=same))
        return hits

    def _embedded(self, queries: Sequence[Query]) -> np.ndarray:
        """float32 (Q, D); queries of the same kind and weight are embedded together."""
        groups: dict[tuple, list[int]] = {}
        for number, query in enumerate(queries):
            if not (query.sentence or query.picture):
                raise SearchError("the query is empty; give a sentence or an image's path")
            _check_text(query.sentence or "")
            if not 0 <= query.weight <= 1:
                raise SearchError(f"the weight is {query.weight}; it is the sentence's share, 0 to 1")
            both = query.sentence is not None and query.picture is not None
            groups.setdefault((query.sentence is None, both, query.weight if both else 0), []).append(number)
        parts = []
        for (picture_alone, both, weight), numbers in groups.items():
            sentences, pictures = ([getattr(queries[n], side) for n in numbers] for side in ("sentence", "picture"))
            if both:
                parts.append(self._embedder.mixed(sentences, pictures, weight))
            else:
                parts.append(
                    self._embedder.pictures(pictures) if picture_alone else self._embedder.sentences(sentences)
                )
        order = np.argsort(np.concatenate(list(groups.values())) if groups else np.empty(0, int))
        return np.concatenate(parts)[order] if parts else np.empty((0, 0), np.float32)
