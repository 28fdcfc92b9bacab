"""Parallel coordinates of a sweep: every setting as a line through all axes to its rsum, which also colours it."""

from collections.abc import Callable
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
_RSUM_STEPS = 5  # between labels of the rsum, at most
_ROOM = 0.1  # of an axis' height, above it for the labels of its highest value
_RING = 0.08  # inches, of a ring with its margin
_RING_HEIGHT = 0.04  # of an axis' height


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
    ticks = MaxNLocator(_RSUM_STEPS, steps=[1, 2, 5, 10]).tick_values(rsums.min(), max(rsums.max(), rsums.min() + 1))
    scale = Normalize(ticks[0], ticks[-1])
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
    columns = _columns(ties)
    places = [len(keys) + column * _RING / inches for column in columns]
    if ties:
        axes.plot(places, ties, "o", color="black", markerfacecolor="white", clip_on=False)
    for number, key in enumerate(keys):
        _draw_axis(axes, number, heights[key], inches)
    _draw_rsum_axis(axes, len(keys), {tick: scale(tick) for tick in ticks}, max(columns, default=0) * _RING / inches)
    axes.set(xlim=(-0.1 - level[keys[0]], len(keys) + 0.02), ylim=(-_ROOM / 2, 1 + _ROOM))
    axes.set(yticks=[], xticks=range(len(keys) + 1))
    axes.set_xticklabels([*(wrapped_key(key, 16) for key in keys), "rsum"])
    axes.spines[:].set_visible(False)
    axes.set_title("\n".join([*_signs(table, len(shown), len(measured), bool(ties)), table.measured_on()]))
    return figure


def _signs(table: SweepTable, shown: int, measured: int, has_ties: bool) -> list[str]:
    """The title, and lines that say what the signs mean."""
    title = f"rsum of all {shown:,} settings"
    if shown < measured:
        title = f"rsum of the first {shown:,} of {measured:,} settings"
    signs = ["thick line: the best"]
    if has_ties:
        signs.append("ring: cannot be told from the best")
    if table.has_dropped():
        signs.append("dotted: dropped early")
    lines = [title, "; ".join(signs)]
    if has_ties:
        lines.append(
            "a worse one can have a ring and a better one none: its difference varies more from image to image"
        )
    return lines


def _columns(heights: list[float]) -> list[int]:
    """The column of each ring, so that those of nearly the same height lie beside each other."""
    columns: list[int] = []
    for number, height in enumerate(heights):
        near = [columns[other] for other in range(number) if abs(heights[other] - height) < _RING_HEIGHT]
        columns.append(min(set(range(len(near) + 1)) - set(near)))
    return columns


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
    axes.plot([position, position], [0, 1], color="black", linewidth=0.8, zorder=1)
    values = list(heights)
    for number in spaced(list(heights.values()), _MOST_LABELS):
        axes.annotate(
            label_of(values[number]),
            (position - _MARGIN / inches, heights[values[number]]),
            (0, 2 if position else 0),
            textcoords="offset points",
            ha="right",
            va="bottom" if position else "center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )


def _draw_rsum_axis(axes: Axes, position: int, heights: dict[float, float], room: float) -> None:
    """Draws the axis of the rsum, labelled on its right, with room for rings before the labels."""
    places = [position] * len(heights)
    axes.plot(places, list(heights.values()), color="black", linewidth=0.8, marker="_", markersize=6, zorder=1)
    for value, height in heights.items():
        axes.annotate(
            f"{value:g}",
            (position + room, height),
            (7, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
        )
