"""Finds the items of a gallery by their ids, whether it is in memory or on disk."""

from collections.abc import Sequence

from onceover.base.errors import OnceoverError
from onceover.retrieval.gallery import Gallery
from onceover.retrieval.index import Index

Served = Gallery | Index


class NoItemError(OnceoverError):
    """An item or an image that is not in the galleries."""


def ids_of(gallery: Served) -> Sequence[str]:
    """The ids of a gallery's items."""
    return gallery.ids if isinstance(gallery, Gallery) else gallery.ids()


def contents(gallery: Served) -> Sequence[str]:
    """For each item what tells its content: SHA-256 of an image, text of a caption."""
    return gallery.contents if isinstance(gallery, Gallery) else gallery.living("content")


def paths_by_id(gallery: Served) -> dict[str, str]:
    """The path of each item of a gallery, by its id; of a caption it is its image's, or empty."""
    paths = gallery.paths if isinstance(gallery, Gallery) else gallery.living("path")
    return dict(zip(ids_of(gallery), paths, strict=True))


def row_of(gallery: Served | None, name: str) -> int:
    """The row of the item with an id.

    Raises:
        NoItemError: there is none, or no such gallery.
    """
    row = None if gallery is None else gallery.row_of(name)
    if row is None:
        raise NoItemError(
            "there is no item of this kind with this id in the gallery; search again, and take a hit's id"
        )
    return row
