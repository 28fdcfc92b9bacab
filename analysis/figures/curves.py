"""Curves through a sweep's best setting: R@1 along each axis of the grid while the others stay as they are there."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.drawing import CAPTION_COLOUR, IMAGE_COLOUR, label_of
from onceover.analysis.sources import SweepTable

SOURCE = "sweep"
ORDER = 20
_LINES = (("i2t_R@1", "image → caption", IMAGE_COLOUR), ("t2i_R@1", "caption → image", CAPTION_COLOUR))
_WIDE = 5  # a numeric axis whose ends differ by more than this factor is logarithmic


def drawings(source: SweepTable) -> dict[str, Callable[[], Figure]]:
    """The curves, where a setting has several values."""
    keys = source.varied_keys()
    if not keys:
        return {}
    return {"curves": partial(draw_curves, source, keys)}


def draw_curves(table: SweepTable, keys: list[str]) -> Figure:
    """Draws a panel for each setting; bands are the seeds' standard deviation."""
    figure = Figure(figsize=(4.2 * len(keys), 3.8), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        others = [other for other in keys if other != key]
        _draw_panel(axes, key, _rows_along(table, key, others))
    panels[0].set_ylabel("R@1 in %")
    handles, labels = panels[0].get_legend_handles_labels()
    title = "Through the best setting"
    if any("i2t_R@1_sd" in row for row in table.rows):
        title += "; bands: the seeds' standard deviation"
    if table.has_dropped():
        title += "; hollow: dropped early"
    title += f"\n{table.measured_on()}"
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
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
    for column, label, colour in _LINES:
        values = np.array([row[column] for row in rows])
        spread = np.array([row.get(f"{column}_sd", 0.0) for row in rows])
        axes.plot(positions, values, color=colour, marker="o", markersize=4, label=label)
        axes.fill_between(positions, values - spread, values + spread, color=colour, alpha=0.2, linewidth=0)
    dropped = [number for number, row in enumerate(rows) if row["outcome"] == "dropped"]
    for column, _, _ in _LINES:
        early = [rows[number][column] for number in dropped]
        axes.plot([positions[number] for number in dropped], early, "o", color="white", markersize=2.5)
    axes.set(xlabel=key)


def _set_axis(axes: Axes, values: list) -> list:
    """Puts a tick for each value on the x axis, logarithmic where they span much; returns the values' positions."""
    is_numeric = all(isinstance(value, float) for value in values)
    positions = values if is_numeric else list(range(len(values)))
    if is_numeric and min(values) > 0 and max(values) > _WIDE * min(values):
        axes.set_xscale("log")
    axes.set_xticks(positions, [label_of(value) for value in values])
    axes.set_xticks([], minor=True)
    return positions
