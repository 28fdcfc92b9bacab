"""Curves through a sweep's best setting: R@1 along each axis of the grid while the others stay as they are there."""

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
    label_of,
    legend_below,
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
_LONG = 6  # characters of a label, beyond which labels are slanted
_WIDE = 5  # a numeric axis whose ends differ by more than this factor is logarithmic


def drawings(source: SweepTable) -> dict[str, Callable[[], Figure]]:
    """The curves, where a setting has several values."""
    keys = source.varied_keys()
    if not keys:
        return {}
    return {"curves": partial(draw_curves, source, keys)}


def draw_curves(table: SweepTable, keys: list[str]) -> Figure:
    """Draws a panel for each setting; bands are the seeds' standard deviation."""
    columns = min(_COLUMNS, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 1.0 + 3.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, key in zip(panels.flat, keys, strict=False):
        others = [other for other in keys if other != key]
        _draw_panel(axes, key, _rows_along(table, key, others))
    for axes in panels.flat[len(keys) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("R@1 in %")
    title = "R@1 through the best setting"
    if any("i2t_R@1_sd" in row for row in table.rows):
        title += "; bands: the seeds' standard deviation"
    if table.has_dropped():
        title += "; hollow: dropped early"
    title += f"\n{table.measured_on()}"
    legend_below(figure, panels[0, 0], 2)
    figure.suptitle(title, fontsize=11)
    return figure


def _rows_along(table: SweepTable, key: str, others: list[str]) -> list[dict]:
    """The rows that differ from the best one in a single setting, by that setting's value."""
    best = table.rows[0]
    along = [row for row in table.rows if "rsum" in row and all(row[other] == best[other] for other in others)]
    values = table.values(key)
    return sorted(along, key=lambda row: values.index(row[key]))


def _draw_panel(axes: Axes, key: str, rows: list[dict]) -> None:
    """Draws R@1 both ways along one setting."""
    positions = _set_axis(axes, [row[key] for row in rows])
    for column, label, colour, marker in _LINES:
        values = np.array([row[column] for row in rows])
        spread = np.array([row.get(f"{column}_sd", 0.0) for row in rows])
        axes.plot(positions, values, color=colour, marker=marker, markersize=5, label=label)
        axes.fill_between(positions, values - spread, values + spread, color=colour, alpha=0.2, linewidth=0)
    dropped = [number for number, row in enumerate(rows) if row["outcome"] == "dropped"]
    for column, _, _, marker in _LINES:
        early = [rows[number][column] for number in dropped]
        axes.plot([positions[number] for number in dropped], early, marker, color="white", markersize=2.5)
    axes.set(xlabel=wrapped_key(key, 36))


def _set_axis(axes: Axes, values: list) -> list:
    """Puts a tick for each value on the x axis, logarithmic where they span much; returns the values' positions."""
    is_numeric = all(isinstance(value, float) for value in values)
    positions = values if is_numeric else list(range(len(values)))
    places = positions
    if is_numeric and min(values) > 0 and max(values) > _WIDE * min(values):
        axes.set_xscale("log")
        places = np.log(values).tolist()
    kept = spaced(places, _MOST_LABELS) if len(places) > 1 else [0]
    labels = [label_of(values[number]) for number in kept]
    axes.set_xticks([positions[number] for number in kept], labels)
    axes.set_xticks([], minor=True)
    if max(map(len, labels)) > _LONG:
        for text in axes.get_xticklabels():
            text.set(rotation=30, ha="right", rotation_mode="anchor")
    return positions
