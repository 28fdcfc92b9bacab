"""The file that a search draws its hits to: a figure of one query, or one HTML page for the hits of some queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onceover.analysis.drawing import check_figure
from onceover.analysis.hits import IMAGE_SIZE, plot_hits
from onceover.analysis.hits_shown import Hits, QueryPart, ShownHit, query_parts, title_of
from onceover.analysis.pages import render
from onceover.base.outputs import Outputs
from onceover.base.progress import warn

if TYPE_CHECKING:
    from onceover.retrieval.search import Query

PAGE_SIZE = 320  # pixels, the longer side of an image on the page
MAX_QUERIES = 500  # on one page, which a browser has to hold


@dataclass(frozen=True)
class Answer:
    """A query, in words and by its parts, and its hits, as a page shows them."""

    title: str
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
        self._about = ""
        self._answers: list[Answer] = []
        self._left_out = 0
        if self._is_page:
            self._outputs.check(self._path.name)
        else:
            check_figure(self._path)

    @property
    def _outputs(self) -> Outputs:
        return Outputs(self._path.parent, "name another file for the page")

    def add(self, queries: Sequence["Query"], results: Sequence[Hits], about: str = "") -> None:
        """Draws the figure, or keeps for the page what it shows of some queries.

        Args:
            about: what was searched, as a line for a reader.
        """
        self._about = about
        if not self._is_page and not self._is_drawn:
            images = results[0].images(IMAGE_SIZE) if self._kind == "image" else []
            plot_hits(results[0], queries[0], self._kind, self._path, images, about)
            self._is_drawn = True
        if self._is_page:
            room = MAX_QUERIES - len(self._answers)
            for query, hits in zip(queries[:room], results[:room], strict=True):
                self._answers.append(Answer(title_of(query), query_parts(query, PAGE_SIZE), hits.shown(PAGE_SIZE)))
            self._left_out += len(queries[room:])

    def finish(self) -> None:
        """Writes the page, if it is one, as one file that needs no other."""
        if not self._is_page:
            return
        if self._left_out:
            warn(f"{self._path} shows the first {len(self._answers):,} queries; {self._left_out:,} are left out")
        page = render("hits.html", answers=self._answers, kind=self._kind, about=self._about)
        self._outputs.write_texts({self._path.name: page})
