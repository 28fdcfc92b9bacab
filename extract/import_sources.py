"""The sources of an import: image features, the image of each of their rows, and captions with images and splits.

A caption table names the images; the lines of a text file, and the files that VSE++'s authors published and others
followed (``train_ims.npy``, ``train_caps.txt``), have so many captions for each image, in their order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.extract.arrays import Array, files_of, join_arrays, open_array
from onceover.extract.dataset.caption_table import SUFFIXES, open_table
from onceover.extract.dataset.parquet import parquet_rows
from onceover.extract.dataset.reading import DEFAULT, ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.splits import SPLITS
from onceover.extract.dataset.table import read_ids
from onceover.extract.dataset.text import read_lines
from onceover.extract.names import shown

_IMAGES = "{}_ims.npy"
_CAPTIONS = "{}_caps.txt"


class ImportingError(OnceoverError):
    """Features and captions that do not belong together."""


@dataclass(frozen=True)
class ImportSource:
    """Image features and captions that belong together.

    Attributes:
        images: the image features. owners: the image of each of their rows.
        rows: the captions. captions: the file or folder that they come from.
        ids: the images of the store, where the user lists them; None: those of the rows.
    """

    images: Array
    owners: list[str]
    rows: list[Row]
    captions: Path
    ids: list[str] | None = None


def source_of_table(
    image_features: Path, captions: Path, image_ids: Path | None, reading: ReadOptions = DEFAULT
) -> ImportSource:
    """The images that a caption table names.

    The image features have a row for each different image of the table, in the order of their first appearance, or one
    for each row of the table, or one for each line of ``image_ids``, or an array for the name of each image.

    Raises:
        ArrayError, DatasetError: files that cannot be read or used. ImportingError: they do not belong together.
    """
    images = open_array(image_features, (2, 3))
    rows = read_rows(captions, reading)
    names = [row.image.strip() for row in rows]
    if image_ids is not None:
        ids = read_ids(image_ids)
        if len(ids) != len(images):
            raise ImportingError(f"{images.source} has {len(images):,} rows, and {image_ids} has {len(ids):,} ids")
        return ImportSource(images, ids, rows, captions, ids)
    if images.names is not None:
        ids = _names_in_table(images, images.names, names, captions)
        return ImportSource(images, ids, rows, captions, ids)
    different = list(dict.fromkeys(filter(None, names)))
    for owners in (different, names):
        if len(owners) == len(images):
            return ImportSource(images, owners, rows, captions)
    raise ImportingError(
        f"{images.source} has {len(images):,} rows, and {captions} has {len(names):,} rows with {len(different):,} "
        "different images; give a row for each of these or those, or say which images they are with --image-ids"
    )


def read_rows(captions: Path, reading: ReadOptions = DEFAULT) -> list[Row]:
    """The rows of a caption table: a text file, a ``.parquet`` file, or a folder of the latter.

    Raises:
        ArrayError, DatasetError: not there, not readable, or without the columns.
    """
    files = files_of(captions, (".parquet",) if captions.is_dir() else (*SUFFIXES, ".parquet"))
    rows: list[Row] = []
    for file in files:
        if file.suffix == ".parquet":
            rows.extend(parquet_rows(file, reading))
        else:
            rows.extend(open_table(file, reading).rows())
    return rows


def _names_in_table(images: Array, names: list[str], in_table: Iterable[str], table: Path) -> list[str]:
    """The names of the rows of image features as the table writes them; it may add a folder or a suffix to a name.

    Raises:
        ImportingError: the table has none of them, or two of them are one image of the table.
    """
    known = dict.fromkeys(in_table)
    by_stem: dict[str, list[str]] = {}
    for name in known:
        path = Path(name)
        for short in {path.name, path.stem, str(path.with_suffix("")) if path.name else name}:
            by_stem.setdefault(short, []).append(name)
    renamed = []
    for name in names:
        candidates = [name] if name in known else by_stem.get(name, [])
        renamed.append(candidates[0] if len(candidates) == 1 else name)
    if known.keys().isdisjoint(renamed):
        raise ImportingError(
            f"{images.source} has arrays by name, and {table} has an image of none of these names (the first: "
            f"{shown(names[0])}); name one array of features, FILE:NAME, or give the arrays the images' names"
        )
    twice = [name for name, other in zip(renamed, names, strict=True) if name != other and name in set(names)]
    if twice or len(set(renamed)) < len(renamed):
        raise ImportingError(f"{images.source} has two arrays for an image of {table}; an image has one row")
    return renamed


def source_of_lines(image_features: Path, captions: Path, per_image: int, image_ids: Path | None) -> ImportSource:
    """So many lines of captions for each image, in the order of the image features.

    Raises:
        ArrayError, DatasetError: files that cannot be read. ImportingError: their numbers do not fit together.
    """
    images = open_array(image_features, (2, 3))
    lines = _caption_lines(captions)
    names = read_ids(image_ids) if image_ids else None
    names, owners = _line_owners(images, lines, captions, per_image, names or image_features.stem)
    rows = [Row(names[number // per_image], line) for number, line in enumerate(lines)]
    return ImportSource(images, owners, rows, captions)


def source_of_precomputed(folder: Path, per_image: int | None) -> ImportSource:
    """The files ``SPLIT_ims.npy`` and ``SPLIT_caps.txt`` of a folder, for the splits train, dev and test.

    Args:
        per_image: captions of an image; as many as the numbers of rows and lines, or equal rows, tell by default.

    Raises:
        ArrayError, DatasetError: files that cannot be read. ImportingError: none is there, or their numbers do not fit.
    """
    if not folder.is_dir():
        raise ImportingError(f"{folder} is no folder; name one with train_ims.npy and train_caps.txt")
    arrays = []
    owners = []
    rows = []
    for split in SPLITS:
        image_file = folder / _IMAGES.format(split)
        caption_file = folder / _CAPTIONS.format(split)
        if not image_file.exists() and not caption_file.exists():
            continue
        images = open_array(image_file, (2, 3))
        lines = _caption_lines(caption_file)
        count = per_image or _captions_per_image(images, lines, caption_file)
        names, of_rows = _line_owners(images, lines, caption_file, count, split)
        arrays.append(images)
        owners += of_rows
        rows += [Row(names[number // count], line, split) for number, line in enumerate(lines)]
    if not arrays:
        raise ImportingError(
            f"{folder} holds no precomputed features; it needs train_ims.npy and train_caps.txt, and the same for dev "
            "and test"
        )
    return ImportSource(join_arrays(folder, arrays, (2, 3)), owners, rows, folder)


def _caption_lines(file: Path) -> list[str]:
    """The lines of a file, without the empty ones that end it."""
    lines = read_lines(file)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _line_owners(
    images: Array, lines: list[str], captions: Path, per_image: int, names: list[str] | str
) -> tuple[list[str], list[str]]:
    """The name of each image, and the image of each row of image features, which has each image once or repeats it.

    Args:
        names: of the images, or what to begin numbered names with.

    Raises:
        ImportingError: the numbers do not fit together.
    """
    count, rest = divmod(len(lines), per_image)
    if isinstance(names, str):
        names = [f"{names}-{number:06d}" for number in range(count)]
    if rest or len(images) not in (count, len(lines)) or len(names) != count:
        raise ImportingError(
            f"{images.source} has {len(images):,} rows, and {captions} has {len(lines):,} lines, which with "
            f"{per_image} captions an image are {len(lines) / per_image:,g} images; give a row for each image, or for "
            "each line"
        )
    if len(images) == count:
        return names, names
    return names, [names[number // per_image] for number in range(len(lines))]


def _captions_per_image(images: Array, lines: list[str], captions: Path) -> int:
    """How many captions an image has: lines for a row of features, or, with as many of both, equal rows in a row.

    Raises:
        ImportingError: the lines are no multiple of the rows.
    """
    count, rest = divmod(len(lines), len(images))
    if rest or not count:
        raise ImportingError(
            f"{captions} has {len(lines):,} lines, and {images.source} has {len(images):,} rows; each image has the "
            "same number of captions, which --captions-per-image can say"
        )
    if count > 1:
        return count
    _, first = next(images.blocks("looking at the first rows"))
    is_other = (first != first[0]).reshape(len(first), -1).any(1)
    repeats = int(np.argmax(is_other)) if is_other.any() else len(first)
    return repeats if len(lines) % repeats == 0 else 1
