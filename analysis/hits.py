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
from PIL import Image

from onceover.analysis.drawing import STYLE, save_figure
from onceover.analysis.hits_shown import QueryPart, query_parts, title_of
from onceover.analysis.sources import PlotError

if TYPE_CHECKING:
    from onceover.retrieval.search import Hit, Query

IMAGE_SIZE = 640  # pixels, the longer side of an image in the figure
QUERY_COLOUR = "#005A8C"  # of the frame around a query's image
_COLUMNS = 6  # images beside each other
_MARK = re.compile(r" (?=[.,;:!?](\s|$))")  # the blank before a mark that stands alone, as in Flickr8k's captions


def plot_hits(
    hits: "list[Hit]", query: "Query", kind: str, out: Path, images: "Sequence[Image.Image | None] | None" = None
) -> None:
    """Draws the hits of one search to the file ``out``; arguments are those of ``draw_hits``.

    Raises:
        PlotError: no images to draw, or a suffix that names no image format.
    """
    with matplotlib.rc_context(STYLE):
        save_figure(draw_hits(hits, query, kind, images), out)


def draw_hits(
    hits: "list[Hit]", query: "Query", kind: str, images: "Sequence[Image.Image | None] | None" = None
) -> Figure:
    """Draws the hits of one search: images with their scores (``kind`` image), or captions beside the query's image.

    Args:
        images: of the hits, which are drawn rather than their thumbnails.

    Raises:
        PlotError: images are to be drawn and there are neither ``images`` nor thumbnails.
    """
    if kind == "text":
        return _draw_captions(hits, query)
    shown = [_image_of(hit, image) for hit, image in zip(hits, images or [None] * len(hits), strict=True)]
    parts = [part for part in query_parts(query, IMAGE_SIZE) if part.image]
    cells = len(hits) + len(parts)
    rows = max(1, -(-cells // _COLUMNS))
    columns = max(2, -(-cells // rows))
    figure = Figure(figsize=(2.5 * columns, 3.0 * rows + 0.5), layout="constrained")
    figure.suptitle("\n".join(wrapped(title_of(query), 30 * columns)))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, part in zip(grid.flat, parts, strict=False):
        _draw_part(axes, part, len(parts) > 1)
    for axes, hit, image in zip(grid.flat[len(parts) :], hits, shown, strict=False):
        _draw_image(axes, hit, image)
    if not hits:
        grid.flat[len(parts)].text(0.5, 0.5, "no hit", ha="center", va="center")
    return figure


def _image_of(hit: "Hit", image: Image.Image | None) -> Image.Image:
    """The image to draw of a hit."""
    if image is not None:
        return image
    if hit.thumbnail is None:
        raise PlotError(
            f"there is no image of {hit.id} to draw: its file is not there, and the store was made with --no-thumbnails"
        )
    try:
        return Image.open(io.BytesIO(hit.thumbnail), formats=("JPEG",)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PlotError(f"the thumbnail of {hit.id} is damaged; verify the store, or extract again") from error


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """The lines of a text, of at most ``width`` characters; no line begins with a lone full stop or comma."""
    return textwrap.wrap(_MARK.sub("\N{NO-BREAK SPACE}", text), width, subsequent_indent=indent)


def _draw_image(axes: Axes, hit: "Hit", image: Image.Image) -> None:
    """Draws a hit's image with its rank, score and first caption."""
    axes.imshow(image)
    caption = hit.captions[0] if hit.captions else hit.id
    axes.set_title(f"{hit.rank}. {hit.score:.3f}", fontsize=11)
    lines = wrapped(caption, 30)[:3]
    axes.text(0.5, -0.03, "\n".join(lines), transform=axes.transAxes, ha="center", va="top", fontsize=8)


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
        name = "\n".join(wrapped(part.name, 30)[:2])
        axes.text(0.5, -0.04, name, transform=axes.transAxes, ha="center", va="top", fontsize=8)


def _draw_captions(hits: "list[Hit]", query: "Query") -> Figure:
    """Draws captions with their scores beside the query."""
    blocks = []
    line_count = 0
    for hit in hits:
        lines = wrapped(f"{hit.rank}.  {hit.score:.3f}  {hit.captions[0]}", 70, indent="      ")
        blocks.append("\n".join(lines))
        line_count += len(lines)
    parts = query_parts(query, IMAGE_SIZE)
    shown = [part for part in parts if part.image]
    height = max(3.2 if shown else 1.2, 0.5 + 0.24 * line_count + 0.12 * len(blocks))
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 2))).tolist()
    left.suptitle("\n".join(wrapped(title_of(query), 36)))
    for number, part in enumerate(shown, 1):
        _draw_part(left.add_subplot(len(shown), 1, number), part, len(shown) > 1)
    axes = right.subplots()
    axes.axis("off")
    text = "\n\n".join(blocks) or "no hit"
    axes.text(0, 1, text, transform=axes.transAxes, va="top", fontsize=11, linespacing=1.3)
    return figure
