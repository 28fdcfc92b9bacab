"""Opens what is searched: the galleries of a run or of an index, and the embedder of its queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onceover.base.errors import OnceoverError
from onceover.base.formats import EMBEDDINGS
from onceover.heads.checkpoint import Run, run_at
from onceover.heads.query import QueryEmbedder
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.gallery import NOUNS, Gallery
from onceover.retrieval.index import Index
from onceover.retrieval.index.galleries import kinds_in, open_index, run_of
from onceover.retrieval.search import Searcher, SearchError


class NothingToSearchError(OnceoverError):
    """Neither a run nor an index is named."""


@dataclass(frozen=True)
class Collection:
    """What is searched: images, captions or both, of a run or an index.

    Attributes:
        run: the run that made their vectors.
        embedder: of queries; an encoder is loaded when the first query needs it.
        galleries: by kind, ``image`` or ``text``.
    """

    run: Run
    embedder: QueryEmbedder
    galleries: dict[str, Gallery | Index]

    def searcher(self, kind: str) -> Searcher:
        """A searcher of the images (``image``) or captions (``text``).

        Raises:
            SearchError: there are none, or other heads or encoders than the run's made them.
        """
        if kind not in self.galleries:
            others = NOUNS[next(iter(self.galleries))]
            raise SearchError(f"there are no {NOUNS[kind]} here to search; search the {others}")
        return Searcher(self.galleries[kind], self.embedder)


def named_indexes(index: str | Path | Sequence[str | Path]) -> list[Path]:
    """The folders of an index, or of several."""
    named = [index] if isinstance(index, str | Path) else index
    return [Path(folder) for folder in named]


def open_collection(
    run: Run | str | Path | None,
    index: str | Path | Sequence[str | Path] | None = None,
    *,
    kinds: tuple[str, ...] | None = None,
    split: str | None = None,
    rerank: str | None = None,
    device: str | None = None,
    encoders: dict[str, str | None] | None = None,
) -> Collection:
    """Opens the galleries of an index, or, where none is named, a run's own images and captions.

    Args:
        run: a run, or its folder; None where ``index`` names the run.
        index: an index, or several that were made with one run and are searched as one.
        kinds: the galleries to open, ``image`` and ``text``; by default all that are there.
        split, rerank: of a run: only this split; the hubness correction.
        encoders: by kind, the new location of an encoder that has moved.

    Raises:
        NothingToSearchError: neither is named. IndexingError: an index that lacks a kind, or is damaged.
        RunError: no run.
    """
    galleries: dict[str, Gallery | Index] = {}
    if index:
        folders = named_indexes(index)
        indexes = {kind: open_index(folders, kind) for kind in kinds or kinds_in(*folders)}
        galleries = {**indexes}
        loaded = run_at(run or run_of(folders[0], next(iter(indexes.values()))))
    elif run is not None:
        loaded = run_at(run)
        embeddings = read_embeddings(loaded.folder / EMBEDDINGS)
        for kind in kinds or ("image", "text"):
            galleries[kind] = embeddings.gallery(kind, split, rerank)
    else:
        raise NothingToSearchError("there is nothing to search: name a run, or an index")
    places = encoders or {}
    embedder = QueryEmbedder(loaded, device=device, image_encoder=places.get("image"), text_encoder=places.get("text"))
    return Collection(loaded, embedder, galleries)
