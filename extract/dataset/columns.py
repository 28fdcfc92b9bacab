"""The columns of a table that hold image names, captions and splits: those of usual names, or those a user names."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.listing import is_image
from onceover.extract.names import shown

#: the usual names, in the order in which they are taken
IMAGE_NAMES = (
    *("image", "filepath", "file_path", "file_name", "filename", "image_path", "image_name", "image_file"),
    *("image_filename", "image_file_name", "image_filepath", "img", "img_path", "img_name", "img_file"),
    *("img_filename", "path", "file", "photo", "picture", "fname", "images", "image_id", "img_id", "photo_id", "id"),
)
CAPTION_NAMES = (
    *("caption", "captions", "title", "text", "texts", "comment", "comments", "raw", "sentence", "sentences"),
    *("description", "descriptions", "image_caption", "caption_text", "raw_caption", "image_description"),
    *("alt_text", "alttext", "alt", "prompt"),
)
SPLIT_NAMES = ("split", "subset", "partition", "set")
#: a column that counts an image's captions
NUMBER_NAMES = ("comment_number", "caption_number", "comment_id", "caption_id", "number", "sentid")
_NUMBERED = re.compile(r"(?P<stem>[^\d]*[^\d_])_?\d+")  # caption_0, caption1


class NoKnownColumn(DatasetError):
    """A table has no column of a usual name; the message lists those that it has."""


@dataclass(frozen=True)
class Columns:
    """The columns that a table is read by.

    Attributes:
        image: the column with the images' names; None where the images lie in the table or are known otherwise.
        captions: the columns with captions. split: the column with the splits, or None.
        headed: whether the table itself names its columns; else they are called ``column 1``, ``column 2``, …
        untaken: further columns whose names are usual for captions, and which hold other texts.
    """

    image: str | None
    captions: tuple[str, ...]
    split: str | None
    headed: bool = True
    untaken: tuple[str, ...] = ()

    def describe(self, kind: str) -> str:
        """The columns in words: "TSV, images from `filepath`, captions from `title`"."""
        mark = "`" if self.headed else ""
        parts = [kind if self.headed else f"{kind} without a header"]
        if self.image is not None:
            parts.append(f"images from {mark}{shown(self.image)}{mark}")
        names = f"{mark}{shown(self.captions[0])}{mark}"
        if len(self.captions) > 1:
            names += f" to {mark}{shown(self.captions[-1])}{mark}"
        parts.append(f"captions from {names}")
        if self.split is not None:
            parts.append(f"splits from {mark}{shown(self.split)}{mark}")
        if self.untaken:
            parts.append(f"not taken: {_listing(self.untaken)}; name what to take with --caption-column")
        return ", ".join(parts)


def choose_columns(names: Sequence[str], options: ReadOptions, source: Path, with_images: bool = True) -> Columns:
    """The columns to read of a table that has columns of these names.

    Args:
        source: the table, for errors. with_images: whether a column has to name the images.

    Raises:
        NoKnownColumn: no column has a usual name.
        DatasetError: a column that the user names is not there or is there twice.
    """
    for name in (options.image_column, *options.caption_columns, options.split_column):
        if name is not None and name not in names:
            raise DatasetError(f"{source} has no column {name!r:.80}; it has {_listing(names)}")
    image = options.image_column
    if image is None and with_images:
        image = _usual(names, IMAGE_NAMES)
    captions = options.caption_columns or _caption_columns(names)
    split = options.split_column or _usual(names, SPLIT_NAMES)
    if with_images and image is None:
        raise NoKnownColumn(
            f"{source} has no column that is known to name the images; it has {_listing(names)}: "
            "say which it is with --image-column"
        )
    if not captions:
        raise NoKnownColumn(
            f"{source} has no column that is known to hold captions; it has {_listing(names)}: "
            "say which it is with --caption-column"
        )
    chosen = [name for name in (image, *captions, split) if name is not None]
    given = (options.image_column, *options.caption_columns, options.split_column)
    written = Counter(names)
    plain = Counter(map(_plain, names))
    for name in chosen:
        same = written[name] if name in given else plain[_plain(name)]
        if same > 1:
            raise DatasetError(
                f"{source} has several columns called {shown(name)}; leave one, with a line for each caption, "
                "or number them: caption_1, caption_2"
            )
    return Columns(image, tuple(captions), split)


def with_file_names(columns: Columns, cells: Mapping[str, Sequence[str]], options: ReadOptions) -> Columns:
    """The columns with another for the images where the chosen one has ids, and only one other has names of images.

    A row's number may be called ``id``, and may be that of another image's file.

    Args:
        cells: of the table's first rows, by column.
    """
    if options.image_column is not None or columns.image is None or _has_images(cells[columns.image]):
        return columns
    known = {columns.image, columns.split, *columns.captions}
    others = [name for name in cells if name not in known and _has_images(cells[name])]
    return replace(columns, image=others[0]) if len(others) == 1 else columns


def _has_images(cells: Sequence[str]) -> bool:
    """Whether most cells are names of image files, by their suffix; addresses are none."""
    named = sum(is_image(cell.strip()) and "://" not in cell for cell in cells)
    return 2 * named > len(cells)


def count_columns(names: Sequence[str], options: ReadOptions) -> int:
    """How many of the three columns (images, captions, splits) a table has under a known name."""
    given = (options.image_column, options.caption_columns, options.split_column)
    known = 0
    for wanted, usual in zip(given, (IMAGE_NAMES, CAPTION_NAMES, SPLIT_NAMES), strict=True):
        asked = {wanted} if isinstance(wanted, str) else {*(wanted or ())}
        numbered = usual is CAPTION_NAMES and _caption_columns(names)
        known += bool(asked & {*names}) or _usual(names, usual) is not None or bool(numbered)
    return known


def number_column(names: Sequence[str]) -> str | None:
    """The column that counts an image's captions, if a table has one."""
    return _usual(names, NUMBER_NAMES)


def _usual(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """The first of the usual names that the table has, as the table writes it."""
    written = {_plain(name): name for name in reversed(names)}
    for name in usual:
        if name in written:
            return written[name]
    return None


def _caption_columns(names: Sequence[str]) -> tuple[str, ...]:
    """The column with captions of a usual name, with the numbered ones of that name: ``caption_0`` … ``caption_4``."""
    stems: dict[str, list[str]] = {}
    for name in names:
        numbered = _NUMBERED.fullmatch(_plain(name))
        if numbered is not None:
            stems.setdefault(numbered["stem"], []).append(name)
    one = _usual(names, CAPTION_NAMES)
    if one is not None:
        return (one, *stems.get(_plain(one), ()))
    for stem in CAPTION_NAMES:
        if stem in stems:
            return tuple(stems[stem])
    return ()


def with_texts(columns: Columns, cells: Mapping[str, Sequence[str]], options: ReadOptions) -> Columns:
    """The columns with other captions where the chosen ones hold no texts, and with those that are not taken.

    A photo's ``title`` may be the name of its file, and ``comments`` may count them.

    Args:
        cells: of the table's first rows, by column.
    """
    if options.caption_columns:
        return columns
    remaining = [name for name in cells if name not in (columns.image, columns.split)]
    with_words: list[tuple[str, ...]] = []
    while usual := _caption_columns(remaining):
        if any(_holds_texts(cells[name]) for name in usual):
            with_words.append(usual)
        remaining = [name for name in remaining if name not in usual]
    if not with_words:
        return columns
    taken, *others = with_words
    known = [cells[name] for name in taken]
    untaken = tuple(usual[0] for usual in others if cells[usual[0]] not in known)
    return replace(columns, captions=taken, untaken=untaken)


def _holds_texts(cells: Sequence[str]) -> bool:
    """Whether some cells have letters, and are not all names of images."""
    filled = [cell.strip() for cell in cells if any(letter.isalpha() for letter in cell)]
    return bool(filled) and not all(map(is_image, filled))


def _plain(name: str) -> str:
    """A column's name without differences of writing: "Image Name" and "image-name" are ``image_name``."""
    return re.sub(r"[\s_-]+", "_", name.strip().strip("\"'").lower()).strip("_")


def _listing(names: Sequence[str]) -> str:
    """The names of columns, for a message."""
    first = ", ".join(f"`{shown(name)}`" for name in names[:12])
    if len(names) > 12:
        return f"{first} and {len(names) - 12:,} more"
    return first
