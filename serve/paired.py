"""A gallery whose queries may name items of the other kind, too: captions by an image, images by a caption."""

import numpy as np

from onceover.retrieval.search import Searchable


def item_name(kind: str, item: str) -> str:
    """The name of an item among those of both kinds, by its kind and its id."""
    return f"{kind}:{item}"


class Paired:
    """A gallery that also knows the items of another one by name; only its own items are hits.

    A row of the other gallery is counted from -1 downwards. Names are ``item_name``'s.

    Args:
        own: the gallery that is searched. other: the one of the other kind, where there is one.
    """

    def __init__(self, own: Searchable, other: Searchable | None = None):
        self._own = own
        self._other = other
        self.kind = own.kind
        self.biased = own.biased
        self.space = own.space

    def __len__(self) -> int:
        return len(self._own)

    def search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and rows of the best ``k`` of its own items, for each query."""
        return self._own.search(queries, k)

    def contents_of(self, rows: list[int]) -> list[str]:
        """For each of the rows a string that is equal for items that look the same."""
        if min(rows, default=0) >= 0:
            return self._own.contents_of(rows)
        return ["" if row < 0 else self._own.contents_of([row])[0] for row in rows]

    def row_of(self, name: str) -> int | None:
        """The row of the item of either gallery with this name, or None where there is none."""
        kind, _, item = name.partition(":")
        if kind == self.kind:
            return self._own.row_of(item)
        if self._other is None or kind != self._other.kind:
            return None
        row = self._other.row_of(item)
        return None if row is None else -1 - row

    def vector(self, row: int) -> np.ndarray:
        """The vector of a row without its bias, float32 (D,)."""
        if row >= 0:
            return self._own.vector(row)
        assert self._other is not None, "a row of it was found"
        return self._other.vector(-1 - row)

    def items(self, rows: list[int]) -> list[dict]:
        """The id, path and captions of each of some rows of its own."""
        return self._own.items(rows)
