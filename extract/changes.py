"""Which of a dataset's images are new: by size and modification time first, else by the content of their files."""

import contextlib
import hashlib

from onceover.base.errors import OnceoverError
from onceover.base.files import FileError
from onceover.extract.dataset import Dataset
from onceover.extract.ledger import is_passing
from onceover.extract.shards import RowSources
from onceover.extract.store import FeatureStore
from onceover.extract.unfinished import is_readable

Stats = list[tuple[int, int]]  # size in bytes and modification time in ns of each image's file


def is_up_to_date(store: FeatureStore, dataset: Dataset, listing: str, request: dict) -> bool:
    """Whether a store holds what is asked for, and no image that could not be read then can be read now."""
    made_of = (store.provenance["listing"], store.provenance["request"])
    if made_of != (listing, request) or store.missing_shards():
        return False
    paths = dict(zip(dataset.ids, dataset.paths, strict=True))
    passing = [failure.id for failure in store.failures if failure.stage == "image" and is_passing(failure)]
    return not any(is_readable(dataset.images, paths[name]) for name in passing if name in paths)


def new_images(dataset: Dataset, stats: Stats, sources: RowSources, retry_failures: bool) -> list[int]:
    """The rows of the images without features, but for those that failed before and have not changed since."""
    rows = []
    for row, key in enumerate(content_keys(dataset, stats, sources)):
        if key not in sources and (retry_failures or not failed_before(dataset, stats, sources, row)):
            rows.append(row)
    return rows


def content_keys(dataset: Dataset, stats: Stats, sources: RowSources) -> list[str | None]:
    """The SHA-256 of each image where it can be among ``sources``, else None."""
    keys: list[str | None] = []
    for row, (name, path) in enumerate(zip(dataset.ids, dataset.paths, strict=True)):
        key = sources.keys_by_stat.get((name, *stats[row]))
        if key is None and len(sources) and not failed_before(dataset, stats, sources, row):
            # one that cannot be read is read again for encoding, where the failure goes into the ledger
            with contextlib.suppress(OSError, FileError):
                key = hashlib.sha256(dataset.images.open(path)).hexdigest()
        keys.append(key)
    return keys


def failed_before(dataset: Dataset, stats: Stats, sources: RowSources, row: int) -> bool:
    """Whether the ledger holds an image, and its file has not changed since."""
    failure = sources.failures.get(dataset.ids[row])
    if failure is None or is_passing(failure):
        return False
    return (failure.size, failure.mtime_ns) == stats[row]


def contents_of(dataset: Dataset, names: set[str]) -> set[str]:
    """SHA-256 of the images with some names, those that can be read."""
    contents = set()
    for name, path in zip(dataset.ids, dataset.paths, strict=True):
        if name in names:
            with contextlib.suppress(OSError, OnceoverError):
                contents.add(hashlib.sha256(dataset.images.open(path)).hexdigest())
    return contents
