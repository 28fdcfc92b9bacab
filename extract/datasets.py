"""Captioned-image datasets on disk: pictures with stable ids, splits by picture, and the caption -> picture map.

Four layouts are recognised by what lies in the folder: the original Flickr8k (``Flickr8k.token.txt``), Kaggle's
(``captions.txt`` and ``Images/``), a plain CSV (image, caption[, split]), and the split files of Karpathy and Fei-Fei
2015 (``dataset_*.json``: Flickr8k, Flickr30k, COCO). Pictures are named here, not opened.
"""

import csv
import hashlib
import os
import posixpath
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import MAX_TEXT, FileError, parse_json, read_bytes
from onceover.extract.ledger import Failure

SPLITS = ("train", "dev", "test")  # a picture that belongs to none of them has the split ""
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
_SPLIT_WORDS = {"": "", "val": "dev", "valid": "dev", "validation": "dev"} | {split: split for split in SPLITS}
_SPLIT_WORDS["restval"] = "train"  # COCO's validation pictures that neither validate nor test
_UNPACKED = ("Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "Images")
_PICTURE_FOLDERS = {  # where pictures may lie, by layout
    "original": _UNPACKED,
    "kaggle": ("Images", "images", "."),
    "csv": (".", "Images", "images"),
    "karpathy": (".", *_UNPACKED, "images", "flickr30k-images", "flickr30k_images"),
}
_KARPATHY = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json")
_SPLIT_LIST = "Flickr_8k.{}Images.txt"
MAX_CAPTION = 100_000  # characters; encoders read a few hundred
_MAX_RECORD = 2**17  # characters of a record of several lines; a quote that is open for longer was never closed
_SHOWN = 80  # characters of a name that a message repeats
_ABSENT = "no such file"
_MAX_ID = 300  # characters of a name in the ledger
_SYSTEM_FOLDERS = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information"}
csv.field_size_limit(MAX_TEXT - 1)  # a long cell is a matter for the ledger (``MAX_CAPTION``), not for the parser
_LOOKS_LIKE_A_RECORD = re.compile(r'(^|,)"?[^",]+\.(jpe?g|png|gif|bmp|webp|tiff?)"?(,|$)', re.IGNORECASE)


class DatasetError(OnceoverError):
    """A dataset that cannot be read, or that would give wrong results."""


@dataclass(frozen=True)
class Dataset:
    """N pictures with M captions, in the order of the captions file.

    ``paths`` are relative to ``root``; ``image_index[m]`` is the picture of caption m (int64). ``failures`` holds
    each record that was left out, ``notes`` what the user should be told.
    """

    root: Path
    layout: str
    ids: list[str]
    paths: list[str]
    splits: list[str]
    captions: list[str]
    image_index: np.ndarray
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def first(self, limit: int | None) -> "Dataset":
        """The first ``limit`` pictures and their captions."""
        if limit is None or limit >= len(self.ids):
            return self
        kept = np.flatnonzero(self.image_index < limit)
        return replace(
            self,
            ids=self.ids[:limit],
            paths=self.paths[:limit],
            splits=self.splits[:limit],
            captions=[self.captions[m] for m in kept],
            image_index=self.image_index[kept],
            notes=[*self.notes, f"limited to the first {limit:,} of {len(self.ids):,} pictures"],
        )


def read_dataset(data: str | Path, seed: int = 0) -> Dataset:
    """Reads the dataset in the folder ``data`` (or of the CSV or JSON file ``data``).

    Official split lists beside the captions are used; without them pictures are assigned to train, dev and test
    (80, 10, 10 %) by a hash of ``seed`` and their id, so that a picture keeps its split when others are added.
    Pictures without captions go into the ledger; a CSV or JSON file is the list of what belongs to the dataset, so
    that others beside it are none of its business.

    Raises:
        DatasetError: nothing readable there, no usable picture, or a picture in two splits.
    """
    data = Path(data)
    if not data.exists():
        raise DatasetError(f"{data} does not exist; name the dataset's folder, or its CSV or JSON file")
    captions_file, layout = _find_captions(data)
    root = captions_file.parent if data.is_file() else data
    read_rows = {"original": _token_rows, "karpathy": _karpathy_rows}.get(layout, csv_rows)
    dataset = _assemble(root, layout, list(read_rows(captions_file)), captions_file)
    return dataset if any(dataset.splits) else _with_splits(dataset, captions_file, seed)


def read_pictures(folder: str | Path) -> Dataset:
    """Every picture in a folder and the folders below it, without captions, in no split; a picture's id is its path.

    Raises:
        DatasetError: no folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder; name one that holds pictures")
    listing = _list_files(folder)
    images = sorted(filter(_is_image, listing.names), key=lambda name: name.split("/"))
    failures = listing.failures
    paths = []
    for name in images:
        reason = _why_unreadable(folder / name) if _is_text(name) else "its name is not UTF-8"
        if reason:
            failures.append(Failure(name, "dataset", reason))
        else:
            paths.append(name)
    if not paths:
        reason = f"; the first reason: {failures[0].id}: {failures[0].reason}" if failures else ""
        raise DatasetError(f"{folder} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}){reason}")
    others = len(listing.names) - len(images)
    notes = [f"other files in {folder}, left alone: {others:,} (no pictures by their names)"] if others else []
    if listing.hidden:
        notes.append(f"hidden images and folders in {folder}, left alone: {listing.hidden:,} (as ._a.jpg and @eaDir)")
    return Dataset(folder, "folder", paths, list(paths), [""] * len(paths), [], np.empty(0, np.int64), failures, notes)


def read_captions(file: str | Path) -> Dataset:
    """The sentences of a text file, one a line, without pictures; what is no sentence goes into the ledger.

    Raises:
        DatasetError: an unreadable file, or one without sentences.
    """
    file = Path(file)
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(_read_lines(file), 1)]
    while lines and not lines[-1][1]:
        lines.pop()  # the file's last line break is no empty line
    failures = [Failure(name, "dataset", reason) for name, line in lines if (reason := _why_unusable(line))]
    captions = [line for _, line in lines if not _why_unusable(line)]
    if not captions:
        raise DatasetError(f"{file} holds no sentences; write one a line")
    index = np.full(len(captions), -1, np.int64)
    return Dataset(file.parent, "lines", [], [], [], captions, index, failures, [])


def read_ids(file: str | Path) -> list[str]:
    """The pictures' ids in a text file, one a line.

    Raises:
        DatasetError: an unreadable file, an empty line, or an id that stands twice.
    """
    ids = [line.strip() for line in _read_lines(Path(file))]
    while ids and not ids[-1]:
        ids.pop()
    first: dict[str, int] = {}
    for number, name in enumerate(ids, 1):
        if not name or "\0" in name:
            raise DatasetError(f"{file}, line {number}: there is no usable id; write one a line")
        if first.setdefault(name, number) != number:
            raise DatasetError(
                f"{file}, line {number}: {_shown(name)} stands in line {first[name]} too; an id has one row"
            )
    return ids


def captioned(
    rows: list[tuple[str, str, str]], source: Path, root: Path, gallery: list[str] | None = None, seed: int = 0
) -> tuple[Dataset, np.ndarray]:
    """A dataset of pictures that need not be at hand, from the rows (picture, caption, split) of the table ``source``.

    Pictures keep the names that the table gives them, in the order of their first row, and those without a usable
    caption go into the ledger; or they are those of ``gallery``, where one without captions is in no split.

    Returns:
        The dataset, and the row of each of its captions, int64 (M,).

    Raises:
        DatasetError: no usable row, or a picture in two splits.
    """
    names = [name.strip() for name, _, _ in rows]
    known = set(names if gallery is None else gallery)
    left_out = {name: _why_no_id(name, known) for name in names}
    kept, failures = _usable(names, rows, left_out)
    usable = {names[row] for row in kept}
    ids = [name for name in left_out if name in usable]
    if gallery is None:
        failures += [Failure(name, "dataset", "no usable caption") for name in _without_captions(left_out, ids)]
    if not ids:
        reason = f"; the first reason: {failures[0].id}: {failures[0].reason}" if failures else ""
        raise DatasetError(f"{source} holds no usable caption{reason}")
    named = [row for row, name in enumerate(names) if name]
    splits = _column_splits([names[row] for row in named], [rows[row][2] for row in named], source)
    of_ids, captions = [splits[name] for name in ids], [rows[row][1].strip() for row in kept]
    index = _places(ids, [names[row] for row in kept])
    dataset = Dataset(root, "table", ids, ids, of_ids, captions, index, failures)
    if not any(of_ids):
        dataset = _with_splits(dataset, source, seed)
    if gallery is not None:
        chosen = dict(zip(ids, dataset.splits, strict=True))
        index = _places(gallery, [names[row] for row in kept])
        of_ids = [chosen.get(name, "") for name in gallery]
        dataset = replace(dataset, ids=gallery, paths=gallery, splits=of_ids, image_index=index)
    return dataset, np.array(kept, dtype=np.int64)


def _why_no_id(name: str, known: set[str]) -> str | None:
    if not name:
        return "no picture is named"
    if "\0" in name:
        return "a name with a NUL character"
    return None if name in known else "not among the image ids"


def _find_captions(data: Path) -> tuple[Path, str]:
    if data.is_file():
        if data.suffix.lower() == ".json":
            return data, "karpathy"
        if data.suffix.lower() not in (".csv", ".txt"):
            raise DatasetError(f"{data} is neither a folder nor a CSV or JSON file; name the dataset's folder")
        return data, "original" if data.name.endswith(".token.txt") else "csv"
    for name in _KARPATHY:  # the published splits are in it, whatever else lies there
        if (data / name).is_file():
            return data / name, "karpathy"
    for name in ("Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt"):
        if (data / name).is_file():
            return data / name, "original"
    if (data / "captions.txt").is_file():
        return data / "captions.txt", "kaggle"
    tables = sorted(data.glob("*.csv"))
    if len(tables) == 1:
        return tables[0], "csv"
    if tables:
        raise DatasetError(f"{data} holds {len(tables)} CSV files; name one of them: --data {tables[0]}")
    raise DatasetError(
        f"{data} holds no captions: looked for captions.txt (with Images/), Flickr8k.token.txt "
        f"(with Flicker8k_Dataset/), {', '.join(_KARPATHY)} and a .csv with the columns image,caption"
    )


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file, whose ends are LF, CR LF or, where it has no LF, CR."""
    text = _read_text(path)
    if "\n" not in text:
        text = text.replace("\r", "\n")
    # not str.splitlines(), which also breaks lines at form feeds and Unicode separators inside captions
    return text.replace("\r\n", "\n").split("\n")


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DatasetError(f"{path} is not UTF-8 (line {line}); convert it, for example with iconv") from error
    except FileError as error:
        raise DatasetError(f"{error}; name another file") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


def _token_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(picture, caption, "") from lines ``name.jpg#0<tab>caption``."""
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        if not tab or not mark:
            raise DatasetError(f"{path}, line {number}: expected name.jpg#0, a tab and a caption")
        yield name, caption, ""


def _karpathy_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(picture, caption, split) from ``images`` with ``filename``, perhaps ``filepath``, ``split`` and ``sentences``.

    Raises:
        DatasetError: not such a file.
    """
    try:
        pictures = parse_json(_read_text(path))["images"]
    except (ValueError, TypeError, KeyError):
        pictures = None
    if not isinstance(pictures, list):
        raise DatasetError(f"{path} has no list of images; name a split file such as dataset_flickr8k.json, or a CSV")
    for number, picture in enumerate(pictures):
        try:
            name = posixpath.join(picture.get("filepath") or "", picture["filename"])
            captions = [sentence["raw"] for sentence in picture["sentences"]] or [""]
            rows = [(name, caption.strip(), picture["split"].strip()) for caption in captions]
        except (AttributeError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path}: picture {number} of images needs filename, split and sentences, each with its raw text"
            ) from error
        yield from rows


def csv_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(picture, caption, split) from a CSV with a header.

    A two-column file may leave captions with commas or stray quotes unquoted, as published copies do: what follows
    the first comma is then the caption, verbatim.

    Raises:
        DatasetError: unreadable, no such columns, or a line of another number of fields.
    """
    lines = _read_lines(path)
    columns, _ = _csv_record(lines[:1], 0)
    header = [name.strip().lower() for name in columns or ()]
    if "image" not in header or "caption" not in header:
        raise DatasetError(f"{path} needs a first line with the columns image,caption[,split]; it has {lines[0]!r:.80}")
    image, caption = header.index("image"), header.index("caption")
    split = header.index("split") if "split" in header else None
    position = 1
    while position < len(lines):
        fields, taken = _csv_record(lines, position)
        if not lines[position].strip():
            position += 1
            continue
        if fields is None or len(fields) != len(header):
            fields, taken = lines[position].split(",", 1), 1
            if header != ["image", "caption"] or len(fields) != 2:
                raise DatasetError(
                    f"{path}, line {position + 1}: expected {len(header)} fields ({_shown(','.join(header))}); "
                    "quote captions that contain commas"
                )
        yield fields[image], fields[caption], fields[split] if split is not None else ""
        position += taken


def _csv_record(lines: list[str], position: int) -> tuple[list[str] | None, int]:
    """The fields of the record that starts at ``position`` and the lines it takes; None where quoting is broken.

    Only a quote that is left open makes a record run over a line's end, and never into a line that looks like a record.
    """
    record = lines[position]
    taken = 1
    while True:
        try:
            return next(csv.reader([record], strict=True), []), taken
        except csv.Error as error:
            if "unexpected end of data" not in str(error):
                return None, 1
        following = _to_closing_quote(lines, position + taken)
        if following is None or len(record) + len(following) > _MAX_RECORD:
            return None, 1
        taken += following.count("\n") + 1
        record += f"\n{following}"


def _to_closing_quote(lines: list[str], position: int) -> str | None:
    """The lines from ``position`` to the first that can close a quote, which has an odd number of them.

    None where none comes soon, or one before it looks like a record.
    """
    size = 0
    for end in range(position, len(lines)):
        size += len(lines[end]) + 1
        if size > _MAX_RECORD or _LOOKS_LIKE_A_RECORD.search(lines[end]):
            return None
        if lines[end].count('"') % 2:
            return "\n".join(lines[position : end + 1])
    return None


def _assemble(root: Path, layout: str, rows: list, source: Path) -> Dataset:
    names = [posixpath.normpath(name.strip().replace("\\", "/")) for name, _, _ in rows]
    if not names:
        raise DatasetError(f"{source} holds no captions; is the download complete?")
    folder = _picture_folder(root, _PICTURE_FOLDERS[layout], names, source)
    files, left_out = _files_of(root, folder, names)
    splits = _column_splits(names, [row[2] for row in rows], source)
    kept, failures = _usable(names, rows, left_out)
    ids = list(dict.fromkeys(names[row] for row in kept))
    failures += [Failure(name, "dataset", "no usable caption") for name in _without_captions(left_out, ids)]
    if layout in ("original", "kaggle"):
        failures += _pictures_without_captions(root, folder, {*left_out, *files.values()})
    if not ids:
        raise DatasetError(f"{source}: no picture is usable; the first reason: {failures[0].id}: {failures[0].reason}")
    renamed = sum(files[name] != name for name in ids)
    return Dataset(
        root=root,
        layout=layout,
        ids=ids,
        paths=[posixpath.normpath(posixpath.join(folder, files[name])) for name in ids],
        splits=[splits[name] for name in ids],
        captions=[rows[row][1].strip() for row in kept],
        image_index=_places(ids, [names[row] for row in kept]),
        failures=failures,
        notes=[f"images whose names differ in case, Unicode form or blanks, taken: {renamed:,}"] if renamed else [],
    )


def _usable(names: list[str], rows: list, left_out: dict[str, str | None]) -> tuple[list[int], list[Failure]]:
    """The rows whose picture and caption can be used, and a failure for each other one."""
    kept, failures = [], []
    for row, (name, (_, caption, _)) in enumerate(zip(names, rows, strict=True)):
        caption = caption.strip()
        reason = left_out[name] or _why_unusable(caption)
        if reason:
            stage = "dataset" if left_out[name] else "caption"
            failures.append(Failure(name[:_MAX_ID] or f"row {row + 1}", stage, f"{reason}: {caption[:60]!r}"))
        else:
            kept.append(row)
    return kept, failures


def _without_captions(left_out: dict[str, str | None], captioned: list[str]) -> list[str]:
    known = set(captioned)
    return [name for name in left_out if not left_out[name] and name not in known]


def _places(ids: list[str], names: list[str]) -> np.ndarray:
    """The place of each name among the ids, int64."""
    place = {name: number for number, name in enumerate(ids)}
    return np.array([place[name] for name in names], dtype=np.int64)


class _NearNames:
    """The names below a folder that equal one up to case, Unicode form and outer blanks; it is listed when asked."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._listed: dict[str, dict[str, list[str]]] = {}

    def files(self, name: str) -> list[str]:
        """The regular files that ``name`` may mean; where they are several, it is not known which."""
        candidates = [""]
        for part in name.split("/"):
            following: list[str] = []
            for parent in candidates:
                entries = self._entries(parent).get(_near_form(part), [])
                following += [posixpath.join(parent, entry) for entry in entries]
            candidates = following
        return [file for file in candidates if _is_text(file) and not _why_unreadable(self._folder / file)]

    def _entries(self, parent: str) -> dict[str, list[str]]:
        if parent not in self._listed:
            entries: dict[str, list[str]] = {}
            for entry in _entries_of(self._folder / parent):
                entries.setdefault(_near_form(entry), []).append(entry)
            self._listed[parent] = entries
        return self._listed[parent]


def _entries_of(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where it is no folder or cannot be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except (OSError, ValueError):
        return []


def _near_form(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.strip()).casefold())


def _picture_folder(root: Path, folders: tuple[str, ...], names: list[str], source: Path) -> str:
    """The first folder with one of the files by its very name, else the first with one by a near name."""
    different = [name for name in dict.fromkeys(names) if not _why_no_path(name)]
    for folder in folders:
        if any(not _why_unreadable(root / folder / name) for name in different):
            return folder
    for folder in folders:
        near = _NearNames(root / folder)
        if any(near.files(name) for name in different):
            return folder
    places = ", ".join(str(root / folder) for folder in folders)
    raise DatasetError(
        f"none of the pictures that {source} names is there (the first: {_shown(names[0])}); looked in {places}"
    )


def _files_of(root: Path, folder: str, names: list[str]) -> tuple[dict[str, str], dict[str, str | None]]:
    """The file in ``folder`` of each name, and why a name is left out, or None.

    A file by a near name is taken where it is the only one, and no other name means it.
    """
    files: dict[str, str] = {}
    left_out: dict[str, str | None] = {}
    meant: dict[str, list[str]] = {}
    near = _NearNames(root / folder)
    for name in dict.fromkeys(names):
        files[name] = name
        left_out[name] = _why_no_path(name) or _why_unreadable(root / folder / name)
        if left_out[name] == _ABSENT:
            meant[name] = near.files(name)
    wanted = Counter(file for candidates in meant.values() for file in candidates)
    for name, candidates in meant.items():
        if len(candidates) == 1 and wanted[candidates[0]] == 1 and candidates[0] not in left_out:
            files[name] = candidates[0]
            left_out[name] = None
        else:
            hint = f" (near is {_shown(candidates[0])})" if candidates else ""
            left_out[name] = f"no such picture in {folder}/{hint}"
    return files, left_out


def _why_no_path(name: str) -> str | None:
    """Why a name leads to no file below the data folder, or None."""
    if name.startswith(("/", "../")) or name == ".." or "\0" in name:
        return "its path leaves the data folder"
    return None if _is_text(name) else "a name with half a character"


def _why_unreadable(path: Path) -> str | None:
    """Why a path is no regular file, or None."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _ABSENT
    except OSError as error:
        return error.strerror
    except ValueError:
        return "a name with a NUL character"
    return None if stat.S_ISREG(mode) else "no regular file"


class _Listing(NamedTuple):
    """The files below a folder by their paths from it, the hidden entries left out, and folders that cannot be read."""

    names: list[str]
    hidden: int
    failures: list[Failure]


def _list_files(folder: Path) -> _Listing:
    """All files below a folder, without what is hidden and what systems put beside people's files. No link is followed.

    Raises:
        DatasetError: the folder itself cannot be read.
    """
    errors: list[OSError] = []
    names: list[str] = []
    hidden = 0
    for parent, folders, files in os.walk(folder, onerror=errors.append):
        shown = [name for name in folders if not _is_hidden(name)]
        hidden += len(folders) - len(shown) + sum(_is_hidden(name) and _is_image(name) for name in files)
        folders[:] = shown
        base = Path(parent).relative_to(folder)
        names += [(base / name).as_posix() for name in files if not _is_hidden(name)]
    failures = []
    for error in errors:
        if Path(error.filename) == folder:
            raise DatasetError(f"{folder} cannot be read: {error.strerror}") from error
        name = Path(error.filename).relative_to(folder).as_posix()
        failures.append(Failure(name, "dataset", f"a folder that cannot be read: {error.strerror}"))
    return _Listing(names, hidden, failures)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES


def _shown(name: str) -> str:
    """A name for a message: on one line, and cut where it is long."""
    text = name[:_SHOWN]
    return text if text.isprintable() else f"{text!r}"


def _is_text(text: str) -> bool:
    """Whether it can be written down: JSON and file names can hold halves of characters (lone surrogates)."""
    return text.encode("utf-8", "ignore").decode() == text


def _why_unusable(caption: str) -> str | None:
    if not caption:
        return "empty caption"
    if "\0" in caption:
        return "caption with a NUL character"
    if len(caption) > MAX_CAPTION:
        return f"caption of {len(caption):,} characters, more than {MAX_CAPTION:,}"
    return None if _is_text(caption) else "caption with half a character"


def _column_splits(names: list[str], words: list[str], source: Path) -> dict[str, str]:
    splits: dict[str, str] = {}
    for name, word in zip(names, words, strict=True):
        split = _SPLIT_WORDS.get(word.strip().lower())
        if split is None:
            raise DatasetError(f"{source}: {_shown(name)} has the split {word!r:.80}; use train, dev or test")
        if splits.setdefault(name, split) != split:
            raise DatasetError(
                f"{source}: {_shown(name)} is in two splits ({splits[name]!r}, {split!r}); a picture has one"
            )
    return splits


def _pictures_without_captions(root: Path, folder: str, known: set[str]) -> list[Failure]:
    listing = _list_files(root / folder)
    others = [name for name in sorted(listing.names) if _is_image(name) and name not in known]
    return [*listing.failures, *(Failure(name, "dataset", "picture without captions") for name in others)]


def _with_splits(dataset: Dataset, captions_file: Path, seed: int) -> Dataset:
    """Splits from the official lists, where they lie in the data folder or beside the captions, else seeded ones."""
    chosen: dict[str, str] = {}
    used = []
    for split in SPLITS:
        for folder in dict.fromkeys((dataset.root, captions_file.parent)):
            path = folder / _SPLIT_LIST.format(split)
            if not path.is_file():
                continue
            used.append(path.name)
            for name in filter(None, map(str.strip, _read_lines(path))):
                if chosen.setdefault(name, split) != split:
                    raise DatasetError(
                        f"{path}: {_shown(name)} is in the list of {chosen[name]} too; a picture has one split"
                    )
            break
    if not used:
        splits = [_seeded_split(name, seed) for name in dataset.ids]
        counts = ", ".join(f"{splits.count(split):,} {split}" for split in SPLITS)
        note = f"no split lists found: split by picture with seed {seed} ({counts}); this is not the published split"
        return replace(dataset, splits=splits, notes=[*dataset.notes, note])
    absent = sorted(chosen.keys() - set(dataset.ids))
    failures = []
    for name in absent:
        failures.append(Failure(name[:_MAX_ID], "split", f"listed in {chosen[name]}, but not a usable picture"))
    return replace(
        dataset,
        splits=[chosen.get(name, "") for name in dataset.ids],
        failures=dataset.failures + failures,
        notes=[*dataset.notes, f"splits from {', '.join(used)}"],
    )


def _seeded_split(image_id: str, seed: int) -> str:
    share = int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "dev" if share < 0.9 else "test"
