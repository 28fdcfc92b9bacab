"""The two forms of a feature store, one file or a folder of shards, and which of them a store has or gets."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, cast

from onceover.base.addresses import Address, is_address
from onceover.base.cache import named_size
from onceover.base.files import link_target
from onceover.base.formats import MANIFEST
from onceover.extract.remote import RemoteFolder, staging_path
from onceover.extract.store import SHARD_NAME, StoreError, named_store

FILE = "file"
FOLDER = "folder"
FOLDER_BYTES = 8 * 2**30  # of features, from which a store becomes a folder where its name does not say
_FILE_SUFFIXES = (".h5", ".hdf5")
_FOLDER_SUFFIX = ".store"


class Destination(NamedTuple):
    """The address that a store is put to, and the checksum of the manifest that is there before; None without one."""

    address: Address
    before: str | None


class StorePlace(NamedTuple):
    """Where a store is to be written, and in which form.

    Attributes:
        path: on this machine. form: None where neither its name nor what is there says so.
        destination: where it is put from there; None of a store of this machine.
    """

    path: Path
    form: str | None
    destination: Destination | None = None

    @property
    def store(self) -> Path:
        """The path or the address of the finished store."""
        return self.path if self.destination is None else cast(Path, self.destination.address)

    def form_for(self, nbytes: int) -> str:
        """The form of a store with so many bytes of features."""
        if self.form is not None:
            return self.form
        return FOLDER if nbytes >= FOLDER_BYTES else FILE


def store_place(store: str | Path) -> StorePlace:
    """The place that a user names for a store, whose form is that of the store that is there, or what the name says.

    ``flickr.h5`` is a file; ``flickr.store``, whatever ends with a slash, and an address is a folder.

    Raises:
        StoreError: a folder that holds something else, or a file where a folder is named.
        AddressError: an address that cannot be reached.
    """
    if is_address(store):
        named = named_store(store)
        if isinstance(named, Address):
            return _place_at(named)
        store = named
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


def is_same_store(store: str | Path, other: str | Path) -> bool:
    """Whether two names are those of one store that is there."""
    first = named_store(store)
    second = named_store(other)
    if isinstance(first, Address) or isinstance(second, Address):
        return first == second
    return first.exists() and second.exists() and first.samefile(second)


def _place_at(address: Address) -> StorePlace:
    """The place for a store at an address, which is written on this machine and put there.

    Raises:
        StoreError: an address that is only read, that of a bucket, or the name of a file.
        AddressError, RemoteError: nothing can be written there.
    """
    if not address.lists:
        raise StoreError(f"{address} is on a web server, which is only read; name a folder, or an object store (s3://)")
    if not address.name:
        raise StoreError(f"{address} is a whole bucket; name a folder in it: {address}/NAME.store")
    if address.suffix in _FILE_SUFFIXES:
        raise StoreError(
            f"{address} is the name of a file, and a store at an address is a folder; name it "
            f"{address.with_suffix(_FOLDER_SUFFIX)}"
        )
    named_size()  # refuses a size of the cache that cannot be, before anything is encoded
    folder = RemoteFolder(address)
    before = folder.manifest_checksum()
    if before is None:
        _refuse_strange_names(address, folder.sizes())
        folder.check_writable()
    return StorePlace(staging_path(address), FOLDER, Destination(address, before))


def _refuse_strange_folder(folder: Path) -> None:
    """Refuses a folder without a manifest that holds something else than shards of a store that was being written.

    Raises:
        StoreError: it does.
    """
    if (folder / MANIFEST).exists():
        return
    _refuse_strange_names(folder, [entry.name for entry in folder.iterdir()])


def _refuse_strange_names(folder: Path | Address, names: Iterable[str]) -> None:
    """Refuses what lies in a folder without a manifest, unless it is hidden or named as shards are.

    Raises:
        StoreError: there is something else.
    """
    strange = sorted(name for name in names if not name.startswith(".") and SHARD_NAME.fullmatch(name) is None)
    if strange:
        raise StoreError(
            f"{folder} is a folder that holds something else than a feature store ({strange[0]}); name another store"
        )
