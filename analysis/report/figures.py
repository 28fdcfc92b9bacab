"""Figures of a report: those that ``plot`` draws, as SVG images."""

from collections.abc import Callable
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from onceover.analysis.drawing import draw_svg
from onceover.analysis.figures import drawings_of
from onceover.analysis.pages.tables import page_table
from onceover.analysis.report.files import AbsentError, ReportFiles
from onceover.analysis.sources import PlotError, read_sweep
from onceover.base.errors import OnceoverError
from onceover.base.formats import RESULTS
from onceover.base.terminal import Table
from onceover.retrieval.leaderboard import leaderboard_tables, notes
from onceover.retrieval.tables import DIRECTION_NAMES

PLACED = ("tsne", "pca", "similarity", "similarity-ordered", "training", "ranks", "models")  # elsewhere, or in the map
_SHOWN = 10  # settings of a sweep
_DIRECTIONS = {"i2t": DIRECTION_NAMES["image_to_text"], "t2i": DIRECTION_NAMES["text_to_image"]}


class ShownFigure(NamedTuple):
    """A figure: its SVG and its titles, or the reason why there is none."""

    name: str
    svg: bytes | None
    text: str


def drawing_of(files: ReportFiles, name: str) -> dict[str, Any]:
    """One figure of the run."""
    return {"figure": _drawn(name, drawings_of("run", files.run)[name])}


def other_figures(files: ReportFiles) -> dict[str, Any]:
    """The figures of the run that have no place of their own: those of other packages."""
    drawings = drawings_of("run", files.run)
    return {"figures": [_drawn(name, draw) for name, draw in drawings.items() if name not in PLACED]}


def sweep(files: ReportFiles) -> dict[str, Any]:
    """A sweep's figures, and the first settings of its leaderboard.

    Raises:
        AbsentError: no sweep was named. PlotError: its table is missing, damaged or of an earlier version.
    """
    if files.sweep is None:
        raise AbsentError("no sweep was named; add --sweep DIR")
    leaderboard = read_sweep(files.sweep)
    rows = [_whole_numbers(row) for row in leaderboard.rows]
    try:
        (best,) = leaderboard_tables(rows, leaderboard.keys, most=_SHOWN)
    except KeyError as error:
        raise PlotError(f"{files.sweep / RESULTS} is damaged, or of another version; run the sweep again") from error
    header, *settings = best.rows
    header[0] = "place"
    for short, name in _DIRECTIONS.items():
        header = [column.replace(short, name) for column in header]
    return {
        "folder": str(files.sweep),
        "count": len(rows),
        "table": page_table(Table("The best settings", [header, *settings])),
        "notes": notes(rows[:_SHOWN], has_short_names=False),
        "figures": [_drawn(name, draw) for name, draw in drawings_of("sweep", leaderboard).items()],
    }


def _whole_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose whole numbers are written without a point."""
    whole = {name: int(value) for name, value in row.items() if isinstance(value, float) and value.is_integer()}
    return row | whole


def _drawn(name: str, draw: Callable[[], Figure] | str) -> ShownFigure:
    """A figure as SVG; what cannot be drawn is said in its place."""
    if isinstance(draw, str):
        return ShownFigure(name, None, draw)
    try:
        figure, svg = draw_svg(draw)
    except OnceoverError as error:
        return ShownFigure(name, None, str(error))
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    return ShownFigure(name, svg, "; ".join(title.replace("\n", ", ") for title in titles if title))
