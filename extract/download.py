"""Downloads of datasets: resumable, checked, unpacked safely, and never half visible.

pooch checks and places the archives; an unfinished one stays beside its place and is continued by a range request.
"""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pooch
import requests
from tqdm import tqdm

from configs import OnceoverError
from extract.files import only_writer

BLOCK = 2**14  # bytes; what is read of a block that is cut off is lost
TIMEOUT = 10  # seconds without an answer
MAX_UNPACKED = 8 * 2**30  # bytes; Flickr8k unpacks to 1.1 GiB
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


def download_archives(name: str, folder: str | Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Fetches and unpacks the dataset's archives into ``folder``; what is there already is left alone.

    Raises:
        DownloadError: no network, a wrong checksum, an archive that would write outside the folder or is damaged.
    """
    folder = Path(folder)
    with only_writer(folder, "the dataset"):
        folder.mkdir(parents=True, exist_ok=True)
        for archive in ARCHIVES[name]:
            if (folder / archive.proof).exists():
                say(f"{folder / archive.proof} is there already")
                continue
            say(f"downloading {archive.url}")
            file = _fetch(archive, folder)
            _unpack(file, folder, archive.proof)
            file.unlink()


def _fetch(archive: Archive, folder: Path) -> Path:
    name = archive.url.rpartition("/")[2]
    partial = folder / f".{name}.part"
    try:
        place = pooch.retrieve(
            archive.url,
            known_hash=f"md5:{archive.md5}",
            fname=f".{name}",
            path=folder,
            downloader=lambda url, output, _: _resume(url, partial, output),
        )
    except requests.RequestException as error:
        raise DownloadError(
            f"{archive.url} could not be downloaded ({_reason(error)}); run the same command again to go on"
        ) from error
    except ValueError as error:  # pooch's word for a wrong checksum
        raise DownloadError(
            f"{archive.url} came with a wrong checksum and was discarded; run the same command again"
        ) from error
    return Path(place)


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
                tqdm(
                    total=total, initial=have, unit="B", unit_scale=True, desc=partial.stem.lstrip("."), disable=None
                ) as bar,
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


def _unpack(file: Path, folder: Path, proof: str) -> None:
    """Unpacks into a folder aside, then renames each entry into place, the proof of completeness last."""
    aside = Path(tempfile.mkdtemp(prefix=".unpack-", dir=folder))
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not member.filename.startswith("__MACOSX")]
            _refuse_unsafe(members, file)
            for member in tqdm(members, desc="unpack", unit=" files", disable=None):
                archive.extract(member, aside)
        if not (aside / proof).exists():
            raise DownloadError(f"{file.name.lstrip('.')} holds no {proof}; it is not the archive that was expected")
        for entry in sorted(aside.iterdir(), key=lambda entry: entry.name == proof):
            os.replace(entry, folder / entry.name)
    except zipfile.BadZipFile as error:
        file.unlink()
        raise DownloadError(
            f"{file.name.lstrip('.')} is a damaged zip file ({error}); run the same command again"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refuse_unsafe(members: list[zipfile.ZipInfo], file: Path) -> None:
    for member in members:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        link = (member.external_attr >> 16) & 0o170000 == 0o120000
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or link:
            raise DownloadError(
                f"{file.name.lstrip('.')} would write outside its folder ({member.filename!r}); nothing was unpacked"
            )
    size = sum(member.file_size for member in members)
    if size > MAX_UNPACKED:
        raise DownloadError(f"{file.name.lstrip('.')} would unpack to {size / 2**30:,.0f} GiB; nothing was unpacked")
