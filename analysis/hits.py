"""The figure of one search: the query's images, then its hits as images with their scores, or as captions."""

import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from onceover.analysis.drawing import STYLE, save_figure
from onceover.analysis.hits_shown import QueryPart, query_parts, title_of

if TYPE_CHECKING:
    from onceover.retrieval.search import Hit, Query

IMAGE_SIZE = 640  # pixels, the longer side of an image in the figure
QUERY_COLOUR = "#005A8C"  # of the frame around a query's image
_COLUMNS = 6  # images beside each other
_TITLE_LINES = 3
_CAPTION_LINES = 6  # of one hit
_LINE = 0.24  # inches, from a line of a caption to the next
_SMALL = 8  # points, of captions below images and of what was searched
_MARK = re.compile(r" (?=[.,;:!?](\s|$))")  # the blank before a mark that stands alone, as in Flickr8k's captions


def plot_hits(
    hits: "list[Hit]",
    query: "Query",
    kind: str,
    out: Path,
    images: "Sequence[Image.Image | None]" = (),
    about: str = "",
) -> None:
    """Draws the hits of one search to the file ``out``; arguments are those of ``draw_hits``.

    Raises:
        PlotError: a suffix that names no image format.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(draw_hits(hits, query, kind, images, about), out)


def draw_hits(
    hits: "list[Hit]",
    query: "Query",
    kind: str,
    images: "Sequence[Image.Image | None]" = (),
    about: str = "",
) -> Figure:
    """Draws the hits of one search: images with their scores (``kind`` image), or captions beside the query's image.

    Args:
        images: of the hits where ``kind`` is image; None for one that has no image any more.
        about: what was searched, as a line below the hits.
    """
    if kind == "text":
        return _draw_captions(hits, query, about)
    parts = [part for part in query_parts(query, IMAGE_SIZE) if part.image]
    cells = len(hits) + len(parts)
    rows = max(1, -(-cells // _COLUMNS))
    columns = max(2, -(-cells // rows))
    figure = Figure(figsize=(2.5 * columns, 3.0 * rows + 0.5), layout=ConstrainedLayoutEngine(h_pad=0.12))
    figure.suptitle("\n".join(wrapped(title_of(query), 30 * columns, _TITLE_LINES)))
    figure.supxlabel(about, fontsize=_SMALL)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, part in zip(grid.flat, parts, strict=False):
        _draw_part(axes, part, len(parts) > 1)
    for axes, hit, image in zip(grid.flat[len(parts) :], hits, images, strict=False):
        _draw_image(axes, hit, image)
    if not hits:
        grid.flat[len(parts)].text(0.5, 0.5, "no hit", ha="center", va="center")
    return figure


def wrapped(text: str, width: int, most: int) -> list[str]:
    """The first lines of a text, ``most`` of at most ``width`` characters; "…" ends the last one where more follow.

    No line begins with a lone full stop or comma.
    """
    text = text[: (most + 1) * width]  # what is beyond is not shown
    return textwrap.wrap(_MARK.sub("\N{NO-BREAK SPACE}", text), width, max_lines=most, placeholder=" …")


def _draw_image(axes: Axes, hit: "Hit", image: Image.Image | None) -> None:
    """Draws a hit's image, or its id where there is none, with its rank, score and first caption."""
    if image is None:
        lines = "\n".join(wrapped(hit.id, 24, 4))
        axes.text(0.5, 0.5, f"no image of\n{lines}", ha="center", va="center", fontsize=_SMALL)
        axes.set_aspect("equal")
    else:
        axes.imshow(image)
    caption = hit.captions[0] if hit.captions else hit.id
    axes.set_title(f"{hit.rank}. {hit.score:.3f}", fontsize=11)
    lines = "\n".join(wrapped(caption, 30, 3))
    axes.text(0.5, -0.03, lines, transform=axes.transAxes, ha="center", va="top", fontsize=_SMALL)


def _draw_part(axes: Axes, part: QueryPart, is_named: bool) -> None:
    """Draws a query's image in a frame, with its name below where it is to be told from others."""
    image = Image.open(io.BytesIO(part.image or b""), formats=("JPEG",))
    axes.imshow(image)
    axes.axis("on")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=QUERY_COLOUR, linewidth=3)
    axes.set_title(f"{part.sign} query".strip(), fontsize=11, color=QUERY_COLOUR)
    if is_named:
        name = "\n".join(wrapped(part.name, 30, 2))
        axes.text(0.5, -0.04, name, transform=axes.transAxes, ha="center", va="top", fontsize=_SMALL)


def _draw_captions(hits: "list[Hit]", query: "Query", about: str) -> Figure:
    """Draws captions with their scores beside the query."""
    blocks = [wrapped(hit.captions[0], 62, _CAPTION_LINES) for hit in hits]
    line_count = sum(len(lines) + 0.5 for lines in blocks)
    shown = [part for part in query_parts(query, IMAGE_SIZE) if part.image]
    height = max(3.2 if shown else 1.6, 0.8 + _LINE * line_count)
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 2))).tolist()
    left.suptitle("\n".join(wrapped(title_of(query), 36, _TITLE_LINES)))
    for number, part in enumerate(shown, 1):
        _draw_part(left.add_subplot(len(shown), 1, number), part, len(shown) > 1)
    right.supxlabel(about, fontsize=_SMALL)
    axes = right.subplots()
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=((height - 0.5) / _LINE, 0))
    top = 0.0
    for hit, lines in zip(hits, blocks, strict=True):
        axes.text(0, top, f"{hit.rank}.", va="top", fontsize=11)
        axes.text(0.06, top, f"{hit.score:.3f}", va="top", fontsize=11)
        axes.text(0.16, top, "\n".join(lines), va="top", fontsize=11, linespacing=1.3)
        top += len(lines) + 0.5
    if not hits:
        axes.text(0, 0, "no hit", va="top", fontsize=11)
    return figure
