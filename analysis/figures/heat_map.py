"""Heat maps of a sweep: R@1 both ways over each two axes of the grid, on one colour scale."""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from onceover.analysis.drawing import (
    COLOUR_MAP,
    HIGHLIGHT,
    MAX_SIDE,
    WIDTH,
    label_of,
    slant_long_labels,
    spaced,
    wrapped_key,
)
from onceover.analysis.sources import SweepTable

SOURCE = "sweep"
ORDER = 10
_PANELS = (("i2t_R@1", "image → caption"), ("t2i_R@1", "caption → image"))
_MOST_WRITTEN = 8  # values along an axis whose cells have room for a number
_MOST_LABELS_ACROSS = 9  # values along an axis that are labelled
_MOST_LABELS_DOWN = 16
_BLACK_ABOVE = 0.18  # luminance of a cell on which black text has more contrast than white (WCAG 2)
_NO_NUMBER = "#DDDDDD"


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
    is_written = len(across) <= _MOST_WRITTEN and len(down) <= _MOST_WRITTEN
    height = min(MAX_SIDE - 3, 1.6 + max(1.2, (0.35 if is_written else 0.2) * len(down)))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    best = (down.index(table.rows[0][first]), across.index(table.rows[0][second]))
    scale = _scale(cells)
    for axes, (column, title) in zip(panels, _PANELS, strict=True):
        matrix = _draw_cells(axes, cells, column, (len(down), len(across)), scale, is_written)
        corner = (best[1] - 0.5, best[0] - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=HIGHLIGHT, linewidth=2, clip_on=False, zorder=3))
        axes.set(xlabel=wrapped_key(second, 40), title=title)
        _label_values(axes.xaxis, across, _MOST_LABELS_ACROSS)
        _label_values(axes.yaxis, down, _MOST_LABELS_DOWN)
        slant_long_labels(axes)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel(wrapped_key(first, 30))
    panels[1].tick_params(axis="y", left=False)
    figure.colorbar(matrix, ax=panels, label="R@1 in %")
    remarks = _remarks(cells, is_written)
    if len(table.rows) > len(cells):
        remarks.insert(0, "of several settings in a cell the best one by rsum is shown")
    figure.supxlabel("\n".join(remarks))
    figure.suptitle(f"R@1 over two settings\n{table.measured_on()}")
    return figure


def _scale(cells: dict[tuple[int, int], dict]) -> Normalize:
    """The colour scale of both panels."""
    values = [row[column] for row in cells.values() for column, _ in _PANELS if column in row]
    return Normalize(min(values), max(*values, min(values) + 0.1))


def _remarks(cells: dict[tuple[int, int], dict], is_written: bool) -> list[str]:
    """What the signs in the cells mean, and what is left out."""
    remarks = ["framed: the best setting by rsum"]
    outcomes = {row["outcome"] for row in cells.values()}
    if not is_written:
        remarks.append("too many cells for numbers, which are in results.csv")
    elif "dropped" in outcomes:
        remarks.append("*: dropped early, as it stood then")
    if "diverged" in outcomes:
        remarks.append("grey: diverged")
    return remarks


def _label_values(axis: Axis, values: list, most: int) -> None:
    """Puts a label to each value along an axis, or to some where there are too many."""
    kept = spaced(range(len(values)), most) if len(values) > 1 else [0]
    axis.set_ticks(kept, [label_of(values[number]) for number in kept])


def _draw_cells(
    axes: Axes,
    cells: dict[tuple[int, int], dict],
    column: str,
    shape: tuple[int, int],
    scale: Normalize,
    is_written: bool,
) -> AxesImage:
    """Draws a column's numbers as colours, and, where they have room, writes them into their cells."""
    values = np.full(shape, np.nan)
    for cell, row in cells.items():
        values[cell] = row.get(column, np.nan)
    axes.set_facecolor(_NO_NUMBER)
    matrix = axes.imshow(values, cmap=COLOUR_MAP, norm=scale, aspect="auto")
    if not is_written:
        return matrix
    for cell, row in cells.items():
        value = values[cell]
        text = "–"
        colour = "black"
        if not np.isnan(value):
            text = f"{value:.1f}"
            if row["outcome"] == "dropped":
                text += "*"
            colour = "black" if _luminance(matrix.to_rgba(value)) > _BLACK_ABOVE else "white"
        axes.text(cell[1], cell[0], text, ha="center", va="center", color=colour)
    return matrix


def _luminance(colour: tuple[float, ...]) -> float:
    """The relative luminance of a colour, 0 to 1 (WCAG 2, section 1.4.3)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
