"""Folders that may hold other people's files: what this program wrote there, and how that alone is replaced.

A folder's record, ``.onceover.json``, lists the files that were written into it with the SHA-256 of each. A file is
this program's exactly when the record has it and its bytes are those that were written.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from onceover.base.errors import OnceoverError
from onceover.base.files import (
    FileError,
    file_sha256,
    flush_file,
    json_text,
    link_target,
    only_writer,
    plain_values,
    read_record,
    remove_asides,
    sealed,
    sync_folder,
    visible_names,
    whole_file,
    write_record,
)
from onceover.base.formats import RESULT_FORMAT
from onceover.base.progress import warn

RECORD = ".onceover.json"
_FORMAT = "onceover folder"
_WAIT = 60  # seconds for another process to end its writing, which takes a fraction of one


class OutputError(OnceoverError):
    """A folder or file of somebody else's, where something is to be written."""


def claim_folder(folder: str | Path, mend: str) -> None:
    """Makes an absent or empty folder this program's; one that is so already stays as it is. Hidden files do not count.

    Raises:
        OutputError: the folder holds something else; ``mend`` says what to do instead.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is no folder; {mend}")
    if folder.is_dir():
        remove_asides(folder, RECORD)
    record = _read_record(folder)
    if record["claimed"]:
        return
    if visible_names(folder):
        raise OutputError(f"{folder} is not empty, and was not made by this program; {mend}")
    write_record(folder / RECORD, record | {"claimed": True})


class Outputs:
    """Writes files into a folder and replaces none that it did not write.

    Args:
        folder: it need not be there. mend: what to do where a file is somebody else's, for the error.
        keep_changed: take a file that was changed since it was written for somebody else's; False where only this
            program has anything to write, so that such a file is merely damaged.
    """

    def __init__(self, folder: str | Path, mend: str, keep_changed: bool = True):
        self.folder = Path(folder)
        self._mend = mend
        self._keep_changed = keep_changed

    @contextlib.contextmanager
    def writing(self, names: Iterable[str]) -> Iterator[None]:
        """Keeps a second writer out of the folder, and sees that files of these names may be written.

        Raises:
            OutputError: a file is there that this program did not write, or that was changed since.
            FileError: another process writes into the folder.
        """
        with self.locked():
            remove_asides(self.folder, RECORD)
            for name in names:
                remove_asides(self.folder, name)
                self.check(name)
            yield

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second writer of results out of the folder.

        Raises:
            FileError: another process writes into the folder.
        """
        with only_writer(self.folder / "outputs", "into", wait=_WAIT):
            yield

    def names(self) -> list[str]:
        """The names of all files in the record, those in folders within as ``folder/name``."""
        return list(self._record()["files"])

    def holds(self, name: str) -> bool:
        """Whether a file of this name is there that this program once wrote; it may have been changed since."""
        return name in self._record()["files"] and (self.folder / name).is_file()

    def check_origin(self, name: str) -> None:
        """Refuses a name at which something lies that this program never wrote, or that a link leads to.

        Raises:
            OutputError: there is such a file, or a folder on the way to it is a link.
        """
        path = self.folder / name
        self.check_links(name)
        if os.path.lexists(path) and name not in self._record()["files"]:
            raise OutputError(f"{path} was not written by this program, and is left as it is; {self._mend}")

    def check_links(self, name: str) -> None:
        """Refuses a name in a folder that is a link.

        Raises:
            OutputError: it is one.
        """
        link = self._link_to(name)
        if link is not None:
            raise OutputError(f"{link} is a link to another folder, and is not written to; {self._mend}")

    def _link_to(self, name: str) -> Path | None:
        """The folder on the way to a name that is a link, if one is."""
        within = [self.folder / parent for parent in Path(name).parents if parent != Path()]
        return next((parent for parent in within if parent.is_symlink()), None)

    def check(self, name: str) -> None:
        """Refuses a name at which something lies that is not this program's.

        Raises:
            OutputError: a file that this program did not write, or that was changed since.
        """
        self.check_origin(name)
        if not self._is_replaceable(name):
            path = link_target(self.folder / name)
            raise OutputError(f"{path} was changed since it was written, and is left as it is; {self._mend}")

    def _is_replaceable(self, name: str) -> bool:
        """Whether nothing is at a name, or a file whose bytes are those that this program wrote."""
        path = link_target(self.folder / name)
        if not path.exists():
            return True
        if not path.is_file():
            return False
        return not self._keep_changed or file_sha256(path) in self._record()["files"].get(name, ())

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Gives a path to write to; on leaving, the file appears under its name, and in the record.

        Raises:
            OutputError: a file is there that this program did not write, or that was changed since.
        """
        self.check(name)
        with whole_file(self.folder / name) as aside:
            yield aside
            self._note(name, file_sha256(aside))

    def write_text(self, name: str, text: str) -> None:
        """Writes a file of UTF-8.

        Raises:
            OutputError: a file is there that this program did not write, or that was changed since.
        """
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file.

        Raises:
            OutputError: a file is there that this program did not write, or that was changed since.
        """
        with self.file(name) as aside:
            aside.write_bytes(data)

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Writes a JSON object with a digest of itself (``base.files.read_record``).

        Raises:
            OutputError: a file is there that this program did not write, or that was changed since.
        """
        self.write_text(name, json_text(sealed(plain_values(record))))

    def move_in(self, file: Path, name: str) -> None:
        """Moves a complete file from elsewhere on the same disk to a name; what else is there is set aside.

        Raises:
            OutputError: a folder on the way to it is a link.
        """
        target = self.folder / name
        self.check_links(name)
        self.set_aside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        flush_file(file)
        self._note(name, file_sha256(file))
        os.replace(file, target)
        sync_folder(target.parent)

    def set_aside(self, name: str) -> None:
        """Renames a file that is not as this program wrote it, so that its name is free and nothing is lost."""
        path = self.folder / name
        if not os.path.lexists(path) or self._is_replaceable(name):
            return
        names = (path.with_name(f"{path.name}.{number}.old") for number in count(1))
        other = next(name for name in names if not os.path.lexists(name))
        os.replace(path, other)
        warn(f"{path} was changed since it was written; what it held is kept as {other.name}")

    def write_texts(self, texts: Mapping[str, str]) -> None:
        """Writes files of UTF-8, by name, or none of them where one would replace somebody else's file.

        Raises:
            OutputError: a file is there that this program did not write, or that was changed since.
            FileError: another process writes into the folder.
        """
        with self.writing(texts):
            for name, text in texts.items():
                self.write_text(name, text)

    def remove(self, choose: Callable[[str], bool]) -> None:
        """Removes the files of some names that this program wrote; those that were changed since are set aside.

        What lies in a folder that is a link is left alone.
        """
        record = self._record()
        for name in [name for name in record["files"] if choose(name)]:
            if self._link_to(name) is None:
                self.set_aside(name)
                (self.folder / name).unlink(missing_ok=True)
            del record["files"][name]
            write_record(self.folder / RECORD, record)

    def adopt(self, names: Iterable[str]) -> None:
        """Adds files to the record as they are now: those of a folder that an earlier version wrote without one."""
        record = self._record()
        record["files"] |= {name: [file_sha256(self.folder / name)] for name in names}
        write_record(self.folder / RECORD, record)

    def _note(self, name: str, sha256: str) -> None:
        """Adds a file to the record before it appears; the one before stays known, in case of a kill between."""
        record = self._record()
        record["files"][name] = [sha256, *record["files"].get(name, [])[:1]]
        write_record(self.folder / RECORD, record)

    def _record(self) -> dict[str, Any]:
        return _read_record(self.folder)


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder, or an empty one.

    Raises:
        FileError: a damaged one, or a file of somebody else's by that name.
    """
    path = folder / RECORD
    if not path.is_file():
        return {"format": _FORMAT, "claimed": False, "files": {}}
    record = read_record(path, "the record of what was written here")
    files = record.get("files")
    if record.get("format") != _FORMAT or not isinstance(files, dict) or not all(map(_is_within, files)):
        raise FileError(f"{path} is no record of this program's; move it elsewhere")
    return record


def _is_within(name: str) -> bool:
    """Whether a name in a record stays within the folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def check_result(path: str | Path) -> None:
    """Refuses a file of the user's choice for a result in JSON where something else than such a result lies.

    Raises:
        OutputError: something else is there, perhaps another of this program's own files.
    """
    if not link_target(path).exists():
        return
    try:
        record = read_record(path, "a result")
    except FileError as error:
        raise OutputError(f"{path} was not written by this program, and is left as it is; name a new file") from error
    if record.get("format") != RESULT_FORMAT:
        raise OutputError(f"{path} is another file than a result, and is left as it is; name a new file")


def result_record(result: dict[str, Any]) -> dict[str, Any]:
    """A result as it is written to a file of the user's choice."""
    return {"format": RESULT_FORMAT} | result


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON to a file of the user's choice, which may only replace another such result.

    Raises:
        OutputError: something else is there.
    """
    check_result(path)
    write_record(path, result_record(result))
