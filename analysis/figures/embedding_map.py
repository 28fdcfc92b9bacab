"""Maps of the joint embedding: images and captions of a split in two dimensions, by t-SNE and by PCA."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from onceover.analysis.coordinates import map_coordinates, pca, tsne
from onceover.analysis.drawing import CAPTION_COLOUR, IMAGE_COLOUR, NEUTRAL_COLOUR
from onceover.analysis.sources import RunFiles

SOURCE = "run"
ORDER = 10
MAX_IMAGES = 400  # of a split, each with one caption
LINKED_PAIRS = 40


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
        points, labels = pca(vectors, run.seed)
    images, captions = np.split(points, 2)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.add_subplot()
    linked = np.random.default_rng(run.seed).permutation(len(images))[:LINKED_PAIRS]
    lines = LineCollection(
        list(np.stack([images[linked], captions[linked]], 1)),
        colors=NEUTRAL_COLOUR,
        linewidths=0.8,
        alpha=0.7,
        label=f"matched pair ({len(linked)} shown)",
    )
    axes.add_collection(lines)
    axes.scatter(images[:, 0], images[:, 1], s=16, c=IMAGE_COLOUR, marker="o", linewidths=0, alpha=0.8, label="image")
    axes.scatter(
        captions[:, 0], captions[:, 1], s=20, c=CAPTION_COLOUR, marker="^", linewidths=0, alpha=0.8, label="caption"
    )
    shown = f"{len(images):,} of {pairs.total:,} images, one caption each"
    axes.set(xlabel=labels[0], ylabel=labels[1], title=f"{method} of the joint embedding\n{run.split}: {shown}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, markerscale=1.6, handletextpad=0.4)
    if method == "t-SNE":
        axes.set(xticks=[], yticks=[])
    return figure
