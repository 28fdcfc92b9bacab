"""Files that are whole or absent, reading that neither waits nor overflows, and the lock against a second writer.

Standard library and filelock.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import signal
import stat
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, cast

from onceover.base.addresses import Address, is_address, path_of, read_range
from onceover.base.errors import OnceoverError

#: what ``fsync`` answers where a file system cannot flush (CIFS, some shared folders of virtual machines)
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
#: what a lock answers where a file system has none
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
#: as ``whole_file`` names what it writes; earlier versions named no host
_ASIDE = re.compile(r"\.(?P<stem>.+)\.(?P<pid>\d+)(?:@(?P<host>[0-9a-f]{8}))?\.aside(?P<suffix>\..+)?")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_MACHINE_ID = Path("/etc/machine-id")  # differs where machines have the same name
_ROWS = 4096  # hashed at a time
MAX_TEXT = 2**31  # bytes of a table, a list or a JSON file; COCO's captions take 0.1 GiB
SELF_DIGEST = "sha256"  # the key of a record's own digest


class FileError(OnceoverError):
    """A file that cannot be read or written: of the wrong kind, too large, in use, damaged, or without room."""


def open_regular(path: str | Path) -> io.BufferedReader:
    """Opens a regular file for reading; a FIFO, a device or a socket is refused at once instead of waited for.

    Of a file at an address those parts are downloaded that are read.

    Raises:
        FileError: no regular file. OSError: not there, or not to be opened.
        AddressError: an address that cannot be reached.
    """
    if isinstance(path, Address):
        return cast(io.BufferedReader, path.open("rb"))
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise FileError(f"{path} is {_kind_of_file(mode)}; a regular file is needed")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes, on this machine or at an address.

    The size that the system tells is what is read: a file that tells 0, as those of ``/proc`` do, is empty.

    Raises:
        FileError: no regular file, or a larger one. OSError: not there, or not to be read.
        AddressError: an address that cannot be reached.
    """
    if is_address(path):
        content = read_range(path, 0, most + 1)
        if len(content) > most:
            raise FileError(f"{path} has more than {most:,} bytes; no more are read")
        return content
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise FileError(f"{path} has {size:,} bytes; at most {most:,} are read")
        return file.read(size)


def check_regular(path: str | Path) -> None:
    """Refuses a path that is there and is no regular file, for libraries that open it themselves.

    Raises:
        FileError: a folder, a FIFO, a device or a socket.
    """
    try:
        mode = path_of(path).stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is {_kind_of_file(mode)}; a regular file is needed")


def _kind_of_file(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to; on leaving, flushes that file to the disk and renames it into place.

    Whatever was at ``path`` stays until the new file is complete, and after an error or a kill. Of a link it is the
    target that is replaced. The suffix is kept, since libraries choose a format by it.
    """
    path = link_target(path)
    check_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        yield aside
        flush_file(aside)
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the error that led here says more
            aside.unlink(missing_ok=True)


class ForgivingFile(io.FileIO):
    """A file that remembers the first error of writing and pretends to go on.

    Some libraries cannot give up a file that they cannot write: HDF5 tries again to write what it still holds when the
    file is closed, which ends in a crash, and torch hides the reason. So they are told that all is well, and ``check``
    tells the truth.
    """

    error: OSError | None = None

    def check(self) -> None:
        """Raises the first error of writing, if there was one."""
        if self.error is not None:
            raise self.error

    def write(self, data: Any) -> int:
        """Writes all of ``data``; after an error nothing."""
        view = memoryview(data).cast("B")
        size = len(view)
        try:
            while self.error is None and len(view):
                view = view[super().write(view) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Sets the size, unless there was an error."""
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
        return size or 0

    def readinto(self, buffer: Any) -> int:
        """Reads what is there; after an error, zeros for what could not be written."""
        count = super().readinto(buffer) or 0
        if self.error is None:
            return count
        view = memoryview(buffer).cast("B")
        view[count:] = bytes(len(view) - count)
        return len(view)


@contextlib.contextmanager
def forgiving_file(path: str | Path) -> Iterator[ForgivingFile]:
    """Gives a new file to a library that writes it; whole or not at all, the reason being the disk's own.

    Raises:
        OSError: the first error of writing, whatever the library made of it.
    """
    with whole_file(path) as aside, forgiving(aside) as raw:
        yield raw


@contextlib.contextmanager
def forgiving(path: str | Path) -> Iterator[ForgivingFile]:
    """Opens a file for a library that writes it, and tells the disk's own reason where it cannot be written.

    Raises:
        OSError: the first error of writing, whatever the library made of it.
    """
    with ForgivingFile(path, "w+b") as raw:
        try:
            yield raw
        except Exception as error:
            if raw.error is None or error is raw.error:
                raise
            raise raw.error from error
        raw.check()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C off until the end, for a library that would make an obscure error of it."""
    if threading.current_thread() is not threading.main_thread():  # which alone Ctrl-C reaches
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if interrupts:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Gives a list that is empty until Ctrl-C is pressed, which goes on to raise ``KeyboardInterrupt``.

    A library in whose callback that is raised can make an obscure error of it; the list tells what it came from.
    """
    interrupts: list[int] = []
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or another program's
        yield interrupts
        return
    if threading.current_thread() is not threading.main_thread():  # which alone Ctrl-C reaches
        yield interrupts
        return

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def aside_folder(path: Path) -> Iterator[Path]:
    """Gives an empty hidden folder beside ``path`` to work in, which is removed on leaving."""
    aside = path.with_name(f".{path.name}.{_process()}.aside")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.mkdir()
    try:
        yield aside
    finally:
        for _ in range(2):  # again, where the disk failed once
            shutil.rmtree(aside, ignore_errors=True)


def place_folder(aside: Path, folder: Path) -> bool:
    """Renames a folder into place, unless another process, on whatever host, has put one with files there before.

    Returns:
        Whether it is this one that is there.
    """
    sync_folder(aside)
    try:
        aside.rename(folder)
    except OSError:
        if folder.is_dir():
            return False
        raise
    sync_folder(folder.parent)
    return True


def write_once(path: Path, data: bytes | memoryview) -> None:
    """Writes ``data``, whole, unless a file is there already, be it that another process has just written it.

    Processes on several hosts may call it at once. The folder has to be there.
    """
    aside = aside_of(path)
    try:
        aside.write_bytes(data)
        flush_file(aside)
        try:
            os.link(aside, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links, or a folder that is gone
            if not path.exists():
                os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the error that led here says more
            aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Where a file is made before it takes its place: beside it, under a hidden name of this process alone."""
    return path.with_name(f".{path.stem}.{_process()}.aside{path.suffix}")


@cache
def _host() -> str:
    """A name for this host, or for this container: a place where process numbers are unique."""
    namespace = ""
    machine = ""
    with contextlib.suppress(OSError):
        namespace = str(_PID_NAMESPACE.readlink())
    with contextlib.suppress(OSError):
        machine = _MACHINE_ID.read_text(errors="replace")
    return digest([platform.node(), machine, namespace])[:8]


def _process() -> str:
    """A name for this process that no other has at the same time, on any host: ``1234@0123abcd``."""
    return f"{os.getpid()}@{_host()}"


def flush_file(path: Path) -> None:
    """Flushes a file to the disk, where its file system can."""
    with open(path, "rb+") as file:
        flush(file.fileno())


def link_target(path: str | Path) -> Path:
    """Where a symbolic link leads, through all links; any other path as it is."""
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def flush(descriptor: int) -> None:
    """Flushes a file or folder to the disk, where its file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise


def sync_folder(folder: Path) -> None:
    """Makes renames within ``folder`` survive a power cut, where its file system can."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Writes ``data``, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def json_text(value: Any) -> str:
    """``value`` as readable JSON. NaN is refused, since JSON has none."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as readable JSON, whole or not at all."""
    write_text(path, json_text(value))


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text, whatever it is.

    Raises:
        ValueError: no JSON, nested too deep, or a number of thousands of digits.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The JSON object in ``path``; ``what`` names the file's role in the error.

    Raises:
        FileError: not there, not readable, or not a JSON object.
    """
    try:
        value = parse_json(read_bytes(path, MAX_TEXT))
    except FileNotFoundError as error:
        raise FileError(f"{what} is missing: {path}") from error
    except (OSError, ValueError) as error:
        raise FileError(f"{what} cannot be read: {path}: {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"{what} holds no JSON object: {path}")
    return value


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with a digest of itself, by which ``read_record`` sees whether it was damaged."""
    return {**record, SELF_DIGEST: digest(record)}


def plain_values(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` as it is when it is read again: with lists for tuples, and strings for other keys."""
    values: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return values


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Writes a JSON object with a digest of itself, whole or not at all."""
    write_json(path, sealed(plain_values(record)))


def read_record(path: str | Path, what: str, strict: bool = True) -> dict[str, Any]:
    """The JSON object that ``write_record`` wrote, without its digest; ``what`` names its role in the error.

    ``strict``: refuse one without a digest, as earlier versions wrote them.

    Raises:
        FileError: not there, not readable, or not what was written.
    """
    record = read_json(path, what)
    if SELF_DIGEST not in record and not strict:
        return record
    if record.pop(SELF_DIGEST, None) != digest(record):
        raise FileError(f"{what} is damaged: {path} does not match its own digest")
    return record


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value in its canonical form: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_of_columns(columns: Iterable[Any]) -> str:
    """The ``digest`` of a list of lists or arrays, taken some rows at a time, which saves memory."""
    state = hashlib.sha256(b"[")
    for number, column in enumerate(columns):
        state.update(b"," if number else b"")
        _hash_column(state, column)
    state.update(b"]")
    return state.hexdigest()


def digest_of_column(column: Any) -> str:
    """The ``digest`` of a list or an array, taken some rows at a time, which saves memory."""
    state = hashlib.sha256()
    _hash_column(state, column)
    return state.hexdigest()


def _hash_column(state: Any, column: Any) -> None:
    """Hashes a list or an array as ``digest`` does."""
    state.update(b"[")
    for start in range(0, len(column), _ROWS):
        rows = column[start : start + _ROWS]
        values = rows.tolist() if hasattr(rows, "tolist") else list(rows)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        state.update(("," if start else "").encode() + text[1:-1].encode())
    state.update(b"]")


def file_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a regular file's bytes.

    Raises:
        FileError: no regular file. OSError: not there, or not to be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            "make room, or name a place elsewhere"
        )


def files_within(folder: Path) -> list[str]:
    """The names of all files in a folder, those in folders within as ``folder/name``, sorted; none if it is no folder.

    Links to folders are not followed.
    """
    names = []
    for parent, _, files in os.walk(folder):
        names += [(Path(parent) / file).relative_to(folder).as_posix() for file in files]
    return sorted(names)


def visible_names(folder: Path) -> list[str]:
    """The names of all that lies in a folder but hidden files, sorted; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def remove_files(folder: Path, names: Iterable[str], *, everyones: bool = False) -> None:
    """Removes files of a folder by name, if they are there, and then the folder if nothing else is in it.

    Files that were being written when a process was killed (``whole_file``) go with them; with ``everyones`` those of
    other hosts, too, where it cannot be known whether the process still runs.
    """
    if not folder.is_dir():
        return
    for name in names:
        (folder / name).unlink(missing_ok=True)
    remove_asides(folder, everyones=everyones)
    with contextlib.suppress(OSError):  # something of somebody else's is in it
        folder.rmdir()


def remove_asides(folder: Path, name: str | None = None, *, everyones: bool = False) -> None:
    """Removes what was being made in a folder, or for one name in it, when a process was killed.

    Only names that ``whole_file`` and ``aside_folder`` give are removed, and only those of processes that are gone.
    Of another host's it is not known whether they are; those are removed with ``everyones``.
    """
    for file in list(folder.iterdir()):
        parts = _ASIDE.fullmatch(file.name)
        if parts is None or file.is_symlink():
            continue
        if parts["host"] in (None, _host()):
            if _is_running(int(parts["pid"])):
                continue
        elif not everyones:
            continue
        if name is not None and name != f"{parts['stem']}{parts['suffix'] or ''}":
            continue
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        else:
            file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Whether another process of this number is there; its files are not for this one to remove."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


@contextlib.contextmanager
def only_writer(path: str | Path, what: str, wait: float = 0) -> Iterator[None]:
    """Holds ``path``'s writer lock; the system frees it when the process ends, killed or not.

    What a killed process was writing at ``path``, or directly in the folder ``path``, is removed.

    Args:
        wait: seconds to wait for another writer to end.

    Raises:
        FileError: another process holds it, or the file system has no locks.
    """
    from filelock import FileLock, Timeout

    path = link_target(path)
    if path.name in ("", ".."):  # of "." and "..", which have names of their own
        path = path.resolve()
    if not path.name:
        raise FileError(f"{path} is no place for {what}; name a folder or file of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=wait)
    try:
        lock.acquire()
    except Timeout as error:
        if not Path(lock.lock_file).exists():
            raise FileError(f"nothing can be written into {path.parent}; name a place elsewhere") from error
        raise FileError(f"another process is writing {what} {path}; wait for it or stop it") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise FileError(
            f"the file system of {path.parent} has no locks ({error.strerror}), by which {what} is kept from a second "
            "writer; name a place on another file system"
        ) from error
    try:
        remove_asides(path.parent, path.name, everyones=True)  # of which this process is the only writer
        if path.is_dir():
            remove_asides(path)
        yield
    finally:
        lock.release()
