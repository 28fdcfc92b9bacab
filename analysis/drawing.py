"""Drawing shared by all figures: colours, style, and files that are written whole, each figure as PNG and SVG.

Colours are two of Okabe and Ito's (blue for images, vermilion for captions), told apart by shape as well.
"""

import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.sources import PlotError
from onceover.base.outputs import Outputs
from onceover.base.progress import say

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

IMAGE_COLOUR = "#0072B2"
CAPTION_COLOUR = "#D55E00"
NEUTRAL_COLOUR = "#7F7F7F"
HIGHLIGHT = "#D55E00"
COLOUR_MAP = "cividis"
FORMATS = (".png", ".svg", ".pdf")  # others that Matplotlib has need TeX, or are read by few
SUFFIXES = (".png", ".svg")  # of each figure of a folder
STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "text.parse_math": False,  # a dollar sign in a caption is a dollar sign
    "svg.hashsalt": "onceover",  # the same figure gives the same SVG
    "svg.fonttype": "none",
}


def draw_all(drawings: Mapping[str, Callable[[], Figure] | str], out: str | Path) -> list[Path]:
    """Draws figures, by name, in the project's style, each as PNG and SVG; returns the files.

    Args:
        drawings: functions that draw a figure each; or the reason why one is not drawn, which is told.

    Raises:
        OutputError: a file of one of their names is somebody else's; nothing is drawn then.
    """
    outputs = Outputs(Path(out), "name another folder for the figures")
    files = {}
    for name, draw in drawings.items():
        if not isinstance(draw, str):
            files[name] = [f"{name}{suffix}" for suffix in SUFFIXES]
    with outputs.writing(chain.from_iterable(files.values())):
        pass  # refuses before anything is drawn
    written = []
    for name, draw in drawings.items():
        if isinstance(draw, str):
            say(f"not drawn: {name}: {draw}")
            continue
        say(f"drawing {name}")
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "constrained_layout not applied")  # of labels longer than the figure
            figure = draw()
            with outputs.writing(files[name]):
                written += [_save(figure, outputs, file) for file in files[name]]
    return written


def check_figure(path: str | Path) -> None:
    """Refuses a file that could not be drawn to, before the work for it is done.

    Raises:
        PlotError: the suffix names no format that is written. OutputError: a file of somebody else's is there.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise PlotError(f"{path} names no image format; use .png, .svg or .pdf")
    _outputs_beside(path).check(path.name)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure whole or not at all, and never over a file of somebody else's.

    Raises:
        PlotError: the suffix names no format that is written. OutputError: a file of somebody else's is there.
    """
    check_figure(path)
    with _outputs_beside(path).writing([path.name]):
        return _save(figure, _outputs_beside(path), path.name)


def _outputs_beside(path: Path) -> Outputs:
    return Outputs(path.parent, "name another file for the figure")


def _save(figure: Figure, outputs: Outputs, name: str) -> Path:
    metadata = {"Date": None} if name.lower().endswith(".svg") else None
    with outputs.file(name) as aside:
        figure.savefig(aside, bbox_inches="tight", metadata=metadata)
    return outputs.folder / name


def plain_ticks(axes: Axes) -> None:
    """Writes 1, 10, 100 and 1,000 under a logarithmic axis, rather than powers."""
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")


def label_of(value: float | str) -> str:
    """The label of a setting's value."""
    return value if isinstance(value, str) else f"{value:g}"
