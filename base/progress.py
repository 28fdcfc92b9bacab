"""Progress of long work, and messages about it.

Messages go to the logger ``onceover``, which a Python caller can redirect or silence: notes with INFO, details with
DEBUG, warnings with WARNING. The command line shows them on stderr; in Python warnings alone are shown unless logging
is set up: ``logging.basicConfig(level=logging.INFO)``. A level of the logger above INFO silences bars, too.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

LOGGER = logging.getLogger("onceover")
Item = TypeVar("Item")
LINE_SECONDS = 30.0  # between two lines about work in progress, where there is no terminal


def say(message: str) -> None:
    """Tells the user what is going on."""
    LOGGER.info("%s", message)


def warn(message: str) -> None:
    """Tells the user what looks wrong, though the work goes on."""
    LOGGER.warning("%s", message)


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Logs at the level DEBUG how long a stage took."""
    start = time.monotonic()
    yield
    LOGGER.debug("%s took %.1f s", name, time.monotonic() - start)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Within, this process shows no messages and no bars, since another one that does the same work shows them."""
    before = LOGGER.level
    LOGGER.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        LOGGER.setLevel(before)


class ProgressBar:
    """Shows how far some work is: a bar on a terminal or in a notebook, elsewhere a note every ``LINE_SECONDS``.

    Use it as a context manager around the work; work that ends sooner than ``LINE_SECONDS`` leaves no note.

    Args:
        description: a word for the work.
        unit: what is counted: ``rows``; ``B`` for bytes.
        total: how many there are in all; None where nobody knows.
        initial: how many of them were done earlier.

    Example:
        >>> from onceover.base.progress import ProgressBar
        >>> with ProgressBar("image", "rows", total=3) as bar:
        ...     for _ in range(3):
        ...         bar.update()
    """

    def __init__(self, description: str, unit: str, *, total: int | None = None, initial: int = 0):
        self._description = description
        self._unit = unit
        self._total = total
        self._initial = initial
        self._count = initial
        self._values = ""
        self._bar: Any = None  # of tqdm, which is imported when something is drawn
        self._start = time.monotonic()
        self._told = self._start

    def __enter__(self) -> "ProgressBar":
        self._start = time.monotonic()
        self._told = self._start
        if _is_drawn():
            options = {"unit_scale": True, "unit": "B"} if self._unit == "B" else {"unit": f" {self._unit}"}
            self._bar = _tqdm()(desc=self._description, total=self._total, initial=self._count, **options)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """Counts what was done since the last call."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            say(self._line(self._told - self._start))

    def add_total(self, count: int) -> None:
        """Adds to what there is to do."""
        self._total = (self._total or 0) + count
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.refresh()

    def show(self, **values: object) -> None:
        """Shows values beside the count, as they are now, in place of those before."""
        self._values = ", ".join(f"{name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._values, refresh=False)

    def _line(self, seconds: float) -> str:
        """How far the work is after so many seconds: ``image: 1,234 of 5,000 rows, 56.1 rows/s, 1:07 left``."""
        rate = (self._count - self._initial) / seconds
        line = f"{self._description}: {self._amount(self._count)}"
        if self._total is not None:
            line += f" of {self._amount(self._total)}"
        line += self._counted() + f", {self._rate(rate)}"
        if self._total is not None and rate > 0:
            line += f", {_clock(max(0, self._total - self._count) / rate)} left"
        return line + (f" ({self._values})" if self._values else "")

    def _amount(self, count: int) -> str:
        return f"{count / 1e6:,.1f} MB" if self._unit == "B" else f"{count:,}"

    def _counted(self) -> str:
        return "" if self._unit == "B" else f" {self._unit}"

    def _rate(self, rate: float) -> str:
        return f"{rate / 1e6:,.1f} MB/s" if self._unit == "B" else f"{rate:,.1f} {self._unit}/s"


def tracked(items: Sequence[Item], description: str, unit: str) -> Iterator[Item]:
    """Yields items in their order, and shows under a ``ProgressBar`` how many of them the caller has done."""
    with ProgressBar(description, unit, total=len(items)) as bar:
        for item in items:
            yield item
            bar.update()


def _clock(seconds: float) -> str:
    """A time as people write it: ``1:07``, ``2:00:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_drawn() -> bool:
    """Whether there is a terminal or a notebook to draw a bar on, and the logger's own level lets notes pass.

    A logger that nobody set up has the level 0.
    """
    if LOGGER.level > logging.INFO or LOGGER.disabled:
        return False
    return _is_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def _is_notebook() -> bool:
    """Whether this process serves a notebook, which it does not by merely importing what serves them."""
    application = sys.modules.get("ipykernel.kernelapp")
    return application is not None and application.IPKernelApp.initialized()


def _tqdm() -> Any:
    """tqdm's bar for the place where this runs: a widget in a notebook that has them, else one of text."""
    if _is_notebook():
        import warnings

        from tqdm import TqdmWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets, bars are text
            from tqdm.auto import tqdm as notebook_bar

        return notebook_bar
    from tqdm import tqdm

    return tqdm


if _is_notebook():
    _tqdm()  # before another library imports it, which would warn where there are no widgets
