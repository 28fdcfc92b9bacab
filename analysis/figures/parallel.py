"""Parallel coordinates of a sweep: every setting as a line through all axes to its rsum, which also colours it."""

from collections.abc import Callable
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from onceover.analysis.drawing import COLOUR_MAP, MAX_SIDE, WIDTH, label_of, places_of, spaced, wrapped_key
from onceover.analysis.sources import SweepTable

SOURCE = "sweep"
ORDER = 30
_MOST_LABELS = 14  # along an axis
_MOST_LINES = 200
_DARKEST = 0.8  # share of the colour map that is used: its bright end would not be seen on white
_AXIS = 1.0  # inches between two axes, at least
_CHARACTER = 0.07  # inches, of a label
_MARGIN = 0.08  # inches between a label and its axis
_MOST_LEVEL = 0.65  # of the way from one axis to the next, that lines may be level to leave room for labels
_RSUM_LABELS = 5


def drawings(source: SweepTable) -> dict[str, Callable[[], Figure]]:
    """The lines, where a setting has several values."""
    keys = source.varied_keys()
    if not keys:
        return {}
    return {"parallel": partial(draw_parallel, source, keys)}


def draw_parallel(table: SweepTable, keys: list[str]) -> Figure:
    """Draws a line for each setting that did not diverge, the best one thick; rings mark what ties with it.

    Before each axis the lines run level, so that the labels of its values stand above them.
    """
    measured = [row for row in table.rows if "rsum" in row]
    shown = measured[:_MOST_LINES]
    rsums = np.array([row["rsum"] for row in shown])
    scale = Normalize(rsums.min(), max(rsums.max(), rsums.min() + 1e-9))
    colours = ListedColormap(matplotlib.colormaps[COLOUR_MAP](np.linspace(0, _DARKEST, 256)))
    width = min(MAX_SIDE, max(WIDTH, _AXIS * (len(keys) + 2)))
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot()
    heights = {key: _heights(table.values(key)) for key in keys}
    inches = width / (len(keys) + 1.5)
    level = {key: _level(table.values(key), inches) for key in keys}
    for row in reversed(shown):  # the best on top
        across = [0.0]
        down = [heights[keys[0]][row[keys[0]]]]
        for number, key in enumerate(keys[1:], 1):
            across += [number - level[key], number]
            down += [heights[key][row[key]]] * 2
        style = ":" if row["outcome"] == "dropped" else "-"
        axes.plot(
            [*across, len(keys)],
            [*down, scale(row["rsum"])],
            style,
            color=colours(scale(row["rsum"])),
            linewidth=2.8 if row is shown[0] else 0.9,
        )
    ties = [scale(row["rsum"]) for row in shown if row.get("verdict") == "tie"]
    if ties:
        axes.plot([len(keys)] * len(ties), ties, "o", color="black", markerfacecolor="white", clip_on=False)
    for number, key in enumerate(keys):
        _draw_axis(axes, number, heights[key], inches)
    axes.axvline(len(keys), color="black", linewidth=0.8, zorder=1)
    axes.set(xlim=(-0.1 - level[keys[0]], len(keys) + 0.02), yticks=[], xticks=range(len(keys) + 1))
    axes.set_xticklabels([*(wrapped_key(key, 16) for key in keys), "rsum"])
    axes.spines[:].set_visible(False)
    ticks = np.linspace(scale.vmin, scale.vmax, _RSUM_LABELS)
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, label="rsum", fraction=0.05, pad=0.02)
    bar.set_ticks(ticks, labels=[f"{value:.1f}" for value in ticks])
    axes.set_title("\n".join([*_signs(table, len(shown), len(measured), bool(ties)), table.measured_on()]))
    return figure


def _signs(table: SweepTable, shown: int, measured: int, has_ties: bool) -> list[str]:
    """The title, and a line that says what the signs mean."""
    title = f"rsum of all {shown:,} settings"
    if shown < measured:
        title = f"rsum of the first {shown:,} of {measured:,} settings"
    signs = ["thick line: the best"]
    if has_ties:
        signs.append("ring: cannot be told from the best")
    if table.has_dropped():
        signs.append("dotted: dropped early")
    return [title, "; ".join(signs)]


def _heights(values: list) -> dict[float | str, float]:
    """The height of each value on its axis, 0 to 1."""
    places, _ = places_of(values)
    length = places[-1] - places[0]
    return {value: (place - places[0]) / length for value, place in zip(values, places, strict=True)}


def _level(values: list, inches: float) -> float:
    """The way before an axis on which lines run level, as a share of the way between two axes."""
    longest = max(len(label_of(value)) for value in values)
    return min(_MOST_LEVEL, (longest * _CHARACTER + 2 * _MARGIN) / inches)


def _draw_axis(axes: Axes, position: int, heights: dict[float | str, float], inches: float) -> None:
    """Draws the axis of a setting, labelled with its values."""
    axes.axvline(position, color="black", linewidth=0.8, zorder=1)
    values = list(heights)
    for number in spaced(list(heights.values()), _MOST_LABELS):
        axes.annotate(
            label_of(values[number]),
            (position - _MARGIN / inches, heights[values[number]]),
            (0, 2 if position else 0),
            textcoords="offset points",
            ha="right",
            va="bottom" if position else "center",
        )
