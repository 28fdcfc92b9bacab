"""Maps of the joint embedding: images and captions of a split in two dimensions, by t-SNE and by PCA."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from onceover.analysis.coordinates import different_rows, map_coordinates, pca, tsne
from onceover.analysis.drawing import (
    CAPTION_COLOUR,
    CAPTION_MARKER,
    IMAGE_COLOUR,
    IMAGE_MARKER,
    NEUTRAL_COLOUR,
    WIDTH,
    hidden_points,
    legend_below,
)
from onceover.analysis.sources import RunFiles

SOURCE = "run"
ORDER = 10
MAX_IMAGES = 400  # of a split, each with one caption
LINKED_PAIRS = 40
_AROUND = 1.0  # inches above and below the points
_TALLEST = 5.0  # inches of the points' height, at most
_NARROWEST = 4.5  # inches of a map's width
_FLATTEST = 0.4  # of the points' height relative to their width


def drawings(source: RunFiles) -> dict[str, Callable[[], Figure]]:
    """Both maps."""
    return {"tsne": partial(draw_map, source, "t-SNE"), "pca": partial(draw_map, source, "PCA")}


def draw_map(run: RunFiles, method: str) -> Figure:
    """Draws a map by ``t-SNE`` or ``PCA``; some matched pairs are linked."""
    pairs = run.sample_pairs(MAX_IMAGES)
    vectors = np.concatenate([run.embeddings.images[pairs.images], run.embeddings.texts[pairs.captions]])
    if method == "t-SNE":
        points = map_coordinates(run, pairs, partial(tsne, vectors, run.seed))
        labels = ["t-SNE 1", "t-SNE 2"]
    else:
        points, labels = pca(vectors)
    images, captions = np.split(points, 2)
    figure = Figure(figsize=_size(points), layout="constrained")
    axes = figure.add_subplot()
    linked = np.random.default_rng(run.seed).permutation(len(images))[:LINKED_PAIRS]
    lines = LineCollection(
        list(np.stack([images[linked], captions[linked]], 1)),
        colors=NEUTRAL_COLOUR,
        linewidths=0.6,
        alpha=0.7,
        label=f"matched pair ({len(linked)} shown)",
    )
    axes.add_collection(lines)
    for part, colour, marker, size, label in (
        (images, IMAGE_COLOUR, IMAGE_MARKER, 10, "image"),
        (captions, CAPTION_COLOUR, CAPTION_MARKER, 12, "caption"),
    ):
        axes.scatter(part[:, 0], part[:, 1], s=size, c=colour, marker=marker, linewidths=0, alpha=0.8, label=label)
    title = f"{method} of the joint embedding\n{run.split}: {len(images):,} of {pairs.total:,} images, one caption each"
    equal = len(vectors) - len(different_rows(vectors)[0])
    if equal:
        title += f"\n{hidden_points(equal, len(vectors))}"
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    axes.set_aspect("equal", adjustable="datalim")
    legend_below(figure, axes, 3, markerscale=1.6, handletextpad=0.4)
    if method == "t-SNE":
        axes.set(xticks=[], yticks=[])
    return figure


def _size(points: np.ndarray) -> tuple[float, float]:
    """The width and height of a map in inches: what points of these two dimensions fill, on axes of the same unit."""
    across, down = np.ptp(points, axis=0).tolist()
    share = max(down / across, _FLATTEST) if across else 1.0
    width = max(_NARROWEST, min(WIDTH, _TALLEST / share))
    return width, _AROUND + share * min(width, _TALLEST / share)
