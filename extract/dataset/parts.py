"""Which of a folder's tables of captions are taken: the only one, that of a usual name, or one for each split."""

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from onceover.extract.address_images import image_folder, may_be_folder
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.caption_table import SUFFIXES, CaptionTable, open_table
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import FOLDERS
from onceover.extract.dataset.splits import SPLIT_WORDS, SPLITS
from onceover.extract.listing import is_hidden, is_image, subfolders

#: names of tables, in the order in which they are taken where several tables lie in a folder
_USUAL = ("captions", "results", "metadata", "labels", "annotations", "train")
#: folders that hold tables apart from the images
TABLE_FOLDERS = ("annotations", "captions", "metadata", "labels", "text", "tables", "csv", "anns")
_MOST = 40  # files of a kind in a folder; where there are more, they belong to the images, one to each
_BESIDE = (".txt", ".json")  # files that may belong to the image of their name
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(filter(None, SPLIT_WORDS))})(?![a-z])")


def split_of(name: str) -> str:
    """The split that a file's or folder's name tells of, as ``train2017`` does; "" where it tells of none."""
    words = _SPLIT_WORD.findall(name.lower())
    return SPLIT_WORDS[words[0]] if len(words) == 1 else ""


def root_of(table: Path) -> Path:
    """The folder that holds a table's images: its own, or the one above a folder that holds nothing but tables."""
    root = table.parent
    left = table
    while _is_for_tables(root, left):
        left = root
        root = root.parent
    return root


def _is_for_tables(folder: Path, left: Path) -> bool:
    """Whether a folder is called so, and has no images and no folders, but the one that was just left."""
    if folder.name.lower() not in TABLE_FOLDERS and not folder.name.startswith("annotations"):
        return False
    if any(is_image(entry.name) for entry in folder.iterdir()):
        return False
    return all(entry.name == left.name for entry in subfolders(folder))


def folders_from(root: Path, table: Path) -> list[str]:
    """Where a table's images are looked for, relative to ``root``: about the table, then about ``root``."""
    inside = table.parent.relative_to(root).as_posix()
    near = [] if inside == "." else [f"{inside}/{folder}".removesuffix("/.") for folder in FOLDERS]
    return [*near, *FOLDERS]


def split_folders(stem: str, split: str, root: Path) -> list[str]:
    """The folders that are called after a split, beside a table or in a folder of images: ``images/train2017``.

    Args:
        stem: the table's name; a folder with which it ends comes first.
    """
    folders = []
    for parent in FOLDERS:
        place = root / parent
        names = [entry.name for entry in subfolders(place) if split_of(entry.name) == split]
        names.sort(key=lambda name: (not stem.endswith(name), name))
        folders += [f"{parent}/{name}".removeprefix("./") for name in names]
    return folders


def files_in(folder: Path, names: Sequence[str] = ()) -> list[Path]:
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


def tables_in(folder: Path, root: Path, options: ReadOptions, names: Sequence[str] = ()) -> list[CaptionTable]:
    """The files in a folder that are tables of captions, in a form that is understood.

    Args:
        root: where images are looked for, where a table names them by ids. names: the only names that are looked at.
    """

    def are_there(ids: Sequence[str]) -> bool:
        places = [image_folder(root, place) for place in FOLDERS if may_be_folder(root / place)]
        return any(images.has_any(ids) or images.has_near(ids) for images in places)

    tables = []
    for file in files_in(folder, names):
        try:
            tables.append(open_table(file, options, are_there))
        except DatasetError:
            continue  # another file, which the message tells of where nothing is found
    return tables


def chosen(paths: Sequence[Path], folder: Path) -> dict[Path, str]:
    """The tables to take of those in a folder, with their splits: one for each split, else the one of a usual name.

    Raises:
        DatasetError: it cannot be told which.
    """
    if len(paths) == 1:
        return {paths[0]: ""}
    groups: dict[str, dict[str, Path]] = {}
    for path in paths:
        split = split_of(path.stem)
        if split:
            others = _SPLIT_WORD.sub("", path.name.lower())
            groups.setdefault(others, {}).setdefault(split, path)
    whole = [group for group in groups.values() if len(group) > 1]
    if len(whole) == 1:
        return {whole[0][split]: split for split in SPLITS if split in whole[0]}
    for usual in _USUAL:
        named = [path for path in paths if path.stem.lower() == usual]
        if len(named) == 1 and not whole:
            return {named[0]: ""}
    listed = ", ".join(path.name for path in paths[:8])
    raise DatasetError(
        f"{folder} holds {len(paths)} tables of captions ({listed}); name the one to take: --data {paths[0]}"
    )
