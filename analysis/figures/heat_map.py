"""Heat maps of a sweep: R@1 both ways over each two axes of the grid."""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from onceover.analysis.drawing import COLOUR_MAP, HIGHLIGHT, label_of
from onceover.analysis.sources import SweepTable

SOURCE = "sweep"
ORDER = 10
_PANELS = (("i2t_R@1", "image → caption"), ("t2i_R@1", "caption → image"))


def drawings(source: SweepTable) -> dict[str, Callable[[], Figure]]:
    """A heat map for each two settings that have several values."""
    maps: dict[str, Callable[[], Figure]] = {}
    for first, second in itertools.combinations(source.varied_keys(), 2):
        maps[f"heatmap-{_short(first)}-{_short(second)}"] = partial(draw_heat_map, source, first, second)
    return maps


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def draw_heat_map(table: SweepTable, first: str, second: str) -> Figure:
    """Draws R@1 over two settings; a cell shows its best setting by rsum, and the best of all is framed."""
    down = table.values(first)
    across = table.values(second)
    cells: dict[tuple[int, int], dict] = {}
    for row in table.rows:  # best first
        cells.setdefault((down.index(row[first]), across.index(row[second])), row)
    figure = Figure(figsize=(3.2 + 1.5 * len(across), 1.8 + 0.5 * len(down)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    best = (down.index(table.rows[0][first]), across.index(table.rows[0][second]))
    for axes, (column, title) in zip(panels, _PANELS, strict=True):
        _draw_cells(axes, cells, column, (len(down), len(across)))
        corner = (best[1] - 0.5, best[0] - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=HIGHLIGHT, linewidth=2.5))
        axes.set(xticks=range(len(across)), yticks=range(len(down)), xlabel=second, title=f"{title}, R@1 in %")
        axes.set_xticklabels(map(label_of, across))
        axes.set_yticklabels(map(label_of, down))
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel(first)
    note = "framed: the best setting by rsum"
    if any(row["outcome"] == "dropped" for row in cells.values()):
        note += "; *: dropped early, as it stood then"
    figure.supxlabel(note, fontsize=9)
    figure.suptitle(table.measured_on(), fontsize=11)
    return figure


def _draw_cells(axes: Axes, cells: dict[tuple[int, int], dict], column: str, shape: tuple[int, int]) -> None:
    """Draws a column's numbers as colours, and writes them into their cells."""
    values = np.full(shape, np.nan)
    for cell, row in cells.items():
        values[cell] = row.get(column, np.nan)
    axes.imshow(values, cmap=COLOUR_MAP, aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for cell, row in cells.items():
        value = values[cell]
        text = "–"
        if not np.isnan(value):
            text = f"{value:.1f}"
            if row["outcome"] == "dropped":
                text += "*"
        colour = "white" if value < middle else "black"
        axes.text(cell[1], cell[0], text, ha="center", va="center", color=colour)
