"""Downloads of datasets: resumable, checked, unpacked safely, and never half visible.

pooch checks and places the archives; an unfinished one stays beside its place and is continued by a range request.
"""

import errno
import filecmp
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pooch
import requests

from onceover.base.errors import OnceoverError
from onceover.base.files import only_writer
from onceover.base.outputs import claim_folder
from onceover.base.progress import ProgressBar, say, tracked

BLOCK = 2**14  # bytes; what is read of a block that is cut off is lost
TIMEOUT = 10  # seconds without an answer
MAX_UNPACKED = 8 * 2**30  # bytes; Flickr8k unpacks to 1.1 GiB
MAX_MEMBERS = 200_000  # files in an archive; Flickr8k has 8,000
_MAX_NAME = 255  # bytes of a file's name
_PREFIX = ".unpack-"  # of a folder in which an archive is unpacked
_MARK = ".onceover-unpack"  # a file that says that such a folder is this program's
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError)
_SOURCE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"


class DownloadError(OnceoverError):
    """A download that failed, or an archive that is not what it should be."""


class Archive(NamedTuple):
    """A zip file to fetch: where, its MD5, and a path that is there once it is unpacked."""

    url: str
    md5: str
    proof: str


ARCHIVES = {
    "flickr8k": (
        Archive(_SOURCE + "Flickr8k_Dataset.zip", "f18a1e2920de5bd84dae7cf08ec78978", "Flicker8k_Dataset"),
        Archive(_SOURCE + "Flickr8k_text.zip", "bf6c1abcb8e4a833b7f922104de18627", "Flickr8k.token.txt"),
    )
}


def download_archives(name: str, folder: str | Path) -> None:
    """Fetches and unpacks the dataset's archives into ``folder``; what is there already is left alone.

    Raises:
        DownloadError: no network, a wrong checksum, an archive that would write outside the folder or is damaged, or a
        file in its way.
        OutputError: the folder holds something else.
    """
    folder = Path(folder)
    with only_writer(folder, "the dataset"):
        if not any((folder / archive.proof).exists() for archive in ARCHIVES[name]):
            claim_folder(folder, "name a new folder")
        _remove_leftovers(folder)
        for archive in ARCHIVES[name]:
            if (folder / archive.proof).exists():
                say(f"{folder / archive.proof} is there already")
                continue
            say(f"downloading {archive.url}")
            file = _fetch(archive, folder)
            _unpack(file, folder, archive.proof)
            file.unlink()


def _fetch(archive: Archive, folder: Path) -> Path:
    """Downloads an archive into ``folder``, or takes the one that is there already.

    Raises:
        DownloadError: it could not be had, or came with a wrong checksum.
    """
    name = archive.url.rpartition("/")[2]
    file = folder / f".{name}"
    if file.exists() and pooch.file_hash(str(file), alg="md5") == archive.md5:
        return file
    try:
        _resume(archive.url, folder / f".{name}.part", file)
    except requests.RequestException as error:
        raise DownloadError(
            f"{archive.url} could not be downloaded ({_reason(error)}); run the same command again to go on"
        ) from error
    if pooch.file_hash(str(file), alg="md5") != archive.md5:
        file.unlink()
        raise DownloadError(f"{archive.url} came with a wrong checksum and was discarded; run the same command again")
    return file


def _resume(url: str, partial: Path, output: str | Path) -> None:
    """Downloads to ``partial``, going on where it ends, and moves it to ``output`` once it is complete."""
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code != 416:  # asked for what lies behind the end: everything is there
            answer.raise_for_status()
            have = have if answer.status_code == 206 else 0
            rest = answer.headers.get("Content-Length")
            total = have + int(rest) if rest else None
            with (
                open(partial, "ab" if have else "wb") as file,
                ProgressBar(partial.stem.lstrip("."), "B", total=total, initial=have) as bar,
            ):
                for block in answer.iter_content(BLOCK):
                    file.write(block)
                    bar.update(len(block))
            if total is not None and partial.stat().st_size < total:
                raise requests.ConnectionError(f"cut off at {partial.stat().st_size:,} of {total:,} bytes")
    os.replace(partial, output)


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    return type(error).__name__ + (f": {error}" if len(str(error)) < 120 else "")


def _remove_leftovers(folder: Path) -> None:
    """Removes what a process was unpacking when it was killed."""
    for entry in folder.glob(f"{_PREFIX}*"):
        if entry.is_symlink() or not entry.is_dir():
            continue
        if (entry / _MARK).is_file():
            shutil.rmtree(entry)
        elif not any(entry.iterdir()):
            entry.rmdir()


def _unpack(file: Path, folder: Path, proof: str) -> None:
    """Unpacks into a folder aside, then renames each entry into place, the proof of completeness last."""
    name = file.name.lstrip(".")
    aside = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    try:
        (aside / _MARK).touch()
        unpacked = aside / "files"
        unpacked.mkdir()
        try:
            _extract(file, unpacked, name)
        except _DAMAGE as error:
            file.unlink()
            raise DownloadError(
                f"{name} is a damaged zip file ({' '.join(str(error).split()):.200}); run the same command again"
            ) from error
        if not (unpacked / proof).exists():
            raise DownloadError(f"{name} holds no {proof}; it is not the archive that was expected")
        _place(sorted(unpacked.iterdir(), key=lambda entry: entry.name == proof), folder)
    finally:
        for _ in range(2):  # a disk that refuses once may not do so again
            shutil.rmtree(aside, ignore_errors=True)


def _place(entries: list[Path], folder: Path) -> None:
    """Renames entries into a folder, in their order; one that is there, and equal, was left by a killed process.

    Raises:
        DownloadError: something else is in the way of one of them; then none was moved.
    """
    absent = []
    for entry in entries:
        target = folder / entry.name
        if not os.path.lexists(target):
            absent.append(entry)
        elif not _are_equal(entry, target):
            raise DownloadError(f"{target} is there already, and is not replaced; move it, or name another folder")
    for entry in absent:
        os.replace(entry, folder / entry.name)


def _are_equal(entry: Path, other: Path) -> bool:
    """Whether two files, or two folders with all that is in them, have the same content."""
    if other.is_symlink():
        return False
    if entry.is_file():
        return other.is_file() and filecmp.cmp(entry, other, shallow=False)
    if not other.is_dir():
        return False
    names = {path.name for path in entry.iterdir()}
    if names != {path.name for path in other.iterdir()}:
        return False
    return all(_are_equal(entry / name, other / name) for name in names)


def _extract(file: Path, folder: Path, name: str) -> None:
    """Writes the members of a zip file below a folder; nothing before all of them are known to be harmless.

    Raises:
        DownloadError: a member that is not. ``_DAMAGE``: not the zip file that it claims to be.
    """
    left = MAX_UNPACKED
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if not member.filename.startswith("__MACOSX")]
        _refuse_unsafe(members, name)
        for member in tracked(members, "unpack", "files"):
            target = folder.joinpath(*_parts(member))
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as written:
                for block in _blocks(archive, member):
                    left -= len(block)
                    if left < 0:
                        raise DownloadError(_too_large(name, MAX_UNPACKED))
                    written.write(block)


def _blocks(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of a member, whose checksum is compared at its end."""
    try:
        with archive.open(member) as opened:
            while block := opened.read(BLOCK):
                yield block
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise zipfile.BadZipFile("a member lies outside the file") from error


def _refuse_unsafe(members: list[zipfile.ZipInfo], name: str) -> None:
    """Refuses an archive with a member that is not a plain file or folder below the archive's own.

    Raises:
        DownloadError: one that leads outside, cannot be written or read, or stands twice; too many, or too large.
    """
    if len(members) > MAX_MEMBERS:
        raise DownloadError(f"{name} holds {len(members):,} files, more than {MAX_MEMBERS:,}; nothing was unpacked")
    files: set[tuple[str, ...]] = set()
    folders: set[tuple[str, ...]] = set()
    for member in members:
        parts = _parts(member)
        reason = _why_unsafe(member)
        if reason is None and parts in files:
            reason = "stands twice"
        if reason is not None:
            raise DownloadError(f"{name}: {member.orig_filename!r:.80} {reason}; nothing was unpacked")
        (folders if member.is_dir() else files).add(parts)
        folders.update(parts[:length] for length in range(1, len(parts)))
    if files & folders:
        both = "/".join(min(files & folders))
        raise DownloadError(f"{name}: {both!r:.80} is a file and a folder at once; nothing was unpacked")
    size = sum(member.file_size for member in members)
    if size > MAX_UNPACKED:
        raise DownloadError(_too_large(name, size))


def _too_large(name: str, size: int) -> str:
    return f"{name} would unpack to {size / 2**30:,.0f} GiB or more; nothing was unpacked"


def _parts(member: zipfile.ZipInfo) -> tuple[str, ...]:
    """The folders that a member lies in, and its name."""
    return PurePosixPath(member.filename.replace("\\", "/")).parts


def _why_unsafe(member: zipfile.ZipInfo) -> str | None:
    """Why a member of an archive is not written, or None."""
    parts = _parts(member)
    kind = stat.S_IFMT(member.external_attr >> 16)
    if not parts or "\0" in member.orig_filename:
        return "is no name of a file"
    if parts[0].startswith("/") or ".." in parts or ":" in parts[0] or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "would write outside its folder"
    if max(len(os.fsencode(part)) for part in parts) > _MAX_NAME or len(member.filename) > 16 * _MAX_NAME:
        return "has too long a name"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in an unknown way"
    return None
