"""Folders that may hold other people's files: what this program wrote there, and how that alone is replaced.

A folder's record, ``.onceover.json``, lists the files that were written into it with the SHA-256 of each. A file is
this program's exactly when the record has it and its bytes are those that were written.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from onceover.base.errors import OnceoverError
from onceover.base.files import (
    FileError,
    file_sha256,
    link_target,
    only_writer,
    read_record,
    remove_asides,
    whole_file,
    write_record,
)
from onceover.base.formats import RESULT_FORMAT

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
    record = _read_record(folder)
    if record["claimed"]:
        return
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise OutputError(f"{folder} is not empty, and was not made by this program; {mend}")
    write_record(folder / RECORD, record | {"claimed": True})


class Outputs:
    """Writes files into a folder and replaces none that it did not write.

    Args:
        folder: it need not be there. mend: what to do where a file is somebody else's, for the error.
    """

    def __init__(self, folder: str | Path, mend: str):
        self.folder = Path(folder)
        self._mend = mend

    @contextlib.contextmanager
    def writing(self, names: Iterable[str]) -> Iterator[None]:
        """Keeps a second writer out of the folder, and sees that files of these names may be written.

        Raises:
            OutputError: a file is there that this program did not write, or that was changed since.
            FileError: another process writes into the folder.
        """
        with only_writer(self.folder / "outputs", "into", wait=_WAIT):
            for name in names:
                remove_asides(self.folder, name)
                self.check(name)
            yield

    def check(self, name: str) -> None:
        """Refuses a name at which something lies that is not this program's.

        Raises:
            OutputError: a file that this program did not write, or that was changed since.
        """
        path = link_target(self.folder / name)
        if not path.exists():
            return
        written = self._record()["files"].get(name)
        if written is None:
            raise OutputError(f"{path} was not written by this program, and is left as it is; {self._mend}")
        if not path.is_file() or file_sha256(path) not in written:
            raise OutputError(f"{path} was changed since it was written, and is left as it is; {self._mend}")

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
        with self.file(name) as aside:
            aside.write_bytes(text.encode("utf-8"))

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
        """Removes files that this program wrote and that were not changed since, those whose names are chosen."""
        record = self._record()
        for name in [name for name in record["files"] if choose(name)]:
            path = self.folder / name
            if path.is_file() and file_sha256(path) in record["files"][name]:
                path.unlink()
            del record["files"][name]
            write_record(self.folder / RECORD, record)

    def _note(self, name: str, sha256: str) -> None:
        """Adds a file to the record before it appears; the one before stays known, in case of a kill between."""
        record = self._record()
        record["files"][name] = [sha256, *record["files"].get(name, [])[:1]]
        write_record(self.folder / RECORD, record)

    def _record(self) -> dict:
        return _read_record(self.folder)


def _read_record(folder: Path) -> dict:
    """The record of a folder, or an empty one.

    Raises:
        FileError: a damaged one, or a file of somebody else's by that name.
    """
    path = folder / RECORD
    if not path.is_file():
        return {"format": _FORMAT, "claimed": False, "files": {}}
    record = read_record(path, "the record of what was written here")
    if record.get("format") != _FORMAT:
        raise FileError(f"{path} is no record of this program's; move it elsewhere")
    return record


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
        raise OutputError(
            f"{path} was not written by this program, and is left as it is; name a new file"
        ) from error
    if record.get("format") != RESULT_FORMAT:
        raise OutputError(f"{path} is another file than a result, and is left as it is; name a new file")


def result_record(result: dict) -> dict:
    """A result as it is written to a file of the user's choice."""
    return {"format": RESULT_FORMAT} | result


def write_result(path: str | Path, result: dict) -> None:
    """Writes a result as JSON to a file of the user's choice, which may only replace another such result.

    Raises:
        OutputError: something else is there.
    """
    check_result(path)
    write_record(path, result_record(result))
