"""A store in its other form: one file -> a folder of shards, or a folder -> one file. Nothing is encoded again."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onceover.base.files import check_disk, only_writer
from onceover.base.formats import MANIFEST
from onceover.base.progress import ProgressBar
from onceover.extract.sealing import seal
from onceover.extract.store import KINDS, FeatureStore, StoreError, row_blocks, store_exists
from onceover.extract.store_form import FILE, FOLDER, StorePlace, is_same_store, store_place
from onceover.extract.summary import Summary, summary_of

_COLUMNS = {"image": ("features", "thumbnail"), "text": ("features", "truncated", "unknown", "tokens")}
_ROW_BYTES = 8192  # about what a row takes beside its features; a thumbnail makes the most of it


class _StoredRows:
    """The rows of a store, in their order."""

    def __init__(self, store: FeatureStore, kind: str):
        self._store = store
        self._kind = kind
        self._names = [name for name in _COLUMNS[kind] if name in store.row_shapes(kind)]

    def blocks(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The columns of all rows, a block at a time."""
        with ProgressBar(f"repacking {self._kind}", "rows", total=len(keys)) as bar:
            for rows in row_blocks(len(keys)) if keys else [slice(0, 0)]:
                numbers = np.arange(rows.start, rows.stop)
                yield {name: self._store.column(self._kind, name, numbers) for name in self._names}
                bar.update(len(numbers))


def repack(store: str | Path, path: str | Path, *, force: bool = False) -> Summary:
    """Writes the store ``path`` with all that another store holds, in the other form: a file or a folder.

    Where the name of ``path`` does not say which (``extract.store_form``), it is the one that ``store`` has not. A
    folder at an address can be repacked from and to.

    Args:
        force: replace another store at ``path``.

    Raises:
        StoreError: ``store`` cannot be read, or another store is at ``path``.
        FileError: no room on the disk, or another process is writing.
    """
    start = time.monotonic()
    place = store_place(path)
    path = place.path
    with only_writer(path, "the store"), FeatureStore(store) as opened:
        if is_same_store(store, place.store):
            raise StoreError(f"{place.store} is the store itself; write it in its other form to another place")
        other = FILE if opened.shards is not None else FOLDER
        up_to_date = _is_same(opened, place.store, force)
        if not up_to_date:
            _write(opened, place, place.form or other)
    with FeatureStore(place.store) as repacked:
        summary = summary_of(repacked, up_to_date)
    summary.seconds = time.monotonic() - start
    return summary


def _is_same(store: FeatureStore, path: Path, force: bool) -> bool:
    """Whether the store at ``path`` holds what another one does.

    Raises:
        StoreError: it holds something else, without ``force``.
    """
    if not store_exists(path):
        return False
    try:
        with FeatureStore(path) as there:
            if (there.fingerprints, there.provenance) == (store.fingerprints, store.provenance):
                return True
    except StoreError:
        if not force or not (path / MANIFEST).exists():
            raise
    if not force:
        raise StoreError(f"{path} holds another store; name another place, or replace it with --force")
    return False


def _write(store: FeatureStore, place: StorePlace, form: str) -> None:
    """Writes all that a store holds in a form."""
    rows = {"image": len(store.image_ids), "text": len(store.captions)}
    check_disk(place.path, sum(store.features(kind).nbytes + _ROW_BYTES * rows[kind] for kind in KINDS))
    sizes, times = store.image_stats()
    seal(
        place.path,
        form=form,
        destination=place.destination,
        images={
            "id": store.image_ids,
            "path": store.image_paths,
            "split": store.image_splits,
            "sha256": store.sha256,
            "size": sizes,
            "mtime_ns": times,
        },
        texts={"caption": store.captions, "image_index": store.image_index},
        sources={kind: _StoredRows(store, kind) for kind in KINDS},
        recipes=store.recipes,
        provenance=store.provenance,
        failures=store.failures,
        tokenizer_files=store.tokenizer_files,
    )
