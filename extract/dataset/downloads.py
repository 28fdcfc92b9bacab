"""Lists of downloads, as img2dataset writes one beside each shard (``00000.parquet``): each image and its status."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from onceover.base.extras import MissingPackageError
from onceover.extract.dataset.columns import Columns
from onceover.extract.dataset.parquet import load_pyarrow, open_parquet, readable, records
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.samples import SUCCESS, why_not_downloaded


class Download(NamedTuple):
    """An image's key, its caption, and why it was not fetched, or ""."""

    key: str
    caption: str
    fault: str


def read_downloads(path: Path) -> Iterator[Download]:
    """The downloads that a shard's Parquet file lists; none where it is another program's.

    Raises:
        DatasetError: pyarrow is missing, or the file is damaged.
    """
    with readable(path), open_parquet(path) as file:
        names = file.schema_arrow.names
        if "key" not in names or "status" not in names:
            return
        captions = ("caption",) if "caption" in names else ()
        texts = [name for name in ("key", "status", "error_message") if name in names]
        for record in records(file, path, Columns(None, captions, None), texts):
            status = record["status"]
            fault = "" if status == SUCCESS else why_not_downloaded(status, record["error_message"])
            yield Download(record["key"] or "", " ".join(record.captions), fault)


def note_on_unread(lists: Sequence[Path]) -> str:
    """A note for the user where such lists are there and pyarrow, which reads them, is not; else ""."""
    if not lists:
        return ""
    try:
        load_pyarrow()
    except MissingPackageError:
        return ', failed downloads not listed (pip install "onceover-retrieval[parquet]")'
    return ""


def missing_rows(path: Path, keys: set[str], prefix: str) -> Iterator[Row]:
    """A row with its fault for each image that a shard's Parquet file lists and that is not in the shard.

    Args:
        keys: of the images in the shard. prefix: what their names start with.
    """
    for download in read_downloads(path):
        if download.key not in keys:
            fault = download.fault or "listed as downloaded, and not there"
            yield Row(f"{prefix}{download.key}", download.caption, "", fault)
