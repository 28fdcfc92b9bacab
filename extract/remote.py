"""Stores that are folders at an address such as ``s3://bucket/flickr.store``, with copies of their files here.

A copy is a whole file: it is fetched under another name and renamed. Shards are named by their content and never
change, so that a copy of one stays right; the copy of the manifest is compared with the checksum behind the end of the
one at the address. What is being written for an address is kept apart from copies, which may go at any time.
"""

import contextlib
import io
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onceover.base.addresses import Address
from onceover.base.cache import cache_folder, copies_folder, make_copies_folder, note_copy, note_use
from onceover.base.drivers import download, forget, read_part, remove, upload
from onceover.base.errors import OnceoverError
from onceover.base.files import aside_of, digest, flush_file
from onceover.base.formats import MANIFEST
from onceover.base.hdf5 import TRAILER_BYTES, Hdf5Error, check_bytes, checksum_behind, stated_checksum
from onceover.base.progress import LOGGER

AT_ONCE = 8  # files that are fetched or put at a time
_DIGITS = 12
_TRIAL = ".onceover-trial"

_fetching: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


class RemoteError(OnceoverError):
    """A store at an address that cannot be read, or not written."""


class RemoteFolder:
    """A folder at an address.

    Attributes:
        address: of the folder. copies: the folder of this machine that holds copies of its files.
    """

    def __init__(self, address: Address):
        self.address = address
        self.copies = copies_folder() / _own_name(address)

    def manifest_checksum(self) -> str | None:
        """The checksum that stands behind the end of the manifest; None where there is no manifest.

        Raises:
            AddressError, RemoteError: it cannot be told.
        """
        manifest = self.address / MANIFEST
        forget(str(manifest))
        with _told(manifest):
            try:
                size = manifest.entry().size or 0
            except FileNotFoundError:
                return None
            start = max(0, size - TRAILER_BYTES)
            return checksum_behind(io.BytesIO(read_part(str(manifest), start, TRAILER_BYTES))) or ""

    def fetch_manifest(self) -> bool:
        """Fetches the manifest, unless its copy is the same; gives whether there is one.

        Raises:
            AddressError, RemoteError: it cannot be fetched.
        """
        checksum = self.manifest_checksum()
        if checksum is None:
            return False
        if checksum and self._has_manifest(checksum):
            note_use(self.copies / MANIFEST)
        else:
            self._fetch(MANIFEST, anew=True)
        return True

    def _has_manifest(self, checksum: str) -> bool:
        """Whether the copy of the manifest is whole and has the checksum of the one at the address."""
        copy = self.copies / MANIFEST
        try:
            return stated_checksum(copy) == checksum and check_bytes(copy)
        except (FileNotFoundError, Hdf5Error):
            return False

    def fetch(self, names: Iterable[str]) -> None:
        """Fetches shards of which there are no copies, several at a time.

        Raises:
            AddressError, RemoteError: one cannot be fetched.
        """
        missing = [name for name in names if not (self.copies / name).exists()]
        if len(missing) == 1:
            self._fetch(missing[0])
        elif missing:
            with ThreadPoolExecutor(min(AT_ONCE, len(missing))) as pool:
                list(pool.map(self._fetch, missing))

    def fetch_again(self, name: str) -> None:
        """Fetches a shard whose copy is damaged."""
        self._fetch(name, anew=True)

    def _fetch(self, name: str, anew: bool = False) -> None:
        """Copies a file, whole or not at all."""
        copy = self.copies / name
        with _fetching[copy]:
            if copy.exists() and not anew:
                return
            LOGGER.debug("fetching %s", self.address / name)
            make_copies_folder(self.copies)
            aside = aside_of(copy)
            try:
                with _told(self.address / name):
                    download(str(self.address / name), aside)
                flush_file(aside)
                size = aside.stat().st_size
                aside.replace(copy)
            finally:
                aside.unlink(missing_ok=True)
        note_copy(size)

    def check_writable(self) -> None:
        """Puts an empty file into the folder and removes it, so that a refusal comes before the work is done.

        Raises:
            AddressError, RemoteError: nothing can be written there.
        """
        trial = self.address / _TRIAL
        with _told(trial), tempfile.NamedTemporaryFile() as empty:
            try:
                upload(Path(empty.name), str(trial))
            except FileNotFoundError as error:
                raise RemoteError(f"{self.address} cannot be written: there is no bucket or folder for it") from error
            remove(str(trial))

    def sizes(self) -> dict[str, int | None]:
        """The sizes of the files in the folder by their names; none where there is no such folder.

        Raises:
            AddressError, RemoteError: it cannot be listed.
        """
        forget(str(self.address))
        with _told(self.address):
            try:
                return {name: entry.size for name, entry in self.address.entries().items()}
            except FileNotFoundError:
                return {}


def staging_path(address: Address) -> Path:
    """The folder of this machine in which a store for an address is written before it is put there."""
    return cache_folder() / "unfinished" / _own_name(address) / address.name


def _own_name(address: Address) -> str:
    """The name of the folder of an address in the cache."""
    return f"{address.name}-{digest(str(address))[:_DIGITS]}"


@contextlib.contextmanager
def _told(address: Address) -> Iterator[None]:
    """Turns an error of the system into a line with the address."""
    try:
        yield
    except FileNotFoundError as error:
        raise RemoteError(f"{address} is not there; put it back, or run extract again") from error
    except OSError as error:
        raise RemoteError(f"{address}: {error.strerror or error}; run the command again") from error
