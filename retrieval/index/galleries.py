"""The folder of an index: a gallery of images, one of captions, or both."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from onceover.base.formats import CURRENT, EMBEDDINGS
from onceover.base.memory import default_memory
from onceover.base.progress import say
from onceover.base.worker import Worker
from onceover.configs.schema import ConfigError
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.gallery import Gallery
from onceover.retrieval.index.reader import Index
from onceover.retrieval.index.types import IndexingError
from onceover.retrieval.index.updating import IndexRequest, compact, update, update_share
from onceover.retrieval.index.updating import remove as remove_items

GALLERIES = {"image": "images", "text": "captions"}  # kind -> folder within an index


def write_gallery(
    folder: Path,
    gallery: Gallery,
    probes: np.ndarray,
    *,
    source: str,
    folders: Sequence[str],
    run: str,
    kind: str | None,
    memory: int | None,
    min_recall: float | None,
    force: bool,
    prune: bool,
    worker: Worker | None = None,
) -> None:
    """Writes a gallery's index, or what changed in it, into its folder within ``folder``; or a worker's share of it.

    Args:
        probes: queries that the index is measured with, float32 (Q, D). prune: write it anew without removed rows.
        source, folders, run, kind, memory, min_recall, force: as ``retrieval.index.update``; ``memory`` is by default
            half of the machine's.
    """
    noun = GALLERIES[gallery.kind]
    request: IndexRequest = {
        "source": source,
        "folders": folders,
        "run": run,
        "kind": kind,
        "memory": memory or default_memory(),
        "min_recall": min_recall,
        "force": force,
    }
    if worker is not None:
        update_share(folder / noun, gallery, worker, **request)
        return
    summary = update(folder / noun, gallery, probes, **request)
    if summary.up_to_date:
        say(f"{summary.rows:,} {noun}: up to date")
    else:
        say(f"{summary.rows:,} {noun}: {summary.added:,} added, {summary.removed:,} removed")
    if prune:
        compact(folder / noun, probes, keep_last=False)


def change(folder: Path, names: list[str], run: Path | None) -> Iterator[str]:
    """Removes the named items from an index; without names, rewrites it without items removed earlier.

    Args:
        run: the new location of the run that the index was made with, if it has moved.

    Yields:
        A line for each gallery that changed.

    Raises:
        IndexingError: there is no index, it is of another run, or holds no such item.
    """
    folders = {kind: folder / name for kind, name in GALLERIES.items() if (folder / name / CURRENT).exists()}
    if not folders:
        raise IndexingError(f"there is no index at {folder}")
    indexes = {kind: Index(path) for kind, path in folders.items()}
    run = run or run_of(folder, next(iter(indexes.values())))
    embeddings = read_embeddings(run / EMBEDDINGS)
    if any(opened.space != embeddings.space for opened in indexes.values()):
        raise IndexingError(f"{folder} was made by other heads than {run}'s; name its own --run, or index again")
    present = {kind: set(opened.ids()).intersection(names) for kind, opened in indexes.items()}
    missing = sorted(set(names).difference(*present.values()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise IndexingError(f"{folder} holds no {missing[0]!r}{more}")
    for kind, path in folders.items():
        probes = embeddings.probes(kind, indexes[kind].biased)
        if not names:
            summary = compact(path, probes)
            yield f"{path}: {summary.rows:,} rows; the room of {summary.removed:,} removed ones is free"
        elif present[kind]:
            summary = remove_items(path, sorted(present[kind]), probes=probes)
            yield f"{path}: {summary.rows:,} rows; {summary.removed:,} removed"


def run_of(folder: Path, opened: Index) -> Path:
    """The run that the index in ``folder`` was made with.

    Raises:
        ConfigError: it is no longer there.
    """
    run = Path(opened.manifest["run"])
    if not run.exists():
        raise ConfigError(f"{folder} was made with the run {run}, which is not there; name it: --run DIR")
    return run


def kinds_in(*folders: str | Path) -> list[str]:
    """The kinds of items, ``image`` and ``text``, that an index holds, or that all of several indexes hold.

    Raises:
        IndexingError: there is no index, or none of the kinds is in all of them.
    """
    common = list(GALLERIES)
    for folder in folders:
        kinds = [kind for kind, name in GALLERIES.items() if (Path(folder) / name / CURRENT).exists()]
        if not kinds:
            raise IndexingError(f"there is no index at {folder}, or an unfinished one; onceover index makes it")
        common = [kind for kind in common if kind in kinds]
    if not common:
        raise IndexingError("some of the indexes hold images and some captions; name indexes of one kind")
    return common


def open_index(folders: Sequence[str | Path], kind: str) -> Index:
    """Opens the part of an index that holds images (``image``) or captions (``text``); of several, all as one.

    Raises:
        IndexingError: it is missing or damaged, or the indexes cannot be searched together.
    """
    name = GALLERIES[kind]
    for folder in folders:
        kinds = kinds_in(folder)
        if kind not in kinds:
            ways = "text2image or image2image" if kinds == ["image"] else "image2text or text2text"
            raise IndexingError(
                f"{folder} holds no {name}, only {GALLERIES[kinds[0]]}; search these with --mode {ways}, or index "
                f"{name}: onceover index --run RUN --index {folder} --{name} …"
            )
    return Index(*(Path(folder) / name for folder in folders))
