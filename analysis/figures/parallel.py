"""Parallel coordinates of a sweep: every setting as a line through all axes to its rsum, which also colours it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.drawing import COLOUR_MAP, HIGHLIGHT, MAX_SIDE, label_of, spaced, wrapped_key
from onceover.analysis.sources import SweepTable

SOURCE = "sweep"
ORDER = 30
_MOST_LABELS = 14  # along an axis
_MOST_LINES = 200
_ANNOTATION: dict[str, Any] = {
    "textcoords": "offset points",
    "va": "center",
    "bbox": {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
}


def drawings(source: SweepTable) -> dict[str, Callable[[], Figure]]:
    """The lines, where a setting has several values."""
    keys = source.varied_keys()
    if not keys:
        return {}
    return {"parallel": partial(draw_parallel, source, keys)}


def draw_parallel(table: SweepTable, keys: list[str]) -> Figure:
    """Draws a line for each setting that did not diverge; the best one is highlighted."""
    measured = [row for row in table.rows if "rsum" in row]
    shown = measured[:_MOST_LINES]
    rsums = np.array([row["rsum"] for row in shown])
    lowest = rsums.min()
    highest = max(rsums.max(), lowest + 1e-9)
    figure = Figure(figsize=(min(MAX_SIDE, 2.2 * (len(keys) + 1) + 1), 4.6), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps[COLOUR_MAP]
    for row in reversed(shown):  # the best on top
        level = (row["rsum"] - lowest) / (highest - lowest)
        heights = [_height(table.values(key), row[key]) for key in keys]
        style = ":" if row["outcome"] == "dropped" else "-"
        line: dict[str, Any]
        if row is shown[0]:
            line = {"color": HIGHLIGHT, "linewidth": 2.6}
        else:
            line = {"color": colours(level), "linewidth": 1.1}
        axes.plot(range(len(keys) + 1), [*heights, level], style, alpha=0.9, **line)
    for number, key in enumerate(keys):
        _draw_axis(axes, number, table.values(key))
    _draw_rsum_axis(axes, len(keys), lowest, highest)
    axes.set(xlim=(-0.4, len(keys) + 0.3), yticks=[], xticks=range(len(keys) + 1))
    axes.set_xticklabels([*(wrapped_key(key, 16) for key in keys), "rsum"])
    axes.spines[:].set_visible(False)
    title = f"rsum of all {len(shown):,} settings"
    if len(shown) < len(measured):
        title = f"rsum of the first {len(shown):,} of {len(measured):,} settings"
    title += "; the best in vermilion"
    if table.has_dropped():
        title += "; dotted: dropped early"
    axes.set_title(f"{title}\n{table.measured_on()}")
    return figure


def _height(values: list, value: float | str) -> float:
    """The height of a value on its axis, 0 to 1."""
    return values.index(value) / max(1, len(values) - 1)


def _draw_axis(axes: Axes, position: int, values: list) -> None:
    """Draws the axis of a setting, labelled with its values."""
    axes.axvline(position, color="black", linewidth=0.8)
    heights = [_height(values, value) for value in values]
    for number in spaced(heights, _MOST_LABELS):
        axes.annotate(label_of(values[number]), (position, heights[number]), (-5, 0), **_ANNOTATION, ha="right")


def _draw_rsum_axis(axes: Axes, position: int, lowest: float, highest: float) -> None:
    """Draws the axis of the rsum, labelled at five heights."""
    axes.axvline(position, color="black", linewidth=0.8)
    for level in np.linspace(0, 1, 5):
        text = f"{lowest + level * (highest - lowest):.0f}"
        axes.annotate(text, (position, level), (5, 0), **_ANNOTATION, ha="left")
