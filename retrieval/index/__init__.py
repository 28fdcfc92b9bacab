"""An index on disk: the images or captions of one gallery, searched by faiss.

An index is a folder of immutable *segments*, each a faiss file and a file of its rows. A manifest lists them, with the
rows that were removed since, and ``CURRENT`` names the manifest. Adding rows writes a segment, removing rows writes a
list of their numbers (tombstones), and compacting writes one segment that replaces all others. Each time the new
version appears by renaming ``CURRENT``, and a reader of an older version is not disturbed. faiss trusts the bytes it is
given (damaged ones can end the process), so every file is checked against the manifest's SHA-256 first.

A folder is written to only if it is empty or an index. ``pending.json`` names the files that are being written, so that
after a kill they can be told from other people's files, which are never removed.
"""

from onceover.retrieval.index.checks import check_origin, check_vanished, has_grown, source_of
from onceover.retrieval.index.folder import check_folder, claim_index
from onceover.retrieval.index.manifest import folders_of, read_manifest
from onceover.retrieval.index.reader import Index
from onceover.retrieval.index.types import TYPES, IndexingError, choose_type
from onceover.retrieval.index.updating import Update, compact, remove, update, update_share

__all__ = [
    "TYPES",
    "Index",
    "IndexingError",
    "Update",
    "check_folder",
    "check_origin",
    "check_vanished",
    "choose_type",
    "claim_index",
    "compact",
    "folders_of",
    "has_grown",
    "read_manifest",
    "remove",
    "source_of",
    "update",
    "update_share",
]
