"""Stage 1: a captioned-image dataset is encoded once into an HDF5 feature store."""

from typing import NamedTuple


class Failure(NamedTuple):
    """A record that was left out: which one, at which stage, and why. Failures go into the store's ledger.

    ``size`` (bytes) and ``mtime_ns`` are the failed picture's, so that it is tried again only once it has changed.
    """

    id: str
    stage: str  # dataset, split, image or caption
    reason: str
    size: int = -1
    mtime_ns: int = -1
