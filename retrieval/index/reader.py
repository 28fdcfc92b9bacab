"""An index, memory-mapped and open for searching."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from onceover.base.progress import LOGGER
from onceover.retrieval.exact import checked_queries
from onceover.retrieval.index.manifest import folders_of, read_manifest
from onceover.retrieval.index.segments import Segment
from onceover.retrieval.index.types import IndexingError


class Index:
    """An index on disk, memory-mapped, open for searching; or several that are searched as one.

    Images of several indexes are known by their paths, since ids are only unique within an index.

    Args:
        folder: of a gallery. more: those of galleries of the same kind, made with the same run.

    Attributes:
        kind: ``image`` or ``text``.
        biased: whether a query gets a 1 as one more coordinate.
        space: names the heads and encoders that made the vectors.
        manifest: all that is known about the (first) index, as plain values.
        folders: whose images it holds; of several indexes those of all.

    Raises:
        IndexingError: nothing there, of another version, a file that does not match its SHA-256, or indexes that were
            made differently.
    """

    def __init__(self, folder: str | Path, *more: str | Path):
        places = [Path(place) for place in (folder, *more)]
        manifests = [read_manifest(place) for place in places]
        _check_alike(places, manifests)
        self.manifest = manifests[0]
        self.folders: list[str] = []
        self.segments: list[Segment] = []
        for place, manifest in zip(places, manifests, strict=True):
            self.folders += folders_of(manifest)
            self.segments += [Segment(place, entry, manifest["dim"]) for entry in manifest["segments"]]
            LOGGER.debug("opened the index %s", place)
        self._is_by_path = len(places) > 1 and self.manifest["kind"] == "image"
        self.kind: str = self.manifest["kind"]
        self.biased: bool = self.manifest["biased"]
        self.space: str = self.manifest["space"]
        self._starts = np.cumsum([0, *(segment.size for segment in self.segments)])

    def __len__(self) -> int:
        return sum(int(segment.alive.sum()) for segment in self.segments)

    def ids(self) -> list[str]:
        """The ids of all items, removed ones left out."""
        return self.living("path" if self._is_by_path else "id")

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
            names = segment.rows.living("path" if self._is_by_path else "id")
            rows.update(zip(names, numbers.tolist(), strict=True))
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
                items[place] = item | {"id": item["path"]} if self._is_by_path else item
        return items

    def thumbnail(self, row: int) -> bytes | None:
        """A small JPEG of a row's image, where there is one."""
        number = int(self._segment_numbers(row))
        return self.segments[number].rows.thumbnail(row - int(self._starts[number])) or None

    def _segment_numbers(self, rows: np.ndarray | int) -> np.ndarray:
        """The number of the segment that each row lies in."""
        return np.searchsorted(self._starts, rows, side="right") - 1


def _check_alike(places: Sequence[Path], manifests: Sequence[dict]) -> None:
    """Refuses indexes whose scores cannot be compared, and one that is named twice.

    Raises:
        IndexingError: they are of several runs or kinds, or only some are corrected for hubs.
    """
    if len({place.resolve() for place in places}) < len(places):
        raise IndexingError("the same index is named twice; name each one once")
    for place, manifest in zip(places[1:], manifests[1:], strict=True):
        names = f"{places[0]} and {place}"
        if (manifest["space"], manifest["dim"]) != (manifests[0]["space"], manifests[0]["dim"]):
            raise IndexingError(f"{names} were made by different heads or encoders; index both with the same run")
        if manifest["kind"] != manifests[0]["kind"]:
            raise IndexingError(f"{names} hold images and captions; name indexes of one kind")
        if manifest["biased"] != manifests[0]["biased"]:
            raise IndexingError(f"only one of {names} is corrected for hubs; index both with the same --rerank")
