"""The image files behind a gallery's items, where they are still there and still what was encoded."""

import hashlib
from pathlib import Path

from onceover.base.errors import OnceoverError
from onceover.base.files import read_bytes
from onceover.base.progress import LOGGER
from onceover.extract.pictures import MAX_BYTES
from onceover.extract.store import FeatureStore
from onceover.heads.checkpoint import Run
from onceover.heads.provenance import store_of


def data_folder(run: Run) -> Path | None:
    """The folder of the dataset that a run was fitted on; None where it is not on this machine any more."""
    try:
        with FeatureStore(store_of(run.folder, run.provenance)) as store:
            folder = store.provenance.get("data")
    except (OnceoverError, OSError) as error:
        LOGGER.debug("large views are thumbnails: %s", error)
        return None
    if not folder or not Path(folder).is_dir():
        return None
    return Path(folder)


def original(root: Path | None, path: str, sha256: str) -> bytes | None:
    """The bytes of the image file at ``path``, in ``root`` where it is relative; None unless they have this SHA-256.

    So nothing is shown but what was encoded, whatever lies at the path now.
    """
    if not path or (root is None and not Path(path).is_absolute()):
        return None
    file = Path(path) if root is None else root / path
    try:
        data = read_bytes(file, MAX_BYTES)
    except (OnceoverError, OSError) as error:
        LOGGER.debug("no original: %s", error)
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None
