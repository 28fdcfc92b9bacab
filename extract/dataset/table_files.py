"""The tables of captions in a folder, the ones of them that are taken, and the folders of their images."""

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from onceover.extract.address_images import image_folder, may_be_folder
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.caption_table import SUFFIXES, CaptionTable, open_table
from onceover.extract.dataset.image_folders import FOLDERS
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.splits import SPLIT_WORDS, SPLITS, split_of
from onceover.extract.dataset.table_form import NoCaptions, UnknownColumns
from onceover.extract.listing import is_hidden, is_image, subfolders

#: names of tables, in the order in which they are taken where several tables lie in a folder
_USUAL = ("captions", "results", "metadata", "labels", "annotations", "train")
#: folders that hold tables apart from the images
TABLE_FOLDERS = ("annotations", "captions", "metadata", "labels", "text", "tables", "csv", "anns")
_MOST = 40  # files of a kind in a folder; where there are more, they belong to the images, one to each
_BESIDE = (".txt", ".json")  # files that may belong to the image of their name
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(filter(None, SPLIT_WORDS))})(?![a-z])")


@dataclass(frozen=True)
class FolderTables:
    """The tables of captions in a folder, in the order of their names.

    Attributes:
        files: the number of files that may be tables, by their suffixes.
        unknown: why tables with texts beside images' names are passed over: no name of a column is known.
        others: why tables without a header are passed over: they hold checksums, numbers or classes.
    """

    tables: list[CaptionTable]
    files: int
    unknown: list[UnknownColumns]
    others: list[NoCaptions]


def root_of(table: Path) -> Path:
    """The folder above a table's images: the table's own folder, or the one above a folder for tables alone."""
    root = table.parent
    child = table
    while _is_for_tables(root, child):
        child = root
        root = root.parent
    return root


def _is_for_tables(folder: Path, child: Path) -> bool:
    """Whether a folder has the name of one for tables, no images, and no folder but ``child``."""
    if folder.name.lower() not in TABLE_FOLDERS and not folder.name.startswith("annotations"):
        return False
    if any(is_image(entry.name) for entry in folder.iterdir()):
        return False
    return all(entry.name == child.name for entry in subfolders(folder))


def folders_from(root: Path, table: Path) -> list[str]:
    """The folders where a table's images are looked for, relative to ``root``: beside the table, then in ``root``."""
    inside = table.parent.relative_to(root).as_posix()
    beside = [] if inside == "." else [f"{inside}/{folder}".removesuffix("/.") for folder in FOLDERS]
    return [*beside, *FOLDERS]


def split_folders(stem: str, split: str, root: Path) -> list[str]:
    """The folders of a split, in ``root`` or in a folder of images there: ``train2017``, ``images/train2017``.

    Args:
        stem: the table's name without suffix; a folder whose name ends it comes first.
    """
    folders = []
    for parent in FOLDERS:
        names = [entry.name for entry in subfolders(root / parent) if split_of(entry.name) == split]
        names.sort(key=lambda name: (not stem.endswith(name), name))
        folders += [f"{parent}/{name}".removeprefix("./") for name in names]
    return folders


def table_files(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """The files in a folder that may be tables of captions, by their suffixes, or by their names if these are given."""
    entries = list(folder.iterdir())
    images = {posixpath.splitext(entry.name)[0] for entry in entries if is_image(entry.name)}
    files = []
    for entry in entries:
        name = entry.name.lower()
        if is_hidden(name) or not name.endswith(SUFFIXES) or (names and name not in names):
            continue
        if name.endswith(_BESIDE) and posixpath.splitext(entry.name)[0] in images:
            continue  # it tells of that image
        if not entry.is_dir():
            files.append(entry)
    files.sort()
    chosen = []
    for suffix in SUFFIXES:
        same = [file for file in files if file.suffix.lower() == suffix]
        if len(same) > _MOST:
            same = [file for file in same if file.stem.lower() in _USUAL or split_of(file.stem)]
        chosen += same[:_MOST]
    return chosen


def tables_in(folder: Path, root: Path, options: ReadOptions, names: Sequence[str] = ()) -> FolderTables:
    """The tables of captions in a folder, and those that are passed over although they name images.

    Args:
        root: the folder in which images are looked for that a table names by ids.
        names: look only at files of these names.

    Raises:
        UnknownColumns: a table with a header has no known column, and no other table has a header.
    """

    def are_there(ids: Sequence[str]) -> bool:
        folders = [image_folder(root, folder) for folder in FOLDERS if may_be_folder(root / folder)]
        return any(images.has_any(ids) or images.has_near(ids) for images in folders)

    files = table_files(folder, names)
    opened = FolderTables([], len(files), [], [])
    for file in files:
        try:
            opened.tables.append(open_table(file, options, are_there))
        except UnknownColumns as error:
            opened.unknown.append(error)
        except NoCaptions as error:
            opened.others.append(error)
        except DatasetError:
            continue  # no table; where no layout fits, the message names it
    if opened.tables and opened.unknown and not any(table.named for table in opened.tables):
        raise opened.unknown[0]
    return opened


def choose_tables(paths: Sequence[Path], folder: Path, forms: Mapping[Path, str]) -> dict[Path, str]:
    """The tables to take of a folder's, each with its split: those called after splits, else the one of a usual name.

    Args:
        forms: how each table is read, where that is known. Tables called after splits belong together where their names
            are parallel (``a_train.csv``, ``a_val.csv``), or where they have the same form.

    Raises:
        DatasetError: several tables, and none of these rules says which to take.
    """
    if len(paths) == 1:
        return {paths[0]: ""}
    called = {path: split_of(path.stem) for path in paths if split_of(path.stem)}
    parallel: dict[str, dict[Path, str]] = {}
    for path, split in called.items():
        parallel.setdefault(_without_split(path.name), {})[path] = split
    whole = [group for group in parallel.values() if _has_several(group)]
    if not whole:
        usual = _of_usual_name(paths, forms)
        if usual is not None:
            return {usual: ""}
    parts = called if forms and len({forms[path] for path in called}) == 1 else {}
    if len(whole) == 1:
        same = {forms[path] for path in whole[0] if path in forms}
        parts = {path: split for path, split in called.items() if path in whole[0] or forms.get(path) in same}
    if _has_several(parts) and not _has_variants(parts):
        return dict(sorted(parts.items(), key=lambda part: SPLITS.index(part[1])))
    listed = ", ".join(path.name for path in paths[:8])
    several = "; of several splits, call one table for each after it, as train.csv, val.csv, test.csv" if called else ""
    raise DatasetError(
        f"{folder} holds {len(paths)} tables of captions ({listed}); name the one to take: --data {paths[0]}{several}"
    )


def _without_split(name: str) -> str:
    """A table's name without the word for its split."""
    return _SPLIT_WORD.sub("", name.lower())


def _has_several(parts: Mapping[Path, str]) -> bool:
    """Whether tables are of several splits."""
    return len({*parts.values()}) > 1


def _has_variants(parts: Mapping[Path, str]) -> bool:
    """Whether tables seem to be two forms of one split, as ``train.csv`` and ``train_clean.csv``.

    ``dev_seen.csv`` and ``dev_unseen.csv`` are none; they are where each has its own ``train_….csv``.
    """
    names = {path: _without_split(path.stem) for path in parts}
    with_train = {names[path] for path, split in parts.items() if split == "train"}
    for split in {*parts.values()}:
        of_split = sorted(names[path] for path in parts if parts[path] == split)
        for first, second in pairwise(of_split):
            if second.startswith(first) or not with_train.isdisjoint((first, second)):
                return True
    return False


def _of_usual_name(paths: Sequence[Path], forms: Mapping[Path, str]) -> Path | None:
    """The table whose name comes first among the usual ones; ``train`` is none where another has the same form."""
    for usual in _USUAL:
        named = [path for path in paths if path.stem.lower() == usual]
        if len(named) != 1:
            continue
        others = [form for path, form in forms.items() if path not in named]
        if usual != "train" or forms.get(named[0]) not in others:
            return named[0]
    return None
