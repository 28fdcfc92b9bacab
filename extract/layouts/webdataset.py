"""Tar shards as webdataset reads and img2dataset writes them: ``000.jpg`` beside ``000.txt`` or ``000.json``."""

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from onceover.base.addresses import is_address
from onceover.base.files import FileError, open_regular
from onceover.base.progress import ProgressBar
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.downloads import missing_rows, note_on_unread
from onceover.extract.dataset.examples import ExampleImage, by_split
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row, image_name
from onceover.extract.dataset.samples import MAX_SIDECAR, TEXT_SUFFIXES, Sample, sample_rows
from onceover.extract.dataset.shard_files import ShardFiles, shard_files
from onceover.extract.dataset.splits import named_splits
from onceover.extract.formats import IMAGE_SUFFIXES
from onceover.extract.layouts import UnreadDataset
from onceover.extract.listing import is_hidden, is_image
from onceover.extract.names import shown, why_no_path
from onceover.extract.tars import Member, TarError, TarImages, members

NAME = "webdataset"
PRIORITY = 32
LOOKED_FOR = "plain .tar shards"
EXAMPLE = "000.jpg and 000.txt in data-000000.tar\n001.jpg and 001.json with a caption in it"
HOLDS = ("captions", "splits")
SUFFIXES = (".tar", ".tgz", ".gz", ".zst")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_PARTS = re.compile(r"((?:.*/)?[^./]+)(\..+)")  # webdataset's: the name is what comes before the first dot
_TEXTS = (*TEXT_SUFFIXES, ".json")
_MAX_NAME = 1000  # characters of a member's name
_FIRST_TARS = 5  # that are looked at to see what tars hold, those that cannot be read apart
_MOST_TARS = 50  # those among them
_FIRST = 20_000  # members of each of them
_FIRST_AT_ADDRESS = 300  # of which each is downloaded


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """A tar, a folder of tars that hold images with text, or a pattern of tars.

    Raises:
        DatasetError: packed tars, or a pattern that no file matches.
    """
    if data.name.lower().endswith(_PACKED) and not data.is_dir():
        raise DatasetError(
            f"{data} is packed, and only plain tars can be read in place; unpack it to a plain .tar, for example with "
            "gzip -d"
        )
    files = shard_files(data, ".tar", options)
    if files is None:
        return None
    suffixes = _first_suffixes(files)
    if data.is_dir() and not _are_samples(suffixes):
        return None
    shards = _Shards(files, options)
    captions = data if data.exists() else files.root
    return UnreadDataset(files.root, captions, shards.rows, shards.images, _form(files, suffixes, options), True)


def _first_suffixes(files: ShardFiles) -> set[str]:
    """The suffixes in the first tars, up to one that has samples; in a damaged one, those before the damage."""
    suffixes: set[str] = set()
    most = _FIRST_AT_ADDRESS if is_address(files.root) else _FIRST
    readable = 0
    for name in files.names[:_MOST_TARS]:
        try:
            with open_regular(files.root / name) as file:
                for member in islice(members(file), most):
                    suffixes.add(_parts(member.name)[1])
                    if _are_samples(suffixes):
                        return suffixes
            readable += 1
        except (OSError, FileError, TarError):
            pass  # told when all are read
        if readable == _FIRST_TARS:
            break
    return suffixes


def near(data: Path, options: ReadOptions) -> str | None:
    """Why the first tar in a folder cannot be read; None where it can, or there is none."""
    files = shard_files(data, ".tar", options) if data.is_dir() else None
    if files is None:
        return None
    path = files.root / files.names[0]
    try:
        with open_regular(path) as file:
            next(members(file), None)
    except (OSError, FileError, TarError) as error:
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    return None


def _are_samples(suffixes: set[str]) -> bool:
    return bool(suffixes & IMAGE_SUFFIXES) and not suffixes.isdisjoint(_TEXTS)


def _form(files: ShardFiles, suffixes: set[str], options: ReadOptions) -> str:
    texts = [suffix for suffix in TEXT_SUFFIXES if suffix in suffixes]
    if options.caption_columns:
        captions = f"{', '.join(f'`{name}`' for name in options.caption_columns)} in .json"
    else:
        captions = f"{texts[0]}, one a line" if texts else "`caption` in .json"
    lists = [path for path in [_list_of(files.root / files.names[0])] if path.is_file()]
    count = f"{len(files.names):,} tar{'s' if len(files.names) > 1 else ''}"
    return f"webdataset, {count}, captions from {captions}{note_on_unread(lists)}"


def _list_of(shard: Path) -> Path:
    """The file in which img2dataset lists what it should fetch for a shard."""
    return shard.with_suffix(".parquet")


def _parts(name: str) -> tuple[str, str]:
    """A member's name up to its first dot, which names its sample, and its suffix from there on, in lower case."""
    parts = _PARTS.fullmatch(name)
    return (parts[1], parts[2].lower()) if parts is not None else (name, "")


class _Shards:
    """The samples of tars, which are indexed while their rows are read."""

    def __init__(self, files: ShardFiles, options: ReadOptions):
        self._files = files
        self._options = options
        self._keys: list[str] = []
        self._positions: list[tuple[int, int, int]] = []

    def rows(self) -> Iterator[Row]:
        """The captions of all tars in their order, and a row with its fault for each thing that cannot be used."""
        self._keys = []
        self._positions = []
        names = self._files.names
        for name in self._files.missing:
            yield Row(name, "", "", "no such tar")
        with ProgressBar("reading shards", "tars", total=len(names)) as bar:
            for number, split in enumerate(named_splits(names)):
                yield from self._rows_of(number, split)
                bar.update()

    def images(self, rows: Sequence[Row]) -> TarImages:
        """The images of all tars."""
        if not self._keys:
            list(self.rows())
        positions = np.array(self._positions, dtype=np.int64).reshape(-1, 3)
        prefix = f"{self._files.names[0]}/" if self._files.is_one else ""
        return TarImages(self._files.root, self._files.names, self._keys, positions, prefix)

    def _rows_of(self, number: int, split: str) -> Iterator[Row]:
        shard = self._files.names[number]
        path = self._files.root / shard
        index = _Index("" if self._files.is_one else f"{shard}/", split)
        try:
            with open_regular(path) as file:
                for member in members(file):
                    index.add(member, file)
        except TarError as error:
            index.faults.append(Row(shard, "", split, str(error)))
        except (OSError, FileError) as error:
            reason = getattr(error, "strerror", None) or error
            index.faults.append(Row(shard, "", split, f"the tar cannot be read: {reason}"))
        self._keys += [f"{shard}/{name}" for name in index.images]
        self._positions += [(number, start, size) for start, size in index.images.values()]
        for sample in index.samples.values():
            yield from sample_rows(sample, index.texts.__getitem__, self._options, split)
        yield from index.faults
        yield from index.lost()
        if _list_of(path).is_file() and not note_on_unread([_list_of(path)]):
            yield from missing_rows(_list_of(path), set(index.samples), index.prefix)


class _Index:
    """The members of one tar, as samples.

    Attributes:
        prefix: the beginning of its images' names. split: that of all its samples.
        samples: by the name that their files share. images: start and size of each, by name.
        texts: contents of the files that are no images, by prefixed name. faults: rows that cannot be used.
        dotted: images with several suffixes.
    """

    def __init__(self, prefix: str, split: str):
        self.prefix = prefix
        self.split = split
        self.samples: dict[str, Sample] = {}
        self.images: dict[str, tuple[int, int]] = {}
        self.texts: dict[str, bytes] = {}
        self.faults: list[Row] = []
        self.dotted: list[str] = []

    def lost(self) -> Iterator[Row]:
        """Images that are no sample's, since their names have a dot before the suffix, as ``2019.05.01.jpg``."""
        for name in self.dotted:
            shared, suffix = _parts(name)
            if shared not in self.samples or not self.samples[shared].image:
                reason = f"its suffix, from the first dot of its name on, is {shown(suffix)}; rename it"
                yield Row(f"{self.prefix}{name}", "", self.split, reason)

    def add(self, member: Member, file: BinaryIO) -> None:
        """Adds a member, and reads it where it is a text."""
        name = image_name(Row(member.name, ""))
        shared, suffix = _parts(name)
        is_text = suffix in _TEXTS
        if not is_text and suffix not in IMAGE_SUFFIXES:
            if is_image(name) and not is_hidden(name.rpartition("/")[2]):
                self.dotted.append(name)
            return
        fault = why_no_path(name) or member.fault
        if not fault and len(name) > _MAX_NAME:
            fault = f"a name too long: {len(name):,} characters"
        if not fault and (name in self.images or f"{self.prefix}{name}" in self.texts):
            fault = "stands twice in the tar; the first is taken"
        if not fault and is_text and member.size > MAX_SIDECAR:
            fault = f"a text too long: {member.size:,} bytes; at most {MAX_SIDECAR:,} are read"
        full_name = f"{self.prefix}{name}"
        if fault:
            self.faults.append(Row(full_name, "", self.split, fault))
            return
        sample = self.samples.setdefault(shared, Sample(f"{self.prefix}{shared}"))
        if is_text:
            file.seek(member.start)
            self.texts[full_name] = file.read(member.size)
        else:
            self.images[name] = (member.start, member.size)
        sample.add(full_name, suffix)


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """A tar for each split, of the images, each with a text."""
    for split, chosen in by_split(images).items():
        with tarfile.open(folder / f"{split or 'data'}-000000.tar", "w") as tar:
            for image in chosen:
                _add(tar, image.name, image.content)
                _add(tar, str(Path(image.name).with_suffix(".txt")), "\n".join(image.captions).encode())
    return folder


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a member to a tar."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mtime = 1
    tar.addfile(entry, io.BytesIO(content))
