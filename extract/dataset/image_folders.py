"""The folder that holds the images of a table: looked for where datasets usually have it, then below the root."""

import posixpath
from collections.abc import Sequence
from pathlib import Path

from onceover.base.addresses import is_address
from onceover.extract.address_images import image_folder, may_be_folder
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.rows import Row, image_name
from onceover.extract.image_source import FolderImages
from onceover.extract.listing import subfolders
from onceover.extract.names import shown

#: the folders in which the images of a table are looked for
FOLDERS = (
    *(".", "Images", "images", "image", "imgs", "img", "photos", "pictures", "JPEGImages"),
    *("Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "flickr30k-images", "flickr30k_images"),
)
_FIRST = 100  # names by which a folder of another name than these is recognised
_MOST_FOLDERS = 200  # folders that are searched for images


def folder_images(rows: Sequence[Row], root: Path, captions: Path, folders: Sequence[str]) -> FolderImages:
    """The images that rows name, in the first of several folders that has one of them.

    First a folder is taken that has a file of exactly such a name, then one with a near name; then names are tried
    without the folder that they all begin with, such as another machine's; last, the only folder below ``root`` that
    has one of the first images is taken.

    Args:
        captions: the file with the rows, for the error. folders: relative to ``root``.

    Raises:
        DatasetError: no folder has any of them.
    """
    names = _names(rows, root)
    if not names:
        raise DatasetError(f"{captions} names no image; say which column does with --image-column")
    there = _first_with(names, root, folders)
    if there is not None:
        return there
    first = names[:_FIRST]
    below = [images for images in _folders_below(root) if images.has_any(first) or images.has_near(first)]
    if below:
        most = _with_all(below, first)
        if most is not None:
            return most
        several = " and ".join(str(root / images.folder) for images in below[:2])
        raise DatasetError(f"images that {captions} names are in {several}; say which to take with --images-root")
    if names[0].startswith(("http:/", "https:/")):
        raise DatasetError(
            f"{captions} names images by their addresses ({shown(names[0])}); download them first, for example with "
            "img2dataset, and name the folder that they are in then"
        )
    searched = ", ".join(str(root / images.folder) for images in _candidates(root, folders)) or str(root)
    raise DatasetError(
        f"none of the images that {captions} names is there (the first: {shown(names[0])}); looked in {searched}; "
        "name their folder with --images-root"
    )


def images_in(rows: Sequence[Row], root: Path, folders: Sequence[str]) -> FolderImages | None:
    """The images that rows name, in the first of several folders that has one of them; None where none has.

    The order is that of ``folder_images``; folders below these are not searched.
    """
    return _first_with(_names(rows, root), root, folders)


def _first_with(names: Sequence[str], root: Path, folders: Sequence[str]) -> FolderImages | None:
    """As ``images_in``, of the images of these names."""
    candidates = _candidates(root, folders)
    for images in candidates:
        if images.has_any(names):
            return images if is_address(root) else _fullest(images, candidates, names[:_FIRST])
    for images in candidates:
        if images.has_near(names):
            return images
    return _of_another_root(names, root, folders)


def _names(rows: Sequence[Row], root: Path) -> list[str]:
    """The names that rows give their images, each once."""
    start = image_folder(root)
    return list(filter(None, dict.fromkeys(start.local(image_name(row)) for row in rows)))


def _candidates(root: Path, folders: Sequence[str]) -> list[FolderImages]:
    """Those of the folders that are there, as sources of images."""
    return [image_folder(root, folder) for folder in dict.fromkeys(folders) if may_be_folder(root / folder)]


def _with_all(candidates: Sequence[FolderImages], names: Sequence[str]) -> FolderImages | None:
    """The one of several sources that has all images that any of them has; None where none has, or several have."""
    present = []
    for images in candidates:
        _, reasons = images.resolve(names)
        present.append({name for name in names if reasons[name] is None})
    every = set().union(*present)
    full = [images for images, named in zip(candidates, present, strict=True) if named == every]
    return full[0] if len(full) == 1 else None


def _fullest(images: FolderImages, candidates: Sequence[FolderImages], names: Sequence[str]) -> FolderImages:
    """``images`` where it has half of some names, else the folder that has most: a few samples may lie elsewhere."""

    def count(folder: FolderImages) -> int:
        return sum(folder.has_any([name]) for name in names)

    if 2 * count(images) >= len(names):
        return images
    return max([images, *candidates, *_folders_below(images.root)], key=count)


def _of_another_root(names: Sequence[str], root: Path, folders: Sequence[str]) -> FolderImages | None:
    """The images of names that all begin with a folder that is not here, where the rest of a name is a file here."""
    names = [name for name in names if "/" in name]
    if not names:
        return None
    folders_of = [name.split("/")[:-1] for name in names]
    shared = posixpath.commonprefix(folders_of)
    for dropped in range(1, len(shared) + 1):
        prefix = "/".join(shared[:dropped]) + "/"
        first = [name[len(prefix) :] for name in names[:_FIRST]]
        for folder in dict.fromkeys(folders):
            images = image_folder(root, folder, prefix)
            if images.has_any(first) or images.has_near(first):
                return images
    return None


def _folders_below(root: Path) -> list[FolderImages]:
    """The folders in ``root`` and those in them, in order, as sources of images."""
    folders: list[str] = []
    for first in subfolders(root)[:_MOST_FOLDERS]:
        folders.append(first.name)
        folders += [f"{first.name}/{second.name}" for second in subfolders(first)[:_MOST_FOLDERS]]
    return [image_folder(root, folder) for folder in folders]
