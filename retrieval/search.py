"""Search: finds the items of a gallery that are nearest to a text, an image, or both together.

Load once, then search in milliseconds::

    from onceover.heads.checkpoint import load_run
    from onceover.heads.query import QueryEmbedder
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.search import Query, Searcher

    images = read_embeddings("runs/first/embeddings.h5").gallery("image")  # or Index("runs/first/index/images")
    searcher = Searcher(images, QueryEmbedder(load_run("runs/first")))
    for hit in searcher.search("a dog playing in the park", top_k=5):
        print(hit.rank, hit.score, hit.path, hit.captions)
    searcher.search(Query(text="in the snow", image="dog.jpg", weight=0.4))
"""

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import BinaryIO, Protocol

import numpy as np

from onceover.base.addresses import is_address
from onceover.base.errors import OnceoverError
from onceover.base.progress import warn
from onceover.extract.pictures import read_picture
from onceover.retrieval.gallery import facing_bias

AT_ONCE = 256  # queries searched together
MAX_QUERY = 10_000  # characters of a line of queries
_IMAGE_NAME = re.compile(r"\S+\.(jpe?g|png|gif|bmp|webp|tiff?)", re.IGNORECASE)
_EQUAL = 1e-5  # copies have the same score, up to rounding


class SearchError(OnceoverError):
    """A query that gives no usable embedding, or nothing to search."""


@dataclass(frozen=True)
class Query:
    """A text, an image file's path, or both: then the text counts ``weight`` and the image the rest."""

    text: str | None = None
    image: str | None = None
    weight: float = 0.5

    @property
    def kind(self) -> str:
        """``text``, ``image`` or ``both``."""
        if self.text is None:
            return "image"
        if self.image is None:
            return "text"
        return "both"


@dataclass(frozen=True)
class Hit:
    """One result: an image with its captions, or a caption with its image (if it has one).

    Attributes:
        score: the cosine similarity, less the gallery's correction for hubs.
        same: ids of further items that look the same (copies of an image, equal captions) and are not shown again.
        thumbnail: a small JPEG, where the searcher was asked for thumbnails and the gallery has them.
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

    def item(self, row: int) -> dict:
        """The id, path, captions and thumbnail of a row, for a hit."""

    def without_thumbnails(self) -> "Searchable":
        """The same gallery, whose items come without their thumbnails."""


class Embedder(Protocol):
    """Turns queries into unit vectors: ``heads.query.QueryEmbedder``."""

    space: str

    def embed_texts(self, texts: Sequence[str], /) -> np.ndarray:
        """Unit vectors of texts, float32 (Q, D)."""

    def embed_images(self, paths: Sequence[str], /) -> np.ndarray:
        """Unit vectors of image files."""

    def embed_mixed(self, texts: Sequence[str], paths: Sequence[str], weight: float, /) -> np.ndarray:
        """Unit vectors of pairs of a text and an image file."""


def check_query(query: str, mode: str) -> None:
    """Refuses a query that cannot be meant for ``mode``, before any model is loaded.

    Raises:
        SearchError: an empty query, a text where an image's path is wanted, an image where a text is, or bytes that
            are no text.
    """
    if not query.strip():
        raise SearchError("the query is empty; give a text or an image's path")
    if mode == "image2text":
        _check_image_query(query)
    else:
        _check_text_query(query)


def _check_image_query(query: str) -> None:
    if is_address(query):  # it is looked for when it is read
        return
    if os.path.isfile(query):  # noqa: PTH113 (False, not an error, for a text too long to be a path)
        return
    problem = "is no file"
    if os.path.isdir(query):  # noqa: PTH112
        problem = "is a folder"
    raise SearchError(f"{query[:200]!r} {problem}; image2text takes an image's path (for a text: --mode text2image)")


def _check_text_query(query: str) -> None:
    _check_encoding(query)
    is_file = os.path.isfile(query)  # noqa: PTH113
    if is_file and "." in query:
        raise SearchError(f"{query!r} is a file; to search by an image, add --mode image2text")
    if is_address(query) and _IMAGE_NAME.fullmatch(query.strip()):
        raise SearchError(f"{query[:200]!r} is an address; to search by an image, add --mode image2text")
    if not is_file and _IMAGE_NAME.fullmatch(query.strip()):
        raise SearchError(f"there is no file {query!r}; to search by an image, give its path and --mode image2text")


def _check_encoding(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SearchError(
            f"the query {text[:60]!r} holds bytes that are no UTF-8; write it in UTF-8, or use another terminal"
        ) from error


def read_queries(file: BinaryIO, name: str) -> Iterator[str]:
    """Yields queries, one a line, as they are read; empty lines are left out, and counted at the end.

    Raises:
        SearchError: no UTF-8, a line longer than ``MAX_QUERY`` characters, or no queries.
    """
    lines = io.TextIOWrapper(file, encoding="utf-8-sig")
    number = 0
    queries = 0
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
        warn(f"empty lines left out: {number - queries}")


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
        if not thumbnails:
            gallery = gallery.without_thumbnails()
        self._gallery = gallery
        self._embedder = embedder

    def search(self, query: Query | str, top_k: int = 5) -> list[Hit]:
        """Finds the best ``top_k`` hits, best first, none that looks like an earlier one; fewer where there are fewer.

        A plain string is a text.

        Raises:
            SearchError: ``top_k`` below 1, or a query without content or with a weight outside [0, 1].
        """
        return self.search_many([query], top_k)[0]

    def search_many(self, queries: Sequence[Query | str], top_k: int = 5) -> list[list[Hit]]:
        """Finds the hits of each query; queries are encoded in batches."""
        asked = [Query(text=query) if isinstance(query, str) else query for query in queries]
        if top_k < 1:
            raise SearchError(f"top-k is {top_k}; ask for at least 1 hit")
        vectors = self._embed(asked)
        if self._gallery.biased:
            vectors = facing_bias(vectors)
        results: list[list[Hit]] = []
        for start in range(0, len(vectors), AT_ONCE):
            results += self._search_vectors(vectors[start : start + AT_ONCE], top_k)
        return results

    def _search_vectors(self, vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        """Finds hits for some vectors; asks for more rows until they hold ``top_k`` and all copies of these hits."""
        results: list[list[Hit]] = [[] for _ in vectors]
        unfinished = np.arange(len(vectors))
        rows_wanted = top_k
        while len(unfinished):
            rows_wanted = min(2 * rows_wanted, len(self._gallery))
            is_all = rows_wanted == len(self._gallery)
            short = []
            nearest = self._gallery.search(vectors[unfinished], rows_wanted)
            for number, (scores, rows) in zip(unfinished, nearest, strict=True):
                groups = self._group_copies(rows.tolist(), top_k)
                if is_all or _is_complete(groups, scores, top_k):
                    results[number] = self._hits(groups, scores, rows)
                else:
                    short.append(number)
            unfinished = np.array(short, int)
        return results

    def _group_copies(self, rows: list[int], top_k: int) -> list[list[int]]:
        """Groups positions in ``rows`` by content, for the first ``top_k`` different contents, best first."""
        groups: dict[str, list[int]] = {}
        for position, content in enumerate(self._gallery.contents_of(rows)):
            if content in groups or len(groups) < top_k:
                groups.setdefault(content, []).append(position)
        return list(groups.values())

    def _hits(self, groups: list[list[int]], scores: np.ndarray, rows: np.ndarray) -> list[Hit]:
        hits = []
        for rank, (first, *copies) in enumerate(groups, 1):
            same = [self._gallery.item(int(rows[position]))["id"] for position in copies]
            hits.append(Hit(rank, float(scores[first]), **self._gallery.item(int(rows[first])), same=same))
        return hits

    def _embed(self, queries: Sequence[Query]) -> np.ndarray:
        """Vectors of the queries, float32 (Q, D); those of the same kind and weight are embedded together."""
        numbers_of: dict[tuple[str, float], list[int]] = {}
        for number, query in enumerate(queries):
            _check_content(query)
            weight = query.weight if query.kind == "both" else 0.0
            numbers_of.setdefault((query.kind, weight), []).append(number)
        if not numbers_of:
            return np.empty((0, 0), np.float32)
        blocks = []
        order: list[int] = []
        for (kind, weight), numbers in numbers_of.items():
            blocks.append(self._embed_alike([queries[number] for number in numbers], kind, weight))
            order += numbers
        return np.concatenate(blocks)[np.argsort(order)]

    def _embed_alike(self, queries: Sequence[Query], kind: str, weight: float) -> np.ndarray:
        """Vectors of queries of one kind and weight, float32 (Q, D)."""
        texts = [query.text or "" for query in queries]
        images = [query.image or "" for query in queries]
        if kind == "both":
            return self._embedder.embed_mixed(texts, images, weight)
        if kind == "image":
            return self._embedder.embed_images(images)
        return self._embedder.embed_texts(texts)


def _check_content(query: Query) -> None:
    """Refuses a query without content, of bytes that are no text, or with a weight outside [0, 1]."""
    if not (query.text or query.image):
        raise SearchError("the query is empty; give a text or an image's path")
    _check_encoding(query.text or "")
    if not 0 <= query.weight <= 1:
        raise SearchError(f"the weight is {query.weight}; it is the text's share, 0 to 1")


def _is_complete(groups: list[list[int]], scores: np.ndarray, top_k: int) -> bool:
    """Whether there are ``top_k`` groups, and the last score is so low that no copy of theirs can follow."""
    if len(groups) < top_k:
        return False
    first_of_last_group = groups[-1][0]
    return bool(scores[-1] < scores[first_of_last_group] - _EQUAL)


def checked_batches(queries: Iterable[str], mode: str, other: str | None) -> Iterator[list[str]]:
    """Checks queries against ``mode`` and yields them in batches that are searched together."""
    opposite = {"text2image": "image2text", "image2text": "text2image"}
    if other is not None:
        check_query(other, opposite[mode])
        if mode == "text2image":
            read_picture(other)
    remaining = iter(queries)
    while batch := list(islice(remaining, AT_ONCE)):
        for query in batch:
            check_query(query, mode)
        if mode == "image2text":
            for path in batch:
                read_picture(path)
        yield batch
