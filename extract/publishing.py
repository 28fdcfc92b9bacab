"""Puts a store that was written on this machine to its address: the shards that are not there, then the manifest.

Until the manifest is there, the address holds the store that it held before, or none; what was put of a new one is
found again by the next call. Shards of the store before that the new one does not have are removed last.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onceover.base.cache import make_copies_folder, note_copy
from onceover.base.drivers import remove, upload
from onceover.base.errors import OnceoverError
from onceover.base.files import remove_files
from onceover.base.formats import MANIFEST
from onceover.base.hdf5 import open_hdf5, stated_checksum
from onceover.base.progress import ProgressBar
from onceover.extract.remote import AT_ONCE, RemoteError, RemoteFolder
from onceover.extract.store import shard_table
from onceover.extract.store_form import Destination


def publish(folder: Path, destination: Destination) -> None:
    """Puts the store that lies in ``folder`` to an address; its files then become copies of those there.

    Raises:
        AddressError, RemoteError: the address cannot be reached or written, or another process has written there.
    """
    remote = RemoteFolder(destination.address)
    try:
        _put(folder, remote, destination.before)
    except OSError as error:
        raise RemoteError(f"{error.filename or remote.address}: {error.strerror or error}; {_AGAIN}") from error
    except OnceoverError as error:
        raise type(error)(f"{error}; {_AGAIN}") from error
    _take_over(folder, remote)


def finish_publishing(folder: Path, destination: Destination) -> None:
    """Makes copies of the files of a store that was put to its address, where a kill came before that."""
    manifest = folder / MANIFEST
    if destination.before and manifest.exists() and stated_checksum(manifest) == destination.before:
        _take_over(folder, RemoteFolder(destination.address))


def _take_over(folder: Path, remote: RemoteFolder) -> None:
    """Makes the files of a store that was put to its address copies of those there."""
    make_copies_folder(remote.copies)
    names = [*_shard_names(folder), MANIFEST]  # which comes last, so that a kill leaves a store that is known as put
    size = 0
    for name in names:
        if (folder / name).exists():
            size += (folder / name).stat().st_size
            (folder / name).replace(remote.copies / name)
    remove_files(folder, [])
    note_copy(size)


_AGAIN = "then run the command again, which goes on with what is there"


def _shard_names(folder: Path) -> dict[str, int]:
    """The shards that the manifest in a folder names, with their sizes."""
    with open_hdf5(folder / MANIFEST, again=True) as manifest:
        table = shard_table(manifest)
    return dict(zip(table.names, table.sizes.tolist(), strict=True))


def _put(folder: Path, remote: RemoteFolder, before: str | None) -> None:
    """Puts what is missing, the manifest last, and removes what only the store before had."""
    address = remote.address
    names = _shard_names(folder)
    earlier = set(_shard_names(remote.copies)) if remote.fetch_manifest() else set()
    present = remote.sizes()
    missing = [name for name, size in names.items() if present.get(name) != size]
    lost = [name for name in missing if not (folder / name).exists()]
    if lost:
        raise RemoteError(f"{address} lacks {len(lost):,} of the shards that it had (the first: {lost[0]})")
    _each(missing, lambda name: upload(folder / name, str(address / name)), f"putting shards to {address}")
    present = remote.sizes()
    if any(present.get(name) != size for name, size in names.items()):
        raise RemoteError(f"{address} lacks shards that were put there")
    if remote.manifest_checksum() != before:
        raise RemoteError(f"another process has written {address} in the meantime")
    upload(folder / MANIFEST, str(address / MANIFEST))
    gone = sorted((earlier - names.keys()) & present.keys())
    _each(gone, lambda name: remove(str(address / name)), f"removing old shards of {address}")


def _each(names: Iterable[str], work: Callable[[str], None], title: str) -> None:
    """Does some work for each name, several at a time."""
    names = list(names)
    if not names:
        return
    with ProgressBar(title, "shards", total=len(names)) as bar, ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(work, names):
            bar.update(1)
