"""Curves through a sweep's best setting: R@1 along each axis of the grid while the others stay as they are there."""

import textwrap
from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.drawing import (
    CAPTION_COLOUR,
    CAPTION_MARKER,
    IMAGE_COLOUR,
    IMAGE_MARKER,
    WIDTH,
    label_of,
    legend_below,
    places_of,
    shortened,
    slant_long_labels,
    spaced,
    wrapped_key,
)
from onceover.analysis.sources import SweepTable

SOURCE = "sweep"
ORDER = 20
_LINES = (
    ("i2t_R@1", "image → caption", IMAGE_COLOUR, IMAGE_MARKER),
    ("t2i_R@1", "caption → image", CAPTION_COLOUR, CAPTION_MARKER),
)
_COLUMNS = 3  # panels beside each other
_MOST_LABELS = 6  # along an axis
_APART = 0.01  # of an axis, of each direction from the setting's place, so that bars do not lie on each other
_LINE = 84  # characters beside each other across the figure
_MOST_LINES = 3  # under a panel, that say which settings stay as they are


def drawings(source: SweepTable) -> dict[str, Callable[[], Figure]]:
    """The curves, where a setting has several values."""
    keys = source.varied_keys()
    if not keys:
        return {}
    return {"curves": partial(draw_curves, source, keys)}


def draw_curves(table: SweepTable, keys: list[str]) -> Figure:
    """Draws a panel for each setting; bars are intervals over images, bands the seeds' standard deviation."""
    columns = min(_COLUMNS, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, key in zip(panels.flat, keys, strict=False):
        others = {other: table.rows[0][other] for other in keys if other != key}
        _draw_panel(axes, key, _rows_along(table, key, others), table.rows[0])
        axes.set_xlabel("\n".join([wrapped_key(key, 36), *_held(others, _LINE // columns)]))
    for axes in panels.flat[len(keys) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("R@1 in %")
    title = "R@1 through the best setting"
    if any("i2t_R@1_low" in row for row in table.rows):
        title += "; bars: 95 % intervals over images"
    if any("i2t_R@1_sd" in row for row in table.rows):
        title += "; bands: the seeds' standard deviation"
    if table.has_dropped():
        title += "; hollow: dropped early"
    legend_below(figure, panels[0, 0], 3)
    figure.suptitle(f"{title}\n{table.measured_on()}")
    return figure


def _rows_along(table: SweepTable, key: str, others: dict) -> list[dict]:
    """The rows that differ from the best one in a single setting, by that setting's value."""
    along = []
    for row in table.rows:
        if "rsum" in row and all(row[other] == value for other, value in others.items()):
            along.append(row)
    values = table.values(key)
    return sorted(along, key=lambda row: values.index(row[key]))


def _held(others: dict, width: int) -> list[str]:
    """Lines that name the settings which stay as they are."""
    if not others:
        return []
    named = [f"{shortened(key.rpartition('.')[2], 20)} = {label_of(value)}" for key, value in others.items()]
    return textwrap.wrap(f"at {', '.join(named)}", width, max_lines=_MOST_LINES, placeholder=" …")


def _draw_panel(axes: Axes, key: str, rows: list[dict], best: dict) -> None:
    """Draws R@1 both ways along one setting; the best one is ringed."""
    axis_values = [row[key] for row in rows]
    _set_axis(axes, axis_values)
    ringed = axis_values.index(best[key])
    dropped = [number for number, row in enumerate(rows) if row["outcome"] == "dropped"]
    for (column, label, colour, marker), side in zip(_LINES, (-1, 1), strict=True):
        positions = _positions(axis_values, side * _APART)
        values = np.array([row[column] for row in rows])
        spread = np.array([row.get(f"{column}_sd", 0.0) for row in rows])
        low = np.array([row.get(f"{column}_low", row[column]) for row in rows])
        high = np.array([row.get(f"{column}_high", row[column]) for row in rows])
        bars = np.maximum([values - low, high - values], 0) if (high > low).any() else None
        axes.errorbar(positions, values, bars, color=colour, marker=marker, elinewidth=0.8, capsize=2, label=label)
        axes.fill_between(positions, values - spread, values + spread, color=colour, alpha=0.2, linewidth=0)
        early = [rows[number][column] for number in dropped]
        places = [positions[number] for number in dropped]
        axes.plot(places, early, marker, color="white", markersize=2.5, zorder=3)
        ring = "the best setting by rsum" if side > 0 else None
        place = positions[ringed]
        axes.plot(place, best[column], "o", color="black", fillstyle="none", markersize=8, label=ring, zorder=3)


def _set_axis(axes: Axes, values: list) -> None:
    """Puts a tick for each value on the x axis, logarithmic where they span much."""
    places, is_logarithmic = places_of(values)
    positions = _positions(values)
    if is_logarithmic:
        axes.set_xscale("log")
    kept = spaced(places, _MOST_LABELS) if len(places) > 1 else [0]
    axes.set_xticks([positions[number] for number in kept], [label_of(values[number]) for number in kept])
    axes.set_xticks([], minor=True)
    slant_long_labels(axes)


def _positions(values: list, shift: float = 0.0) -> list[float]:
    """The values' positions on the x axis, moved to the right by a share of what they span."""
    places, is_logarithmic = places_of(values)
    span = (places[-1] - places[0]) or 1.0
    moved = [place + shift * span for place in places]
    return np.exp(moved).tolist() if is_logarithmic else moved
