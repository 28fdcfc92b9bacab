"""Rank curves: the share of queries with a correct item among the first K, for every K, beside chance."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.drawing import CAPTION_COLOUR, IMAGE_COLOUR, NEUTRAL_COLOUR, WIDTH, legend_under, plain_ticks
from onceover.analysis.sources import RunFiles
from onceover.retrieval.embeddings import model_name
from onceover.retrieval.ranks import Ranks, chance, rank

SOURCE = "run"
ORDER = 40
_DIRECTIONS = (("Image → caption", IMAGE_COLOUR), ("Caption → image", CAPTION_COLOUR))


def drawings(source: RunFiles) -> dict[str, Callable[[], Figure]]:
    """The curves of both directions."""
    return {"ranks": partial(draw_ranks, source)}


def draw_ranks(run: RunFiles) -> Figure:
    """Draws both directions; a run that searches with a correction for hubs is drawn with it."""
    vectors = run.embeddings.vectors_of(run.split)
    own = rank(*vectors, **run.embeddings.biases(split=run.split))
    random = chance(len(vectors.images), vectors.image_index)
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, ranks, guess, (name, colour) in zip(panels, own, random, _DIRECTIONS, strict=True):
        cutoffs = np.unique(np.geomspace(1, ranks.gallery, 60).astype(int))
        label = model_name(run.embeddings.rerank)
        axes.plot(cutoffs, _hit_curve(ranks, cutoffs), color=colour, label=label)
        axes.plot(cutoffs, _hit_curve(guess, cutoffs), color=NEUTRAL_COLOUR, linestyle="--", label="chance")
        median = ranks.median_rank()
        axes.axvline(median, color=colour, linewidth=0.8, linestyle=":", label=f"median rank {median:g}")
        sizes = f"{len(ranks.greater):,} queries, gallery of {ranks.gallery:,}"
        _label_axes(axes, f"{name}\n{run.split}: {sizes}", ranks.gallery)
    panels[0].set_ylabel("queries with a correct item\namong the first K, in %")
    return figure


def _label_axes(axes: Axes, title: str, gallery: int) -> None:
    axes.set(xscale="log", xlim=(1, max(2, gallery)), ylim=(0, 101), xlabel="K", title=title)
    plain_ticks(axes)
    legend_under(axes, 2)


def _hit_curve(ranks: Ranks, cutoffs: np.ndarray) -> np.ndarray:
    """The hit rate in percent at each cutoff."""
    return np.array([100 * ranks.hit_at(int(k)).mean() for k in cutoffs])
