"""Hits as HTML: one page for the hits of some queries, and a list of hits that shows itself in a notebook."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from onceover.analysis.pages import render
from onceover.base.addresses import path_of
from onceover.base.outputs import Outputs
from onceover.base.progress import warn
from onceover.extract.pictures import decode, read_picture

if TYPE_CHECKING:
    from onceover.retrieval.search import Hit, Query, Term

PAGE_SIZE = 320  # pixels, the longer side of an image on the page
INLINE_SIZE = 160  # in a notebook
MAX_QUERIES = 500  # on one page, which a browser has to hold


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
        return [ShownHit(hit, as_jpeg(image) if image else None) for hit, image in zip(self, images, strict=True)]

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


@dataclass(frozen=True)
class Answer:
    """A query and its hits, as a page shows them."""

    parts: list[QueryPart]
    hits: list[ShownHit]


class HitsFile:
    """The file that hits are drawn to: a figure of the first query (.png, .svg, .pdf), or a page of all (.html).

    Args:
        kind: what is found, ``image`` or ``text``.

    Raises:
        PlotError: a suffix of another kind. OutputError: a file of somebody else's is there.
    """

    def __init__(self, path: str | Path, kind: str):
        self._path = Path(path)
        self._kind = kind
        self._is_page = self._path.suffix.lower() == ".html"
        self._is_drawn = False
        self._answers: list[Answer] = []
        self._left_out = 0
        if self._is_page:
            self._outputs.check(self._path.name)
        else:
            from onceover.analysis.drawing import check_figure

            check_figure(self._path)

    @property
    def _outputs(self) -> Outputs:
        return Outputs(self._path.parent, "name another file for the page")

    def add(self, queries: Sequence["Query"], results: Sequence[Hits]) -> None:
        """Draws the figure, or keeps for the page what it shows of some queries."""
        if not self._is_page and not self._is_drawn:
            from onceover.analysis.hits import IMAGE_SIZE, plot_hits

            images = results[0].images(IMAGE_SIZE) if self._kind == "image" else None
            plot_hits(results[0], queries[0], self._kind, self._path, images)
            self._is_drawn = True
        if self._is_page:
            room = MAX_QUERIES - len(self._answers)
            for query, hits in zip(queries[:room], results[:room], strict=True):
                self._answers.append(Answer(query_parts(query, PAGE_SIZE), hits.shown(PAGE_SIZE)))
            self._left_out += len(queries[room:])

    def finish(self) -> None:
        """Writes the page, if it is one, as one file that needs no other."""
        if not self._is_page:
            return
        if self._left_out:
            warn(f"{self._path} shows the first {len(self._answers):,} queries; {self._left_out:,} are left out")
        page = render("hits.html", answers=self._answers, kind=self._kind)
        self._outputs.write_texts({self._path.name: page})


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
            image = as_jpeg(picture)
        parts.append(QueryPart(sign, _name_of(term), image))
    return parts


def as_jpeg(image: Image.Image) -> bytes:
    """An image as the bytes of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


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
