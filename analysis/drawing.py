"""Drawing shared by all figures: colours, style, and files that are written whole, each figure as PNG, SVG and PDF.

Colours are those of Okabe and Ito (blue for images, vermilion for captions), told apart by shape as well, and for
numbers cividis, or red to blue where they have two signs. Figures are as wide as a paper's text, so that type of 8 and
9 points stays so in print. The same figure gives the same bytes.
"""

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.fonts import DEFAULT, MISSING_GLYPH, use_fonts
from onceover.analysis.sources import PlotError
from onceover.base.outputs import Outputs
from onceover.base.progress import say

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

IMAGE_COLOUR = "#0072B2"
CAPTION_COLOUR = "#D55E00"
IMAGE_MARKER = "o"
CAPTION_MARKER = "^"
NEUTRAL_COLOUR = "#7F7F7F"
HIGHLIGHT = "#D55E00"
COLOUR_MAP = "cividis"
SIGNED_COLOUR_MAP = "RdBu_r"  # white at 0, blue below, red above
FORMATS = (".png", ".svg", ".pdf")  # others that Matplotlib has need TeX, or are read by few
SUFFIXES = FORMATS  # of each figure of a folder
WIDTH = 7.0  # inches of a figure: a paper's text
MAX_SIDE = 12.0  # inches of a figure, however much it shows
MAX_NAME = 20  # characters of a setting's value
_WIDE = 5  # an axis of numbers whose ends differ by more than this factor is logarithmic
_LONG_LABEL = 6  # characters, beyond which labels under an axis are slanted
_UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # the same figure gives the same file
_FONT_LOGGER = logging.getLogger("fontTools")  # tells a hundred lines of each PDF
STYLE: "dict[RcKeyType, Any]" = {
    "font.family": DEFAULT,
    "font.size": 8.5,
    "axes.titlesize": 9,
    "figure.titlesize": 9,
    "figure.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a dollar sign in a caption is a dollar sign
    "svg.hashsalt": "onceover",
    "svg.fonttype": "none",  # text stays text, which can be searched and edited
    "pdf.fonttype": 42,  # fonts embedded as TrueType, as journals ask
}


def draw_all(drawings: Mapping[str, Callable[[], Figure] | str], out: str | Path) -> list[Path]:
    """Draws figures, by name, in the project's style, each as PNG, SVG and PDF; returns the files.

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
        with matplotlib.rc_context(STYLE), _without_noise(), outputs.writing(files[name]):
            written += _save(draw(), outputs, files[name])
    return written


def draw_svg(draw: Callable[[], Figure]) -> tuple[Figure, bytes]:
    """Draws a figure in the project's style; returns it and its SVG, whose texts a browser writes in its own fonts."""
    svg = io.BytesIO()
    with matplotlib.rc_context(STYLE), _without_noise():
        figure = draw()
        figure.savefig(svg, format="svg", bbox_inches="tight", metadata=_UNDATED[".svg"])
    return figure, svg.getvalue()


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Silences remarks on labels longer than a figure, on characters that a note of ours names, on tables of fonts."""
    level = _FONT_LOGGER.level
    _FONT_LOGGER.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "constrained_layout not applied")
            warnings.filterwarnings("ignore", MISSING_GLYPH)
            yield
    finally:
        _FONT_LOGGER.setLevel(level)


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
    outputs = _outputs_beside(path)
    with _without_noise(), outputs.writing([path.name]):
        return _save(figure, outputs, [path.name])[0]


def _outputs_beside(path: Path) -> Outputs:
    return Outputs(path.parent, "name another file for the figure")


def _save(figure: Figure, outputs: Outputs, names: Iterable[str]) -> list[Path]:
    """Writes a figure to files of several formats."""
    use_fonts(figure)
    written = []
    for name in names:
        with outputs.file(name) as aside:
            figure.savefig(aside, bbox_inches="tight", metadata=_UNDATED.get(Path(name).suffix.lower()))
        written.append(outputs.folder / name)
    return written


def plain_ticks(axes: Axes) -> None:
    """Writes 1, 10, 100 and 1,000 under a logarithmic axis, rather than powers."""
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")


def label_of(value: float | str) -> str:
    """The label of a setting's value; of a long text its beginning and end."""
    return shortened(value, MAX_NAME) if isinstance(value, str) else f"{value:g}"


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters, its middle left out where it is longer."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def wrapped_key(key: str, width: int = 18) -> str:
    """A setting's name over several lines, broken after its dot and after underscores, at most 80 characters of it."""
    key = shortened(key, 80)
    if len(key) <= width:
        return key
    lines = []
    for part in re.findall(r"[^.]+\.?", key):
        lines.append("")
        for word in re.findall(r"[^_]*_?", part):
            if len(lines[-1]) + len(word) > width:
                lines.append("")
            lines[-1] += word
    return "\n".join(line for line in lines if line)


def places_of(values: Sequence[float | str]) -> tuple[list[float], bool]:
    """Where the ascending values of a setting stand along an axis, and whether that is logarithmic.

    Numbers stand where they are, or where their logarithms are, if they span much; texts stand in equal steps.
    """
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        return [float(number) for number in range(len(values))], False
    if min(numbers) > 0 and max(numbers) > _WIDE * min(numbers):
        return [math.log(value) for value in numbers], True
    return numbers, False


def slant_long_labels(axes: Axes) -> None:
    """Slants the labels under an axis where one of them is long."""
    labels = axes.get_xticklabels()
    if max(len(label.get_text()) for label in labels) > _LONG_LABEL:
        for label in labels:
            label.set(rotation=30, ha="right", rotation_mode="anchor")


def hidden_points(hidden: int, count: int) -> str:
    """A note on points that others cover, as they are equal."""
    return f"{hidden:,} of {count:,} points hidden behind an equal one"


def spaced(positions: Sequence[float], most: int) -> list[int]:
    """Which of ascending positions have room for a label, where at most so many labels fit beside each other."""
    gap = (positions[-1] - positions[0]) / most
    kept = [0]
    for number in range(1, len(positions)):
        if positions[number] - positions[kept[-1]] >= gap * (1 - 1e-9):
            kept.append(number)
    return kept


def legend_below(figure: Figure, axes: Axes, columns: int, **options: Any) -> None:
    """Puts the legend of a figure's only panel, or of a panel's lines, below everything, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, **options)


def legend_under(axes: Axes, columns: int, **options: Any) -> None:
    """Puts the legend of one of several panels under it, where it covers nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns, columnspacing=1.2, **options)
