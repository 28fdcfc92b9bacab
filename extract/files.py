"""Files that are either whole or absent, and the lock that keeps a second writer out. Standard library and filelock."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from configs import OnceoverError


class FileError(OnceoverError):
    """A path of the wrong kind, a file in use, an unreadable one, or one that has no room."""


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to; on leaving, flushes that file to the disk and renames it into place.

    Whatever was at ``path`` stays until the new file is complete, and after an error or a kill. The suffix is kept,
    since libraries choose a format by it.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder; a file is to be written there: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.aside{path.suffix}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside ``path`` to fill; on leaving, flushes its files and lets it take the place of ``path``."""
    aside = path.with_name(f".{path.name}.aside")
    remove_folder(aside)
    aside.mkdir(parents=True)
    yield aside
    for file in aside.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    remove_folder(path)
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames within ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value) -> None:
    """Writes ``value`` as readable JSON, whole or not at all. NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, what: str) -> dict:
    """The JSON object in ``path``; ``what`` names the file's role in the error.

    Raises:
        FileError: not there, not readable, or not a JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{what} is missing: {path}") from error
    except (OSError, ValueError) as error:
        raise FileError(f"{what} cannot be read: {path}: {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"{what} holds no JSON object: {path}")
    return value


def digest(value) -> str:
    """SHA-256 (hex) of a JSON-able value in its canonical form: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_disk(path: str | Path, needed_bytes: int) -> None:
    """Refuses to begin a file that its disk has no room for.

    Raises:
        FileError: fewer bytes are free where ``path`` is to be written.
    """
    folder = next(folder for folder in Path(path).absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise FileError(
            f"{path} needs about {needed_bytes / 2**30:,.2f} GiB, and {folder} has {free / 2**30:,.2f} GiB free; "
            "make room, or name a --store elsewhere"
        )


def remove_folder(folder: Path) -> None:
    """Removes a folder tree if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def only_writer(path: str | Path, what: str) -> Iterator[None]:
    """Holds ``path``'s writer lock; the system frees it when the process ends, killed or not.

    Raises:
        FileError: another process holds it.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileError(f"another process is writing {what} {path}; wait for it or stop it") from error
    try:
        own = re.compile(rf"\.{re.escape(path.stem)}\.\d+\.aside{re.escape(path.suffix)}")  # as in whole_file
        beside = (file for file in path.parent.iterdir() if own.fullmatch(file.name))
        for leftover in (*beside, *path.glob(".*.aside*")):
            leftover.unlink()  # of a process that was killed while it wrote
        yield
    finally:
        lock.release()
