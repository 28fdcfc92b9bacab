"""Hits and queries as HTML and figures show them, and a list of hits that shows itself in a notebook."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from onceover.analysis.pages import render
from onceover.base.addresses import path_of
from onceover.extract.pictures import decode, jpeg_of, read_picture

if TYPE_CHECKING:
    from onceover.retrieval.search import Hit, Query, Term

INLINE_SIZE = 160  # pixels, the longer side of an image in a notebook


class Hits(list["Hit"]):
    """The hits of one query, a list; in a notebook they show themselves with their images.

    Args:
        kind: what was found, ``image`` or ``text``.
        image: gives a hit's image, its longer side at most so many pixels, or None; called when hits are shown.
    """

    def __init__(self, hits: Iterable["Hit"], kind: str, image: "Callable[[Hit, int], Image.Image | None]"):
        super().__init__(hits)
        self._kind = kind
        self._image = image

    def __reduce__(self) -> tuple[type[list], tuple[list["Hit"]]]:
        """Pickled as a plain list: images are read from files."""
        return list, (list(self),)

    def __str__(self) -> str:
        return "\n".join(f"{hit.rank:3}  {hit.score:6.3f}  {self._name(hit)}" for hit in self) or "no hit"

    def _name(self, hit: "Hit") -> str:
        return hit.captions[0] if self._kind == "text" else hit.path or hit.id

    def images(self, size: int) -> list[Image.Image | None]:
        """The hits' images, their longer sides at most ``size`` pixels, None where there is none."""
        return [self._image(hit, size) for hit in self]

    def shown(self, size: int) -> list["ShownHit"]:
        """The hits with their images, as a template takes them."""
        images = self.images(size)
        return [ShownHit(hit, jpeg_of(image) if image else None) for hit, image in zip(self, images, strict=True)]

    def _repr_html_(self) -> str:
        return render("hits_inline.html", hits=self.shown(INLINE_SIZE))


@dataclass(frozen=True)
class QueryPart:
    """A term of a query as it is shown: its sign (``+``, ``−`` or nothing), its name, and its image as a JPEG."""

    sign: str
    name: str
    image: bytes | None


@dataclass(frozen=True)
class ShownHit:
    """A hit, and its image as a JPEG, where there is one."""

    hit: "Hit"
    image: bytes | None


def query_parts(query: "Query", size: int) -> list[QueryPart]:
    """The terms of a query as they are shown; images are at most ``size`` pixels long.

    Raises:
        PictureError: an image that cannot be read.
    """
    parts: list[QueryPart] = []
    for term in query.terms:
        sign = "−" if term.weight < 0 else "+" if parts else ""
        image = None
        if term.image is not None:
            picture = decode(term.image, size) if isinstance(term.image, bytes) else read_picture(term.image, size)
            picture.thumbnail((size, size))
            image = jpeg_of(picture)
        parts.append(QueryPart(sign, _name_of(term), image))
    return parts


def title_of(query: "Query") -> str:
    """The query in words: texts in quotation marks and images by their names, added (+) and subtracted (−)."""
    words = []
    for term in query.terms:
        if term.weight < 0:
            words.append("−")
        elif words:
            words.append("+")
        words.append(_name_of(term))
    return " ".join(words)


def _name_of(term: "Term") -> str:
    if term.text is not None:
        return f"“{term.text}”"
    if isinstance(term.image, str):
        return path_of(term.image).name
    return term.item or "an image"
