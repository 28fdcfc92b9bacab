"""Which of a dataset's images are new: by size and modification time first, else by the content of their files."""

import contextlib
import hashlib

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import FileError
from onceover.extract.dataset import Dataset
from onceover.extract.ledger import is_passing
from onceover.extract.shards import RowSources
from onceover.extract.store import FeatureStore
from onceover.extract.unfinished import is_readable

Stats = np.ndarray  # int64 (N, 2): size in bytes and modification time in ns of each image's file


def is_up_to_date(store: FeatureStore, dataset: Dataset, listing: str, request: dict) -> bool:
    """Whether a store holds what is asked for, and no image that could not be read then can be read now."""
    made_of = (store.provenance["listing"], store.provenance["request"])
    if made_of != (listing, request) or store.missing_shards():
        return False
    passing = {failure.id for failure in store.failures if failure.stage == "image" and is_passing(failure)}
    return not any(is_readable(dataset.images, path) for path in dataset.paths_of(passing).values())


def new_images(dataset: Dataset, stats: Stats, sources: RowSources, retry_failures: bool) -> np.ndarray:
    """The rows of the images without features, but for those that failed before and have not changed since.

    Returns:
        int64 (n,), ascending.
    """
    rows = np.flatnonzero(known_images(dataset, stats, sources) < 0)
    if retry_failures or not sources.failures:
        return rows
    return rows[[not failed_before(dataset, stats, sources, row) for row in rows.tolist()]]


def known_images(dataset: Dataset, stats: Stats, sources: RowSources) -> np.ndarray:
    """The position of each image among ``sources``, int64 (N,), or −1."""
    positions = sources.find_by_stat(dataset.ids, stats)
    if not sources:
        return positions
    for row in np.flatnonzero(positions < 0).tolist():
        if failed_before(dataset, stats, sources, row):
            continue
        # one that cannot be read is read again for encoding, where the failure goes into the ledger
        with contextlib.suppress(OSError, FileError):
            content = hashlib.sha256(dataset.images.open(dataset.paths[row])).hexdigest()
            positions[row] = sources.find([content])[0]
    return positions


def failed_before(dataset: Dataset, stats: Stats, sources: RowSources, row: int) -> bool:
    """Whether the ledger holds an image, and its file has not changed since."""
    failure = sources.failures.get(dataset.ids[row])
    if failure is None or is_passing(failure):
        return False
    return [failure.size, failure.mtime_ns] == stats[row].tolist()


def contents_of(dataset: Dataset, names: set[str]) -> set[str]:
    """SHA-256 of the images with some names, those that can be read."""
    contents = set()
    for name, path in zip(dataset.ids, dataset.paths, strict=True):
        if name in names:
            with contextlib.suppress(OSError, OnceoverError):
                contents.add(hashlib.sha256(dataset.images.open(path)).hexdigest())
    return contents
