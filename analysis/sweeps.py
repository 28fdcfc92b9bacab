"""Figures of a sweep, drawn from its table alone: heat maps, curves through the best setting, parallel coordinates."""

import csv
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from onceover.analysis.plots import CAPTION, PICTURE, PlotError, draw_all, number_of, read_table
from onceover.base.errors import OnceoverError
from onceover.base.formats import RESULTS

_SIDES = (("i2t_R@1", "image → caption", PICTURE), ("t2i_R@1", "caption → image", CAPTION))
_COLOURS = "cividis"
_BESIDE = {
    "textcoords": "offset points",
    "va": "center",
    "bbox": {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
}
_LONGEST = 200  # characters of a cell
_OUTCOMES = ("finished", "dropped", "diverged")
_BOUNDS = {  # of the table's numbers that are drawn
    "i2t_R@1": (0, 100),
    "t2i_R@1": (0, 100),
    "i2t_R@1_sd": (0, 100),
    "t2i_R@1_sd": (0, 100),
    "rsum": (0, 600),
    "pictures": (1, 10**12),
    "captions": (1, 10**12),
}
_DRAWN = {"i2t_R@1", "t2i_R@1", "rsum", "pictures", "captions"}
_WIDE = 5  # a numeric axis whose ends differ by more than this factor is logarithmic


def plot_sweep(folder: str | Path, out: str | Path, step: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Draws a sweep's ``results.csv``.

    Heat maps of R@1 both ways for each two axes of the grid, the best of all other values in each cell; R@1 along each
    axis through the best setting, with the spread of the seeds; and every setting as a line through all axes.

    Args:
        step: receives the name of each figure before it is drawn.

    Returns:
        The files written.

    Raises:
        PlotError: the table is missing or damaged.
    """
    rows, keys = _read(Path(folder) / RESULTS)
    varied = [key for key in keys if len(_values(rows, key)) > 1]
    drawings: dict[str, Callable[[], Figure]] = {}
    for first, second in itertools.combinations(varied, 2):
        name = f"heatmap-{_short(first)}-{_short(second)}"
        drawings[name] = lambda first=first, second=second: draw_heat_map(rows, first, second)
    if varied:
        drawings["curves"] = lambda: draw_curves(rows, varied)
        drawings["parallel"] = lambda: draw_parallel(rows, varied)
    return draw_all(drawings, Path(out), step)


def draw_heat_map(rows: list[dict], first: str, second: str) -> Figure:
    """R@1 both ways over two axes of the grid; a cell shows its best setting by rsum, the best of all is framed."""
    down, across = _values(rows, first), _values(rows, second)
    best = {}
    for row in rows:  # best first
        best.setdefault((row[first], row[second]), row)
    figure = Figure(figsize=(3.2 + 1.5 * len(across), 1.8 + 0.5 * len(down)), layout="constrained")
    for axes, (column, title, _) in zip(figure.subplots(1, 2, sharey=True), _SIDES, strict=True):
        table = np.full((len(down), len(across)), np.nan)
        for (one, other), row in best.items():
            table[down.index(one), across.index(other)] = row.get(column, np.nan)
        axes.imshow(table, cmap=_COLOURS, aspect="auto")
        middle = (np.nanmin(table) + np.nanmax(table)) / 2
        for (one, other), row in best.items():
            value = table[place := (down.index(one), across.index(other))]
            text = "–" if np.isnan(value) else f"{value:.1f}" + ("*" if row["outcome"] == "dropped" else "")
            axes.text(*place[::-1], text, ha="center", va="center", color="white" if value < middle else "black")
        place = across.index(rows[0][second]), down.index(rows[0][first])
        axes.add_patch(
            Rectangle((place[0] - 0.5, place[1] - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.5)
        )
        axes.set(xticks=range(len(across)), yticks=range(len(down)), xlabel=second, title=f"{title}, R@1 in %")
        axes.set_xticklabels(map(_label, across))
        axes.set_yticklabels(map(_label, down))
        axes.spines[:].set_visible(False)
    figure.axes[0].set_ylabel(first)
    note = "framed: the best setting by rsum" + (
        "; *: dropped early, as it stood then" if any(row["outcome"] == "dropped" for row in best.values()) else ""
    )
    figure.supxlabel(note, fontsize=9)
    figure.suptitle(_measured_on(rows), fontsize=11)
    return figure


def draw_curves(rows: list[dict], keys: list[str]) -> Figure:
    """R@1 along each axis while the others stay at the best setting; the band is the seeds' standard deviation."""
    figure = Figure(figsize=(4.2 * len(keys), 3.8), layout="constrained")
    several = any("i2t_R@1_sd" in row for row in rows)
    for axes, key in zip(figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        others = [other for other in keys if other != key]
        along = [row for row in rows if all(row[other] == rows[0][other] for other in others) and "rsum" in row]
        along.sort(key=lambda row: _values(rows, key).index(row[key]))
        places = _places(axes, [row[key] for row in along])
        for column, label, colour in _SIDES:
            values = np.array([row[column] for row in along])
            spread = np.array([row.get(f"{column}_sd", 0.0) for row in along])
            axes.plot(places, values, color=colour, marker="o", markersize=4, label=label)
            axes.fill_between(places, values - spread, values + spread, color=colour, alpha=0.2, linewidth=0)
        dropped = [number for number, row in enumerate(along) if row["outcome"] == "dropped"]
        for column, _, _ in _SIDES:
            early = [along[number][column] for number in dropped]
            axes.plot([places[number] for number in dropped], early, "o", color="white", markersize=2.5)
        axes.set(xlabel=key)
    figure.axes[0].set_ylabel("R@1 in %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    title = "Through the best setting" + ("; bands: the seeds' standard deviation" if several else "")
    if any(row["outcome"] == "dropped" for row in rows):
        title += "; hollow: dropped early"
    title += f"\n{_measured_on(rows)}"
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_parallel(rows: list[dict], keys: list[str]) -> Figure:
    """Every setting as a line through all axes to its rsum, which also colours it."""
    shown = [row for row in rows if "rsum" in row]
    rsum = np.array([row["rsum"] for row in shown])
    figure = Figure(figsize=(2.2 * (len(keys) + 1) + 1, 4.4), layout="constrained")
    axes = figure.add_subplot()
    span = (rsum.min(), max(rsum.max(), rsum.min() + 1e-9))
    colours = matplotlib.colormaps[_COLOURS]
    for row in reversed(shown):  # the best on top
        heights = []
        for key in keys:
            values = _values(rows, key)
            heights.append(values.index(row[key]) / max(1, len(values) - 1))
        level = (row["rsum"] - span[0]) / (span[1] - span[0])
        style = ":" if row["outcome"] == "dropped" else "-"
        best = row is shown[0]
        colour = "#D55E00" if best else colours(level)
        axes.plot(
            range(len(keys) + 1), [*heights, level], style, color=colour, linewidth=2.6 if best else 1.1, alpha=0.9
        )
    for number, key in enumerate(keys):
        values = _values(rows, key)
        axes.axvline(number, color="black", linewidth=0.8)
        for place, value in enumerate(values):
            height = place / max(1, len(values) - 1)
            axes.annotate(_label(value), (number, height), (-5, 0), **_BESIDE, ha="right")
    axes.axvline(len(keys), color="black", linewidth=0.8)
    for level in np.linspace(0, 1, 5):
        text = f"{span[0] + level * (span[1] - span[0]):.0f}"
        axes.annotate(text, (len(keys), level), (5, 0), **_BESIDE, ha="left")
    axes.set(xlim=(-0.4, len(keys) + 0.3), yticks=[], xticks=range(len(keys) + 1))
    axes.set_xticklabels([*keys, "rsum"])
    axes.spines[:].set_visible(False)
    title = "Every setting; the best in vermilion"
    if any(row["outcome"] == "dropped" for row in rows):
        title += "; dotted: dropped early"
    axes.set_title(f"{title}\n{_measured_on(rows)}")
    return figure


def _measured_on(rows: list[dict]) -> str:
    """What the numbers are of: the split, and the sizes of both galleries."""
    return f"{rows[0]['split']}: galleries of {rows[0]['pictures']:,.0f} images, {rows[0]['captions']:,.0f} captions"


def _read(path: Path) -> tuple[list[dict], list[str]]:
    """The rows, best first, numbers as numbers, and the grid's keys: the columns before ``outcome``.

    Raises:
        PlotError: missing, or damaged.
    """
    try:
        table = read_table(path)
        columns = list(table[0])
        keys = columns[: columns.index("outcome")]
        rows = [_checked_row(row, keys) for row in table]
        if rows[0]["outcome"] != "finished":
            raise ValueError("no setting came to its end")
    except (OSError, OnceoverError, ValueError, KeyError, csv.Error) as error:
        raise PlotError(f"{path} is missing or damaged; run the sweep again, which fits nothing anew") from error
    return rows, keys


def _checked_row(row: dict[str, str], keys: list[str]) -> dict:
    """A row of the table without its blanks: the grid's values, text, and numbers within their bounds.

    Raises:
        ValueError, KeyError: a value that cannot be drawn, or one that is missing.
    """
    if row["outcome"] not in _OUTCOMES or not row["split"]:
        raise ValueError("an outcome or a split that is none")
    if any(len(value) > _LONGEST for value in (*row, *row.values())):
        raise ValueError("a name or value longer than any setting's")
    checked: dict = {key: _number(row[key]) for key in keys}
    checked |= {name: row[name] for name in ("outcome", "split")}
    for name, (least, most) in _BOUNDS.items():
        if row.get(name):
            checked[name] = number_of(row[name], least, most)
    if row["outcome"] != "diverged" and not set(checked) >= _DRAWN:
        raise ValueError("a number is missing")
    if any(isinstance(value, float) and math.isnan(value) for value in checked.values()):
        raise ValueError("a number is NaN")
    return checked


def _number(text: str) -> float | str:
    """A value of the grid, as a number where it is a finite one."""
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def _values(rows: list[dict], key: str) -> list:
    """The values along an axis, numbers in ascending order."""
    values = {row[key] for row in rows}
    return sorted(values, key=lambda value: (isinstance(value, str), value))


def _places(axes: Axes, values: list) -> list:
    """Where values stand on the x axis, which is logarithmic where they span much, and gets a tick for each."""
    numeric = all(isinstance(value, float) for value in values)
    places = values if numeric else list(range(len(values)))
    if numeric and min(values) > 0 and max(values) > _WIDE * min(values):
        axes.set_xscale("log")
    axes.set_xticks(places, [_label(value) for value in values])
    axes.set_xticks([], minor=True)
    return places


def _label(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _short(key: str) -> str:
    return key.rpartition(".")[2]
