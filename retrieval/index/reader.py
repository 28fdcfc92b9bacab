"""An index, memory-mapped and open for searching."""

from functools import cached_property
from pathlib import Path

import numpy as np

from onceover.base.progress import LOGGER
from onceover.retrieval.exact import checked_queries
from onceover.retrieval.index.manifest import read_manifest
from onceover.retrieval.index.segments import Segment


class Index:
    """An index on disk, memory-mapped, open for searching.

    Attributes:
        kind: ``image`` or ``text``.
        biased: whether a query gets a 1 as one more coordinate.
        space: names the heads and encoders that made the vectors.
        manifest: all that is known about the index, as plain values.

    Raises:
        IndexingError: nothing there, of another version, or a file that does not match its SHA-256.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        LOGGER.debug("opened the index %s", folder)
        self.kind: str = self.manifest["kind"]
        self.biased: bool = self.manifest["biased"]
        self.space: str = self.manifest["space"]
        self.segments = [Segment(folder, entry, self.manifest["dim"]) for entry in self.manifest["segments"]]
        self._starts = np.cumsum([0, *(segment.size for segment in self.segments)])

    def __len__(self) -> int:
        return sum(int(segment.alive.sum()) for segment in self.segments)

    def ids(self) -> list[str]:
        """The ids of all items, removed ones left out."""
        return self.living("id")

    def living(self, column: str) -> list[str]:
        """A column of strings (``id``, ``path``, ``content``, ``key``) of all items, removed ones left out."""
        values = []
        for segment in self.segments:
            values += segment.rows.living(column)
        return values

    def captions_by_item(self) -> list[list[str]]:
        """The captions of each item, removed ones left out."""
        captions = []
        for segment in self.segments:
            captions += segment.rows.captions()
        return captions

    def captions(self) -> list[str]:
        """The captions of all items in one list, removed ones left out."""
        captions = []
        for of_item in self.captions_by_item():
            captions += of_item
        return captions

    def search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and rows, best first, for each of the queries, float32 (Q, D): ``k`` of them, or all there are."""
        queries = checked_queries(queries, self.manifest["dim"])
        score_blocks = []
        row_blocks = []
        for start, segment in zip(self._starts, self.segments, strict=False):
            segment_scores, segment_rows = segment.search(queries, k)
            score_blocks.append(segment_scores)
            row_blocks.append(segment_rows + (segment_rows >= 0) * start)
        scores = np.concatenate(score_blocks, axis=1)
        rows = np.concatenate(row_blocks, axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(scores, order, 1)
        rows = np.take_along_axis(rows, order, 1)
        hits = zip(scores, rows, strict=True)
        return [(of_query[row >= 0], row[row >= 0]) for of_query, row in hits]

    def contents_of(self, rows: list[int]) -> list[str]:
        """For each of the rows a string that is equal for items that look the same."""
        wanted = np.asarray(rows, int)
        contents = np.empty(len(rows), object)
        numbers = self._segment_numbers(wanted)
        for number in np.unique(numbers):
            in_segment = np.flatnonzero(numbers == number)
            own_rows, inverse = np.unique(wanted[in_segment] - self._starts[number], return_inverse=True)
            contents[in_segment] = self.segments[number].rows.text("content")[own_rows][inverse]
        return contents.tolist()

    @cached_property
    def _rows(self) -> dict[str, int]:
        """The row of each living item by its id."""
        rows: dict[str, int] = {}
        for start, segment in zip(self._starts.tolist(), self.segments, strict=False):
            numbers = np.flatnonzero(segment.alive) + start
            rows.update(zip(segment.rows.living("id"), numbers.tolist(), strict=True))
        return rows

    def row_of(self, name: str) -> int | None:
        """The row of the item with this id, or None where there is none."""
        return self._rows.get(name)

    def vector(self, row: int) -> np.ndarray:
        """The vector of a row without its bias, float32 (D,)."""
        number = int(self._segment_numbers(row))
        vector = self.segments[number].vector(row - int(self._starts[number]))
        return vector[:-1] if self.biased else vector

    def item(self, row: int) -> dict:
        """The id, path and captions of a row."""
        return self.items([row])[0]

    def items(self, rows: list[int]) -> list[dict]:
        """The id, path and captions of each of some rows, for hits."""
        wanted = np.asarray(rows, int)
        numbers = self._segment_numbers(wanted)
        items: list[dict] = [{}] * len(rows)
        for number in np.unique(numbers):
            in_segment = np.flatnonzero(numbers == number)
            found = self.segments[number].rows.items(wanted[in_segment] - self._starts[number])
            for place, item in zip(in_segment.tolist(), found, strict=True):
                items[place] = item
        return items

    def thumbnail(self, row: int) -> bytes | None:
        """A small JPEG of a row's image, where there is one."""
        number = int(self._segment_numbers(row))
        return self.segments[number].rows.thumbnail(row - int(self._starts[number])) or None

    def _segment_numbers(self, rows: np.ndarray | int) -> np.ndarray:
        """The number of the segment that each row lies in."""
        return np.searchsorted(self._starts, rows, side="right") - 1
