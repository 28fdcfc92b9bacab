"""Entries: files and folders as the drivers of fsspec describe them, each in its own words."""

import contextlib
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

_TIMES = ("LastModified", "last_modified", "mtime", "updated", "Last-Modified", "created")
_SUMS = ("ETag", "etag", "md5Hash", "checksum", "Content-MD5")


class Entry(NamedTuple):
    """A file or folder as a listing describes it; ``size`` is None where the listing does not tell it."""

    is_folder: bool
    size: int | None
    mtime_ns: int


def entry_of(info: dict[str, Any]) -> Entry:
    """The entry of a file or folder, from the dict that a driver of fsspec gives for it."""
    is_folder = info.get("type") == "directory" or str(info.get("url", "")).partition("?")[0].endswith("/")
    size = info.get("size")
    return Entry(is_folder, size if isinstance(size, int) else None, _modified_ns(info))


def _modified_ns(info: dict[str, Any]) -> int:
    """The modification time in ns; without one, a number made from the checksum, or 0."""
    for name in _TIMES:
        moment = _moment(info.get(name))
        if moment is not None:
            return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000
    for name in _SUMS:
        if info.get(name):
            return number_of(str(info[name]))
    return 0


def _moment(value: object) -> datetime | None:
    """The moment that a driver gives as a datetime, in seconds, or as text; None of anything else."""
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC)
    moment = _written_moment(value) if isinstance(value, str) else value
    if not isinstance(moment, datetime):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _written_moment(text: str) -> datetime | None:
    """The moment in a text, in ISO 8601 or in the form of web servers; None of any other text."""
    from email.utils import parsedate_to_datetime  # which takes longer to import than this module

    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        with contextlib.suppress(ValueError):
            return parse(text)
    return None


def number_of(text: str) -> int:
    """A number made from a text: the same text gives the same number on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7])
