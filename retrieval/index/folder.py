"""The folder of an index: which files in it are this program's, one writer at a time, and what a failure leaves."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from onceover.base.files import MAX_TEXT, FileError, only_writer, read_bytes, read_record, visible_names, write_record
from onceover.base.formats import CURRENT
from onceover.base.outputs import claim_folder
from onceover.retrieval.index.manifest import all_manifests, files_of, has_pointer, is_index_file
from onceover.retrieval.index.types import IndexingError

_PENDING = "pending.json"  # names the files that are being written
_PENDING_FORMAT = "onceover index, files under way"


def claim_index(folder: str | Path, names: Iterable[str]) -> None:
    """Makes an absent or empty folder one for the galleries of an index; one that holds an index stays as it is.

    Args:
        names: of the galleries' folders in it.

    Raises:
        IndexingError, OutputError: it, or a gallery's folder in it, holds something else.
    """
    galleries = [Path(folder) / name for name in names]
    for gallery in galleries:
        check_folder(gallery)
    if not any(_is_index(gallery) for gallery in galleries):
        claim_folder(folder, "name another folder for the index")


def check_folder(folder: str | Path) -> None:
    """Refuses a folder that holds something else than an index; hidden files do not count.

    Raises:
        IndexingError: it holds other people's files.
    """
    folder = Path(folder)
    if not folder.exists() or _is_index(folder):
        return
    if not folder.is_dir():
        raise IndexingError(f"{folder} is no folder; name another folder for the index")
    if visible_names(folder):
        raise IndexingError(f"{folder} is not empty and no index; name another folder for the index")


def _is_index(folder: Path) -> bool:
    """Whether a folder holds a pointer of this program's, or, where that is damaged, a manifest or files under way."""
    if has_pointer(folder):
        return True
    with contextlib.suppress(IndexingError):
        if _read_pending(folder):
            return True
    return bool(all_manifests(folder))


def _read_pending(folder: Path) -> list[str]:
    """The files that were being written when a process was killed.

    Raises:
        IndexingError: the list is damaged, or somebody else's file.
    """
    path = folder / _PENDING
    if not path.exists():
        return []
    try:
        record = read_record(path, "the list of files under way")
    except FileError as error:
        raise IndexingError(f"{error}; move it elsewhere") from error
    names = record.get("files")
    if record.get("format") != _PENDING_FORMAT or not isinstance(names, list):
        raise IndexingError(f"{path} is no list of this program's; move it elsewhere")
    return [name for name in names if isinstance(name, str) and is_index_file(name)]


class IndexFiles:
    """The files that a writer adds to an index, each listed in ``pending.json`` before it appears.

    Attributes:
        folder: the index's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._begun: list[str] = []  # those that were not there before
        self._leftover = _read_pending(folder)  # by a process that was killed

    def begin(self, *names: str) -> list[Path]:
        """Lists files that are about to be written, and returns their paths."""
        self._begun += [name for name in names if not (self.folder / name).exists()]
        self._list_pending([*self._leftover, *self._begun])
        return [self.folder / name for name in names]

    def next_segment(self) -> str:
        """A name for a new segment; no file in the folder begins with it."""
        in_use: set[str] = set()
        if self.folder.is_dir():
            in_use = {path.name[:6] for path in self.folder.iterdir()}
        last = 0
        for manifest in all_manifests(self.folder).values():
            for entry in manifest["segments"]:
                last = max(last, int(entry["name"]))
        number = last + 1
        while f"{number:06d}" in in_use:
            number += 1
        return f"{number:06d}"

    def undo(self) -> None:
        """Removes the files that were written, and nothing else."""
        self._remove(self._begun)
        self._list_pending(self._leftover)

    def sweep(self, versions: set[str]) -> None:
        """Removes all files of an index but those that some versions use, and what a killed process left.

        Only manifests of this program's, and files that these list, are removed; and nothing while the manifest of a
        version cannot be read.

        Args:
            versions: the names of their manifests.
        """
        manifests = all_manifests(self.folder)
        if not versions <= set(manifests):
            return
        used: set[str] = set()
        listed: set[str] = set()
        for name, manifest in manifests.items():
            listed |= files_of(manifest)
            if name in versions:
                used |= files_of(manifest)
        self._remove(listed - used)
        self._remove(set(manifests) - versions)  # last: after a kill they still list the files to be removed
        self._remove(set(self._leftover) - used - versions)
        self._list_pending([])

    def _remove(self, names: Iterable[str]) -> None:
        """Removes files by name, and no folders."""
        for name in names:
            if (self.folder / name).is_file():
                (self.folder / name).unlink()

    def _list_pending(self, names: list[str]) -> None:
        """Writes the list of files under way; without any it is removed."""
        path = self.folder / _PENDING
        if names:
            write_record(path, {"format": _PENDING_FORMAT, "files": names})
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[IndexFiles]:
    """Holds the writer's lock; a failure leaves nothing that was written, and all that was there before.

    Raises:
        IndexingError: the folder holds something else than an index.
    """
    check_folder(folder)
    with only_writer(folder, "the index"):
        files = IndexFiles(folder)
        version = _current_version(folder)
        try:
            yield files
        except BaseException:
            if _current_version(folder) == version:  # else the new version is there, and its files are in use
                files.undo()
            raise


def _current_version(folder: Path) -> bytes | None:
    """The content of ``CURRENT``; None where it is not there."""
    if not (folder / CURRENT).exists():
        return None
    return read_bytes(folder / CURRENT, MAX_TEXT)
