"""Options by which a user says how to read a dataset: columns, the images' folder, files to leave out."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReadOptions:
    """How to read a dataset; what the options do not say is inferred from the files.

    Attributes:
        image_column: the column of a table that names the images.
        caption_columns: the columns that hold captions, one or several.
        split_column: the column that holds the split.
        images_root: the folder that the images' names start from.
        caption_template: a caption for an image of which only the class is known, with ``{}`` for the class.
        exclude: patterns of files that are left alone (``listing.is_excluded``).

    Example:
        >>> reading = onceover.ReadOptions(caption_columns=("caption",), exclude=("*.gif",))
        >>> store = onceover.extract_features("data", "read.h5", reading=reading)
        >>> len(store.captions)
        300
    """

    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    split_column: str | None = None
    images_root: Path | None = None
    caption_template: str | None = None
    exclude: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """The options that are set, as plain values for a store's provenance."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or value == ():
                continue
            values[field.name] = list(value) if isinstance(value, tuple) else str(value)
        return values


def read_options(given: dict[str, Any]) -> ReadOptions:
    """The options in a store's provenance, as ``ReadOptions.given`` wrote them."""
    values = dict(given)
    for name in ("caption_columns", "exclude"):
        if name in values:
            values[name] = tuple(values[name])
    if "images_root" in values:
        from onceover.base.addresses import path_of

        values["images_root"] = path_of(values["images_root"])
    return ReadOptions(**values)


DEFAULT = ReadOptions()
