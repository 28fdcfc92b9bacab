"""Galleries: the images or captions that a search goes through, in memory, with what a hit shows of each."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from onceover.base.columns import LazyColumn
from onceover.base.temporary import temporary_array, temporary_rows
from onceover.base.texts import Texts
from onceover.extract.store import FeatureStore, caption_ids

NOUNS = {"image": "images", "text": "captions"}  # what a gallery holds, by its kind
BLOCK = 8192  # rows copied at a time
IN_MEMORY = 256 * 2**20  # bytes of vectors with a bias up to which they need no temporary file


@dataclass(frozen=True)
class Gallery:
    """N images, or N captions, in memory, searched exactly.

    Attributes:
        kind: ``image`` or ``text``.
        vectors: float32 (N, D): unit vectors, with their bias as one more coordinate where ``biased``.
        ids: the images' or captions' ids.
        paths: the images' paths, "" for a caption that has none.
        captions: for each item its captions, or the caption that it is.
        contents: equal for items that look the same to a reader: SHA-256 of an image, text of a caption.
        thumbnails: JPEGs of the images, or None.
        space: names the heads and encoders that made the vectors.
    """

    kind: str
    vectors: np.ndarray
    biased: bool
    ids: Sequence[str]
    paths: Sequence[str]
    captions: Sequence[list[str]]
    contents: Sequence[str]
    thumbnails: Sequence[bytes] | None
    space: str

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and rows, best first, for each of the queries, float32 (Q, D) with a 1 for the bias where biased."""
        from onceover.retrieval.exact import exact_search  # with faiss, which figures do without

        return list(zip(*exact_search(self.vectors, queries, k), strict=True))

    def contents_of(self, rows: list[int]) -> list[str]:
        """For each of the rows a string that is equal for items that look the same."""
        return [self.contents[row] for row in rows]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    def row_of(self, name: str) -> int | None:
        """The row of the item with this id, or None where there is none."""
        return self._rows.get(name)

    def vector(self, row: int) -> np.ndarray:
        """The vector of a row without its bias, float32 (D,)."""
        return self.vectors[row, :-1] if self.biased else self.vectors[row]

    def item(self, row: int) -> dict:
        """The id, path and captions of a row."""
        return {"id": self.ids[row], "path": self.paths[row], "captions": self.captions[row]}

    def items(self, rows: list[int]) -> list[dict]:
        """The id, path and captions of each of some rows, for hits."""
        return [self.item(row) for row in rows]

    def thumbnail(self, row: int) -> bytes | None:
        """A small JPEG of a row's image, where there is one."""
        return None if self.thumbnails is None else self.thumbnails[row] or None

    def take(self, rows: np.ndarray) -> "Gallery":
        """Some of the items; thumbnails are read when one is asked for.

        Raises:
            TemporaryFileError: there is no room for a temporary file.
        """
        numbers = np.asarray(rows).tolist()
        thumbnails = None
        if self.thumbnails is not None:
            thumbnails = LazyRows(self.thumbnails.__getitem__, numbers)
        return replace(
            self,
            vectors=temporary_rows(self.vectors, rows, np.float32, IN_MEMORY),
            ids=[self.ids[row] for row in numbers],
            paths=[self.paths[row] for row in numbers],
            captions=[self.captions[row] for row in numbers],
            contents=[self.contents[row] for row in numbers],
            thumbnails=thumbnails,
        )


class LazyRows(LazyColumn[bytes]):
    """Values that are read when they are asked for: ``read(key)`` for each of some keys."""

    def __init__(self, read: Callable[[Any], bytes], keys: list):
        self._read = read
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def values_of(self, rows: Iterable[int]) -> Iterator[bytes]:
        """The values of rows that are given by their numbers, from 0."""
        return (self._read(self._keys[row]) for row in rows)


class CaptionLists(LazyColumn[list[str]]):
    """The captions of each item, a list for each, which are looked up when they are asked for."""

    def __init__(self, captions: Sequence[str], item_of: np.ndarray, items: int):
        """``item_of``: int (M,), the item of each caption, −1 for a caption without one."""
        self._captions = captions
        self._order = np.argsort(item_of, kind="stable")
        self._bounds = np.searchsorted(item_of, np.arange(items + 1), sorter=self._order)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def values_of(self, rows: Iterable[int]) -> Iterator[list[str]]:
        """The captions of items that are given by their numbers, from 0."""
        for item in rows:
            own = self._order[self._bounds[item] : self._bounds[item + 1]]
            yield [self._captions[row] for row in own.tolist()]


@dataclass(frozen=True)
class Items:
    """N images and M captions, with what a hit shows of them.

    Attributes:
        ids, paths, sha256: of the images. thumbnails: of the images, or None.
        captions: texts. image_index: int (M,), each caption's image, -1 for a caption without one.
    """

    ids: Sequence[str]
    paths: Sequence[str]
    sha256: Sequence[str]
    captions: Sequence[str]
    image_index: np.ndarray
    thumbnails: Sequence[bytes] | None

    def gallery(self, kind: str, vectors: np.ndarray, bias: np.ndarray | None, space: str) -> Gallery:
        """The images (``kind`` image) or captions (text) as a gallery.

        Args:
            vectors: float32, one row an item. bias: float32, one number an item, or None.

        Raises:
            TemporaryFileError: there is no room for a temporary file.
        """
        is_biased = bias is not None
        if bias is not None:
            vectors = with_bias(vectors, bias)
        if kind == "text":
            return self._caption_gallery(vectors, is_biased, space)
        captions = CaptionLists(self.captions, self.image_index, len(self.ids))
        return Gallery("image", vectors, is_biased, self.ids, self.paths, captions, self.sha256, self.thumbnails, space)

    def _caption_gallery(self, vectors: np.ndarray, is_biased: bool, space: str) -> Gallery:
        paths = Texts("" if image < 0 else self.paths[image] for image in self.image_index.tolist())
        names = Texts(caption_ids(self.ids, self.image_index) if self.ids else _text_ids(self.captions))
        captions = CaptionLists(self.captions, np.arange(len(self.captions)), len(self.captions))
        return Gallery("text", vectors, is_biased, names, paths, captions, self.captions, None, space)


def gallery_of_store(
    store: FeatureStore, kind: str, vectors: np.ndarray, bias: np.ndarray | None, space: str
) -> Gallery:
    """The images or captions of any store as a gallery, with the vectors that heads have made of their features.

    Raises:
        TemporaryFileError: there is no room for a temporary file.
    """
    items = Items(
        ids=store.image_ids,
        paths=store.image_paths,
        sha256=store.sha256,
        captions=store.captions,
        image_index=store.image_index,
        thumbnails=store.thumbnails(),
    )
    return items.gallery(kind, vectors, bias, space)


def facing_bias(queries: np.ndarray, shares: np.ndarray | None = None) -> np.ndarray:
    """Queries (Q, D) with one more coordinate, to meet the bias of a gallery's items; float32 stays float32.

    Args:
        shares: float32 (Q,), how much of the bias each query meets; by default all of it.
    """
    if shares is None:
        shares = np.ones(len(queries), np.float32)
    return np.column_stack([queries, shares])


def with_bias(vectors: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Vectors with their bias as one more coordinate: in memory, or in a mapped temporary file where they are many.

    Raises:
        TemporaryFileError: there is no room for a temporary file.
    """
    joined = temporary_array((len(vectors), vectors.shape[1] + 1), np.float32, IN_MEMORY)
    for start in range(0, len(vectors), BLOCK):
        rows = slice(start, start + BLOCK)
        joined[rows, :-1] = vectors[rows]
        joined[rows, -1] = bias[rows]
    return joined


def _text_ids(texts: Sequence[str]) -> list[str]:
    """A stable id for each text: the beginning of its SHA-256, and a number where it occurs several times."""
    seen: Counter[str] = Counter()
    names = []
    for text in texts:
        name = hashlib.sha256(text.encode()).hexdigest()[:12]
        names.append(f"{name}#{seen[name]}")
        seen[name] += 1
    return names
