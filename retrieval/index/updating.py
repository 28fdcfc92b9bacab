"""Changes to an index: items join, are replaced or removed, and segments are written together."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, Unpack

import numpy as np

from onceover.base.files import digest, write_json
from onceover.base.progress import say, warn
from onceover.base.texts import ChosenTexts, TextColumn, Texts
from onceover.base.worker import Worker
from onceover.extract.key_index import repeated_rows
from onceover.retrieval.gallery import Gallery, LazyRows
from onceover.retrieval.index.checks import check_origin
from onceover.retrieval.index.folder import IndexFiles, check_folder, writing
from onceover.retrieval.index.manifest import current_name, manifest_name, point_at, read_manifest
from onceover.retrieval.index.reader import Index
from onceover.retrieval.index.recall import measure
from onceover.retrieval.index.segments import Segment, bury, encode_share, write_segment
from onceover.retrieval.index.types import MIN_RECALL, IndexingError, choose_type

SMALL_SEGMENT = 10_000  # so few new rows are searched exactly beside an approximate index
MAX_SEGMENTS = 16  # an update of an index that has so many builds it anew


@dataclass(frozen=True)
class Update:
    """The outcome of a change: rows added, removed and held, the manifest, and whether nothing had to be done."""

    added: int
    removed: int
    rows: int
    manifest: dict
    up_to_date: bool = False


class IndexRequest(TypedDict):
    """The index that is asked for, as options of ``update``.

    Attributes:
        source: names the images or captions that the gallery was made from.
        run: the run folder whose heads made it, for later queries.
        kind: one of ``TYPES``, or auto; by default as asked before, or auto.
        memory: limit in bytes, by which auto chooses.
        min_recall: recall@10 against exact search under which an approximate index is refused; by default as asked
            before, or ``MIN_RECALL``.
        force: replace an index of another source, or a damaged one.
        folders: of which the source consists, where it is one or several folders of images.
    """

    source: str
    run: str
    kind: NotRequired[str | None]
    memory: int
    min_recall: NotRequired[float | None]
    force: NotRequired[bool]
    folders: NotRequired[Sequence[str]]


def update(folder: str | Path, gallery: Gallery, probes: np.ndarray, **request: Unpack[IndexRequest]) -> Update:
    """Makes the index hold exactly the items of ``gallery``: new ones join, changed ones are replaced, others removed.

    It is built anew where that is simpler: after other heads, another type, or when more than half would change.

    Args:
        probes: queries of the other modality, float32 (Q, D), with which recall and speed are measured.
        request: the options of the index (``IndexRequest``).

    Raises:
        IndexingError: another source, ids that are not unique, too low a recall, or a folder of something else.
        OSError: a full disk; the index that was there is still there.
    """
    folder = Path(folder)
    with writing(folder) as files:
        plan = _planned(folder, gallery, **request)
        if plan.is_up_to_date and plan.before is not None:
            return Update(0, 0, len(gallery), plan.before, up_to_date=True)
        entries = _write_change(files, gallery, plan)
        manifest = _publish(files, plan.about, entries, probes)
    return Update(len(plan.change.new_rows), len(plan.change.gone_keys), len(gallery), manifest)


def update_share(folder: str | Path, gallery: Gallery, worker: Worker, **request: Unpack[IndexRequest]) -> None:
    """Encodes a worker's share of the rows that ``update`` would write, which then finds them encoded.

    Any number of workers may run at once, anywhere, and again after they were killed; the index itself does not change.

    Args:
        request: as for ``update``.

    Raises:
        IndexingError: as for ``update``. WorkerError: the workers were given different commands.
    """
    folder = Path(folder)
    check_folder(folder)
    plan = _planned(folder, gallery, **request)
    rows, entries_stay = plan.rows_to_write(len(gallery))
    if plan.is_up_to_date or not len(rows):
        say(f"{folder}: up to date; nothing to share")
        return
    items = gallery.take(rows) if len(rows) < len(gallery) else gallery
    encode_share(folder, items, plan.type_to_write(len(rows), entries_stay), worker)


def remove(folder: str | Path, ids: list[str], probes: np.ndarray) -> Update:
    """Removes items by id: a tombstone for each, so that searches pass them over.

    Raises:
        IndexingError: an id that is not in the index, or no item would be left.
    """
    folder = Path(folder)
    wanted = set(ids)
    with writing(folder) as files:
        index = Index(folder)
        key_of = dict(zip(index.living("id"), index.living("key"), strict=True))
        missing = sorted(wanted.difference(key_of))
        if missing:
            more = ""
            if len(missing) > 1:
                more = f" and {len(missing) - 1} more"
            raise IndexingError(f"{folder} holds no {missing[0]!r}{more}")
        if len(wanted) == len(key_of):
            raise IndexingError(f"that would leave nothing in {folder}; remove the folder instead")
        keys = {key_of[name] for name in wanted}
        entries = [
            bury(files, entry, segment, keys)
            for entry, segment in zip(index.manifest["segments"], index.segments, strict=True)
        ]
        manifest = _publish(files, index.manifest, entries, probes)
    return Update(0, len(wanted), len(key_of) - len(wanted), manifest)


def compact(folder: str | Path, probes: np.ndarray, keep_last: bool = True) -> Update:
    """Writes one segment that replaces all others, without the rows that were removed.

    Args:
        keep_last: keep the files of the version before, for readers that have it open; without them nothing that was
            removed is left in the folder.
    """
    folder = Path(folder)
    with writing(folder) as files:
        index = Index(folder)
        buried = sum(segment.size for segment in index.segments) - len(index)
        if len(index.segments) == 1 and not buried:
            if not keep_last:
                files.sweep({current_name(folder)})
            return Update(0, 0, len(index), index.manifest, up_to_date=True)
        say(f"{folder}: writing {len(index):,} rows anew ({index.manifest['type']})")
        gallery = _gallery_of(index)
        entry = write_segment(files, gallery, index.living("key"), index.manifest["type"])
        manifest = _publish(files, index.manifest, [entry], probes, keep_last)
    return Update(0, buried, len(gallery), manifest)


def _gallery_of(index: Index) -> Gallery:
    """The items of an index as a gallery; thumbnails are read when they are asked for."""
    thumbnails = None
    if any(segment.rows.has_thumbnails for segment in index.segments):
        thumbnails = LazyRows(_read_thumbnail, _living_rows(index))
    blocks: list[np.ndarray] = []
    for segment in index.segments:
        blocks += segment.vectors()
    return Gallery(
        kind=index.kind,
        vectors=np.concatenate(blocks),
        biased=index.biased,
        ids=index.living("id"),
        paths=index.living("path"),
        captions=index.captions_by_item(),
        contents=index.living("content"),
        thumbnails=thumbnails,
        space=index.space,
    )


def _living_rows(index: Index) -> list[tuple[Segment, int]]:
    """Each item of an index as its segment and its row there."""
    rows = []
    for segment in index.segments:
        rows += [(segment, row) for row in np.flatnonzero(segment.alive).tolist()]
    return rows


def _read_thumbnail(item: tuple[Segment, int]) -> bytes:
    segment, row = item
    return segment.rows.thumbnail(row)


def _description(
    gallery: Gallery, before: dict | None, kind: str | None, memory: int, min_recall: float | None
) -> dict:
    """The index that is asked for, as fields of its manifest; whatever is not asked for stays as it was."""
    before = before or {}
    asked = kind or before.get("asked", "auto")
    dim = gallery.vectors.shape[1]
    chosen = asked
    reason = "as asked for"
    if asked == "auto":
        chosen, reason = choose_type(len(gallery), dim, memory)
    if min_recall is None:
        min_recall = before.get("min_recall", MIN_RECALL)
    return {
        "kind": gallery.kind,
        "biased": gallery.biased,
        "dim": dim,
        "space": gallery.space,
        "type": chosen,
        "asked": asked,
        "reason": reason,
        "min_recall": min_recall,
    }


def _usable_segments(folder: Path, before: dict | None, about: dict, force: bool) -> list[Segment]:
    """The segments of the index that is there; none where all has to be built anew."""
    if before is None:
        return []
    changed = [key for key in ("kind", "biased", "dim", "space", "source", "type") if before[key] != about[key]]
    if changed:
        say(f"building it anew: {', '.join(changed)} changed")
        return []
    try:
        return Index(folder).segments
    except IndexingError:
        if not force:
            raise
        warn("building it anew: it is damaged")
        return []


def _keys(gallery: Gallery) -> Texts:
    """A digest of all that the index keeps of each item."""
    columns = (gallery.vectors, gallery.ids, gallery.paths, gallery.captions, gallery.contents)
    return Texts(_key(*item) for item in zip(*columns, strict=True))


def _key(vector: np.ndarray, name: str, path: str, captions: list[str], content: str) -> str:
    """A digest of all that the index keeps of an item."""
    text = digest([name, path, captions, content])
    return hashlib.sha256(vector.tobytes() + text.encode()).hexdigest()


@dataclass(frozen=True)
class _Change:
    """The difference between an index and the gallery that it is to hold.

    Attributes:
        keys: of the gallery's items.
        new_rows: of the gallery, those that are not in the index yet, int64 (n,).
        gone_keys: of items that are in the index and not in the gallery.
        buried: how many rows of the segments are dead then.
    """

    keys: TextColumn
    new_rows: np.ndarray
    gone_keys: set[str]
    buried: int


def _compare(segments: list[Segment], keys: TextColumn) -> _Change:
    present: set[str] = set()
    for segment in segments:
        present.update(segment.rows.living("key"))
    gone_keys = present.difference(keys)
    new_rows = np.flatnonzero([key not in present for key in keys])
    buried = sum(segment.size for segment in segments) - len(present) + len(gone_keys)
    return _Change(keys, new_rows, gone_keys, buried)


@dataclass(frozen=True)
class _Plan:
    """The update of an index: the fields of its manifest as asked for, what is there, and what has to change.

    Attributes:
        before: the manifest that is there, if any. segments: those that can stay.
    """

    about: dict
    before: dict | None
    segments: list[Segment]
    change: _Change

    @property
    def is_up_to_date(self) -> bool:
        """Whether the index that is there is the one that is asked for."""
        if not self.segments or len(self.change.new_rows) or self.change.gone_keys or self.before is None:
            return False
        return all(self.before.get(key) == value for key, value in self.about.items())

    def rows_to_write(self, size: int) -> tuple[np.ndarray, bool]:
        """The rows, of a gallery of this size, that a new segment is to hold, and whether the old segments stay."""
        rows = self.change.new_rows
        is_much = len(rows) + self.change.buried > size / 2
        if is_much or len(self.segments) >= MAX_SEGMENTS:
            return np.arange(size), False
        return rows, bool(self.segments)

    def type_to_write(self, rows: int, entries_stay: bool) -> str:
        """The type of a new segment of so many rows."""
        return "flat" if entries_stay and rows <= SMALL_SEGMENT else self.about["type"]


def _planned(
    folder: Path,
    gallery: Gallery,
    *,
    source: str,
    run: str,
    kind: str | None = None,
    memory: int,
    min_recall: float | None = None,
    force: bool = False,
    folders: Sequence[str] = (),
) -> _Plan:
    """Compares the index in ``folder`` with the one that is asked for (``IndexRequest``)."""
    if repeated_rows(gallery.ids):
        raise IndexingError("several items of the gallery have the same id")
    if not len(gallery):
        raise IndexingError(f"{source} holds nothing to index")
    before = check_origin(folder, source, run, gallery.space, force, folders)
    about = _description(gallery, before, kind, memory, min_recall)
    about |= {"source": source, "folders": sorted(folders), "run": run}
    say(f"{folder}: {about['type']} ({about['reason']})")
    segments = _usable_segments(folder, before, about, force)
    return _Plan(about, before, segments, _compare(segments, _keys(gallery)))


def _write_change(files: IndexFiles, gallery: Gallery, plan: _Plan) -> list[dict]:
    """Writes tombstones and a segment of new rows, or all rows anew; returns the entries of the segments."""
    rows, entries_stay = plan.rows_to_write(len(gallery))
    change = plan.change
    entries = []
    if entries_stay and plan.before is not None:
        entries = [
            bury(files, entry, segment, change.gone_keys)
            for entry, segment in zip(plan.before["segments"], plan.segments, strict=True)
        ]
    if len(rows):
        items = gallery
        if len(rows) < len(gallery):
            items = gallery.take(rows)
        kind = plan.type_to_write(len(rows), entries_stay)
        entries.append(write_segment(files, items, ChosenTexts(change.keys, rows), kind))
    return entries


def _publish(files: IndexFiles, about: dict, entries: list[dict], probes: np.ndarray, keep_last: bool = True) -> dict:
    """Measures the new version and points ``CURRENT`` at it; only files that it and the last version use stay.

    The last version does not stay where it is damaged, or is not to be kept.

    Args:
        about: the fields of the manifest but for those that are measured. entries: those of its segments.
    """
    folder = files.folder
    segments = [Segment(folder, entry, about["dim"]) for entry in entries]
    measured = measure(segments, probes, about["min_recall"])
    entries = [entry | {"effort": effort} for entry, effort in zip(entries, measured.efforts, strict=True)]
    manifest = about | {
        "metric": "inner product",
        "normalised": True,
        "segments": entries,
        "rows": sum(int(segment.alive.sum()) for segment in segments),
        "recall@10": measured.recall,
        "queries_per_second": measured.queries_per_second,
        "probes": len(probes),
    }
    say(
        f"recall@10 {measured.recall:.3f} against exact search, {measured.queries_per_second:,.0f} queries a "
        f"second one by one ({len(probes):,} queries of the other modality)"
    )
    name = manifest_name(manifest)
    versions = {name}
    if keep_last:
        with contextlib.suppress(IndexingError):
            read_manifest(folder)
            versions.add(current_name(folder))
    (path,) = files.begin(name)
    write_json(path, manifest)
    point_at(folder, name)
    files.sweep(versions)
    return manifest
