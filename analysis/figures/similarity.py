"""The similarity matrix of a sample of images with one caption each; the matched pairs lie on the diagonal."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from onceover.analysis.drawing import COLOUR_MAP
from onceover.analysis.sources import RunFiles

SOURCE = "run"
ORDER = 20
MAX_IMAGES = 40


def drawings(source: RunFiles) -> dict[str, Callable[[], Figure]]:
    """The matrix."""
    return {"similarity": partial(draw_similarity, source)}


def draw_similarity(run: RunFiles) -> Figure:
    """Draws cosine similarities; circles mark the images whose own caption scores best."""
    pairs = run.sample_pairs(MAX_IMAGES)
    scores = run.embeddings.images[pairs.images] @ run.embeddings.texts[pairs.captions].T
    diagonal = np.arange(len(scores))
    best = diagonal[scores.argmax(1) == diagonal]
    figure = Figure(figsize=(6.6, 5.9), layout="constrained")
    axes = figure.add_subplot()
    matrix = axes.imshow(scores, cmap=COLOUR_MAP, interpolation="nearest")
    figure.colorbar(matrix, ax=axes, label="cosine similarity", shrink=0.85)
    axes.scatter(best, best, s=22, facecolors="none", edgecolors="black", linewidths=1.2)
    axes.set(
        xlabel="caption (of the image with the same number)",
        ylabel="image",
        title=f"Similarity of images and captions\n{run.split}: {len(scores):,} of {pairs.total:,} images, one caption "
        f"each\ncircles: the image's own caption scores best ({len(best):,} of {len(scores):,})",
    )
    return figure
