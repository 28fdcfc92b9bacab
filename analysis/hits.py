"""The figure of one search: its hits as images with their scores, or as captions beside the query's image."""

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from onceover.analysis.drawing import STYLE, save_figure
from onceover.analysis.sources import PlotError
from onceover.base.addresses import path_of
from onceover.extract.pictures import read_picture

if TYPE_CHECKING:
    from onceover.retrieval.search import Hit, Query, Term

QUERY_SIZE = 640  # pixels, the longer side of a query's image
_COLUMNS = 5  # images beside each other


def plot_hits(hits: "list[Hit]", query: "Query", kind: str, out: Path) -> None:
    """Draws the hits of one search to the file ``out``.

    Raises:
        PlotError: no thumbnails to draw, or a suffix that names no image format.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(draw_hits(hits, query, kind), out)


def draw_hits(hits: "list[Hit]", query: "Query", kind: str) -> Figure:
    """Draws the hits of one search: images with their scores (``kind`` image), or captions beside the query's image.

    Raises:
        PlotError: images are to be drawn and the store has no thumbnails.
    """
    if kind == "text":
        return _draw_captions(hits, query)
    if any(hit.thumbnail is None for hit in hits):
        raise PlotError("the store was made with --no-thumbnails; there are no images to draw")
    columns = min(_COLUMNS, len(hits))
    rows = -(-len(hits) // columns)
    figure = Figure(figsize=(2.5 * columns, 3.0 * rows + 0.5), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title_of(query), 30 * columns)))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, hit in zip(grid.flat, hits, strict=False):
        _draw_image(axes, hit)
    return figure


def _draw_image(axes: Axes, hit: "Hit") -> None:
    """Draws a hit's image with its rank, score and first caption."""
    axes.imshow(_thumbnail(hit))
    caption = hit.captions[0] if hit.captions else hit.id
    axes.set_title(f"{hit.rank}. {hit.score:.3f}", fontsize=11)
    lines = textwrap.wrap(caption, 30)[:3]
    axes.text(0.5, -0.03, "\n".join(lines), transform=axes.transAxes, ha="center", va="top", fontsize=8)


def _thumbnail(hit: "Hit") -> Image.Image:
    try:
        return Image.open(io.BytesIO(hit.thumbnail or b""), formats=("JPEG",)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PlotError(f"the thumbnail of {hit.id} is damaged; verify the store, or extract again") from error


def _draw_captions(hits: "list[Hit]", query: "Query") -> Figure:
    """Draws captions with their scores beside the query."""
    blocks = []
    line_count = 0
    for hit in hits:
        lines = textwrap.wrap(f"{hit.rank}.  {hit.score:.3f}  {hit.captions[0]}", 70, subsequent_indent="      ")
        blocks.append("\n".join(lines))
        line_count += len(lines)
    height = max(3.2, 0.5 + 0.24 * line_count + 0.12 * len(blocks))
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    _draw_query(left, query)
    right.axis("off")
    right.text(0, 1, "\n\n".join(blocks), transform=right.transAxes, va="top", fontsize=11, linespacing=1.3)
    return figure


def _draw_query(axes: Axes, query: "Query") -> None:
    """Draws the query's first image, if it has one, under the query in words."""
    axes.axis("off")
    images = [term.image for term in query.terms if isinstance(term.image, str)]
    if images:
        image = read_picture(images[0])
        image.thumbnail((QUERY_SIZE, QUERY_SIZE))
        axes.imshow(image)
    axes.set_title("\n".join(textwrap.wrap(title_of(query), 36)))


def title_of(query: "Query") -> str:
    """The query in words: texts in quotation marks and images by their names, added (+) and subtracted (-)."""
    words = ""
    for term in query.terms:
        sign = "−" if term.weight < 0 else "+"
        if words or term.weight < 0:
            words += f" {sign} "
        words += _name_of(term)
    return words.strip()


def _name_of(term: "Term") -> str:
    if term.text is not None:
        return f"“{term.text}”"
    if isinstance(term.image, str):
        return path_of(term.image).name
    return term.item or "an image"
