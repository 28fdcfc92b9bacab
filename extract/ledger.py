"""The ledger: a record of each row that was left out of a store, and why."""

from typing import NamedTuple

MAX_ID = 300  # characters of a name in the ledger
# Reasons keep the spelling that stores have: a store's listing covers its dataset's, and another one would make every
# store that has such rows out of date.
NO_SUCH_IMAGE = "no such picture"
NO_CAPTIONS = "picture without captions"
NOT_USABLE = "not a usable picture"
NO_IMAGE_NAMED = "no picture is named"
NOT_ENCODED = "its picture could not be encoded"


class Failure(NamedTuple):
    """A row that was left out: its id, the stage at which it failed, and why. Failures go into the store's ledger.

    ``size`` (bytes) and ``mtime_ns`` are the failed image's, so that it is tried again only once it has changed.
    """

    id: str
    stage: str  # dataset, split, image or caption
    reason: str
    size: int = -1
    mtime_ns: int = -1


def is_passing(failure: Failure) -> bool:
    """Whether an image failed for a reason that is none of its content, so that it is tried again each time."""
    return failure.size < 0
