"""The tables of captions in a folder, the ones of them that are taken, and the folders of their images."""

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from onceover.extract.address_images import image_folder, may_be_folder
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.caption_table import SUFFIXES, CaptionTable, open_table
from onceover.extract.dataset.image_folders import FOLDERS
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.splits import SPLIT_WORDS, SPLITS, split_of
from onceover.extract.listing import is_hidden, is_image, subfolders

#: names of tables, in the order in which they are taken where several tables lie in a folder
_USUAL = ("captions", "results", "metadata", "labels", "annotations", "train")
#: folders that hold tables apart from the images
TABLE_FOLDERS = ("annotations", "captions", "metadata", "labels", "text", "tables", "csv", "anns")
_MOST = 40  # files of a kind in a folder; where there are more, they belong to the images, one to each
_BESIDE = (".txt", ".json")  # files that may belong to the image of their name
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(filter(None, SPLIT_WORDS))})(?![a-z])")


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


def tables_in(folder: Path, root: Path, options: ReadOptions, names: Sequence[str] = ()) -> list[CaptionTable]:
    """The tables of captions in a folder.

    Args:
        root: the folder in which images are looked for that a table names by ids.
        names: look only at files of these names.
    """

    def are_there(ids: Sequence[str]) -> bool:
        folders = [image_folder(root, folder) for folder in FOLDERS if may_be_folder(root / folder)]
        return any(images.has_any(ids) or images.has_near(ids) for images in folders)

    tables = []
    for file in table_files(folder, names):
        try:
            tables.append(open_table(file, options, are_there))
        except DatasetError:
            continue  # no table; where no layout fits, the message names it
    return tables


def choose_tables(paths: Sequence[Path], folder: Path) -> dict[Path, str]:
    """The tables to take of a folder's, each with its split: one for each split, else the one with a usual name.

    Raises:
        DatasetError: several tables, and none of these rules says which to take.
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
