"""The two forms of a feature store, one file or a folder of shards, and which of them a store has or gets."""

import os
from pathlib import Path
from typing import NamedTuple

from onceover.base.files import link_target
from onceover.base.formats import MANIFEST
from onceover.extract.store import SHARD_NAME, StoreError

FILE = "file"
FOLDER = "folder"
FOLDER_BYTES = 8 * 2**30  # of features, from which a store becomes a folder where its name does not say
_FILE_SUFFIXES = (".h5", ".hdf5")
_FOLDER_SUFFIX = ".store"


class StorePlace(NamedTuple):
    """Where a store is to be written, and in which form; None where neither its name nor what is there says so."""

    path: Path
    form: str | None

    def form_for(self, nbytes: int) -> str:
        """The form of a store with so many bytes of features."""
        if self.form is not None:
            return self.form
        return FOLDER if nbytes >= FOLDER_BYTES else FILE


def store_place(store: str | Path) -> StorePlace:
    """The place that a user names for a store, whose form is that of the store that is there, or what the name says.

    ``flickr.h5`` is a file; ``flickr.store``, and whatever ends with a slash, is a folder.

    Raises:
        StoreError: a folder that holds something else, or a file where a folder is named.
    """
    text = os.fspath(store)
    is_named_folder = text.endswith(("/", os.sep))
    path = link_target(store)
    if path.is_dir():
        _refuse_strange_folder(path)
        return StorePlace(path, FOLDER)
    if path.exists():
        if is_named_folder:
            raise StoreError(f"{path} is a file, and no folder; name it without the slash, or convert it with repack")
        return StorePlace(path, FILE)
    if is_named_folder or path.suffix == _FOLDER_SUFFIX:
        return StorePlace(path, FOLDER)
    return StorePlace(path, FILE if path.suffix in _FILE_SUFFIXES else None)


def _refuse_strange_folder(folder: Path) -> None:
    """Refuses a folder without a manifest that holds something else than shards of a store that was being written.

    Raises:
        StoreError: it does.
    """
    if (folder / MANIFEST).exists():
        return
    names = (entry.name for entry in folder.iterdir())
    strange = sorted(name for name in names if not name.startswith(".") and SHARD_NAME.fullmatch(name) is None)
    if strange:
        raise StoreError(
            f"{folder} is a folder that holds something else than a feature store ({strange[0]}); name another store"
        )
