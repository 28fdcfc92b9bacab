"""Training curves: a run's loss epoch by epoch, and its recalls on the validation split whenever they were measured."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.drawing import CAPTION_COLOUR, IMAGE_COLOUR, NEUTRAL_COLOUR
from onceover.analysis.sources import History, RunFiles, read_choice, read_history

SOURCE = "run"
ORDER = 30
_LINES = {1: "-", 5: "--", 10: ":"}
_DIRECTIONS = (
    ("image_to_text", IMAGE_COLOUR, "image → caption"),
    ("text_to_image", CAPTION_COLOUR, "caption → image"),
)


def drawings(source: RunFiles) -> dict[str, Callable[[], Figure] | str]:
    """The curves of a single fit; the members of an ensemble have curves of their own."""
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
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(history.epochs, history.columns["loss"], color="black", marker=".")
    left.set(xlabel="epoch", ylabel="training loss", title="Loss")
    _draw_recalls(right, history)
    right.set(
        xlabel="epoch",
        ylabel="recall in %",
        title=f"Recall on {choice.split}, {choice.images:,} images",
        ylim=(0, None),
    )
    for axes in (left, right):
        axes.axvline(choice.best_epoch, color=NEUTRAL_COLOUR, linewidth=0.8, label=f"best epoch: {choice.best_epoch}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw_recalls(axes: Axes, history: History) -> None:
    """Draws the recalls of both directions at the epochs at which they were measured."""
    measured = np.isfinite(history.columns["rsum"])
    epochs = history.epochs[measured]
    for direction, colour, label in _DIRECTIONS:
        for k, style in _LINES.items():
            recall = history.columns[f"{direction}_R@{k}"][measured]
            axes.plot(epochs, recall, color=colour, linestyle=style, marker=".", label=f"{label}, R@{k}")
