"""Training curves: a run's loss epoch by epoch, and its recalls on the validation split whenever they were measured."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from onceover.analysis.drawing import (
    CAPTION_COLOUR,
    CAPTION_MARKER,
    IMAGE_COLOUR,
    IMAGE_MARKER,
    NEUTRAL_COLOUR,
    WIDTH,
    legend_below,
)
from onceover.analysis.sources import History, RunFiles, read_choice, read_history

SOURCE = "run"
ORDER = 30
_LINES = {1: "-", 5: "--", 10: ":"}
_DIRECTIONS = (
    ("image_to_text", IMAGE_COLOUR, IMAGE_MARKER, "image → caption"),
    ("text_to_image", CAPTION_COLOUR, CAPTION_MARKER, "caption → image"),
)


def drawings(source: RunFiles) -> dict[str, Callable[[], Figure] | str]:
    """The curves of a single fit; the members of an ensemble have curves of their own."""
    if source.is_distilled():
        return {"training": "a pair that was distilled in closed form has no curve"}
    if source.member_count() > 1:
        return {"training": "the members of an ensemble have curves of their own"}
    return {"training": partial(draw_training, source.folder)}


def draw_training(folder: Path) -> Figure:
    """Draws the curves of the run in a folder.

    Raises:
        PlotError: its history or provenance is missing or damaged.
    """
    choice = read_choice(folder)
    history = read_history(folder)
    if not np.isfinite(history.columns["rsum"]).any():  # fine-tuned on the validation images as well
        figure = Figure(figsize=(WIDTH / 2, 3.4), layout="constrained")
        axes = figure.subplots()
        _draw_loss(axes, history)
        axes.set_xlabel("epoch")
        return figure
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    _draw_loss(left, history)
    _draw_recalls(right, history)
    right.set(
        ylabel="recall in %",
        title=f"Recall on {choice.split}: {choice.images:,} images and their captions",
        ylim=(0, None),
    )
    for axes in (left, right):
        axes.axvline(choice.best_epoch, color=NEUTRAL_COLOUR, linewidth=0.8, linestyle="--", zorder=0)
        axes.set_xlabel(f"epoch (dashed: {choice.best_epoch}, that of the highest rsum)")
    legend_below(figure, right, len(_LINES))
    return figure


def _draw_loss(axes: Axes, history: History) -> None:
    axes.plot(history.epochs, history.columns["loss"], color="black", marker=".")
    axes.set(ylabel="loss", title="Training loss")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _draw_recalls(axes: Axes, history: History) -> None:
    """Draws the recalls of both directions at the epochs at which they were measured."""
    measured = np.isfinite(history.columns["rsum"])
    epochs = history.epochs[measured]
    for k, style in _LINES.items():
        for direction, colour, marker, label in _DIRECTIONS:
            recall = history.columns[f"{direction}_R@{k}"][measured]
            axes.plot(epochs, recall, color=colour, linestyle=style, marker=marker, label=f"{label}, R@{k}")
