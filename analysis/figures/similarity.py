"""The similarity matrix of a sample of images with one caption each; the matched pairs lie on the diagonal."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.drawing import SIGNED_COLOUR_MAP
from onceover.analysis.sources import RunFiles

SOURCE = "run"
ORDER = 20
MAX_IMAGES = 40
SCALE_IMAGES = 500  # whose similarities span the colour scale; the images drawn are among them


def drawings(source: RunFiles) -> dict[str, Callable[[], Figure]]:
    """The matrix."""
    return {"similarity": partial(draw_similarity, source)}


def draw_similarity(run: RunFiles) -> Figure:
    """Draws cosine similarities; circles mark the images whose own caption scores best of those drawn."""
    pairs = run.sample_pairs(MAX_IMAGES)
    scores = run.embeddings.images[pairs.images] @ run.embeddings.texts[pairs.captions].T
    diagonal = np.arange(len(scores))
    best = diagonal[scores.argmax(1) == diagonal]
    figure = Figure(figsize=(5.4, 4.9), layout="constrained")
    axes = figure.add_subplot()
    draw_scores(axes, scores, run)
    axes.scatter(best, best, s=11, facecolors="white", edgecolors="black", linewidths=0.8)
    axes.set(
        xlabel="caption (of the image with the same number)",
        ylabel="image",
        title=f"Similarity of images and captions\n{run.split}: {len(scores):,} of {pairs.total:,} images, one caption "
        f"each\ncircles: own caption best of the {len(scores):,} shown ({len(best):,} images)",
    )
    return figure


def draw_scores(axes: Axes, scores: np.ndarray, run: RunFiles) -> None:
    """Draws a matrix of cosine similarities with its colour bar, on a scale that all matrices of a run's split share.

    White is 0, and both ends are as far from it as the similarity that is farthest from it.
    """
    pairs = run.sample_pairs(SCALE_IMAGES)
    end = np.abs(run.embeddings.images[pairs.images] @ run.embeddings.texts[pairs.captions].T).max()
    matrix = axes.imshow(scores, cmap=SIGNED_COLOUR_MAP, interpolation="nearest", vmin=-end, vmax=end)
    axes.figure.colorbar(matrix, ax=axes, label="cosine similarity", shrink=0.85)
