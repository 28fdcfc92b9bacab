"""Figures by name: each is one file here, or a module of another package (``onceover.figures``).

A figure is drawn from stored files alone, as PNG, SVG and PDF; no model is loaded. It is a module, or an object, with
what ``FigureModule`` lists.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

from onceover.analysis.drawing import draw_all
from onceover.analysis.sources import PlotError, RunFiles, StoreFiles, SweepTable, read_run, read_sweep
from onceover.base.memory import default_memory
from onceover.base.registry import Registry
from onceover.extract.store import FeatureStore

FIGURES = Registry("onceover.analysis.figures", "onceover.figures", "figure")
SOURCES = ("run", "store", "sweep")

Source = RunFiles | StoreFiles | SweepTable
Drawings = dict[str, Callable[[], Figure] | str]


class FigureModule(Protocol):
    """A figure, or a few that belong together, drawn from the files of a run, a store or a sweep.

    Attributes:
        SOURCE: the files that it is drawn from: ``run``, ``store`` or ``sweep``.
        ORDER: the figures of a source are drawn in ascending order; those here have 10 to 50.
    """

    SOURCE: str
    ORDER: int

    def drawings(self, source: Source) -> Drawings:
        """Functions that draw a figure each, by the name of its files, or instead the reason why one is not drawn.

        Args:
            source: ``RunFiles``, ``StoreFiles`` or a ``SweepTable``, as ``SOURCE`` says.
        """


def drawings_of(kind: str, source: Source) -> Drawings:
    """Functions that draw all registered figures of a source, by name, in the order in which they are drawn.

    Args:
        kind: ``run``, ``store`` or ``sweep``.

    Raises:
        PlotError: two figures of the same name, or files that are damaged.
        RegistryError: a figure of another package that cannot be imported.
    """
    modules: list[tuple[int, str, FigureModule]] = []
    for name in FIGURES.names():
        module: FigureModule = FIGURES.load(name)
        if kind == module.SOURCE:
            modules.append((module.ORDER, name, module))
    drawings: Drawings = {}
    for _, name, module in sorted(modules, key=lambda entry: entry[:2]):
        own = module.drawings(source)
        twice = sorted(set(own) & set(drawings))
        if twice:
            raise PlotError(f"the figure {name!r} draws {twice[0]!r}, which another figure draws; rename it")
        drawings |= own
    return drawings


def plot_run(folder: str | Path, out: str | Path, split: str | None = None, seed: int = 0) -> list[Path]:
    """Draws a run: its joint embedding, similarity matrices, training curves, ranks, and once evaluated its recalls.

    Args:
        split: the split whose images are drawn; the reported split by default.

    Returns:
        The files written.

    Raises:
        EmbeddingsError, PlotError: files that are missing or damaged.
    """
    return draw_all(drawings_of("run", read_run(folder, split, seed)), out)


def plot_store(store: FeatureStore, out: str | Path, memory: int | None = None) -> list[Path]:
    """Draws a store: PCA of both kinds of features by split, and the variance that components hold.

    Args:
        memory: limit in bytes, by default half of the machine's memory; a sample of the rows is drawn if need be.
    """
    return draw_all(drawings_of("store", StoreFiles(store, memory or default_memory())), out)


def plot_sweep(folder: str | Path, out: str | Path) -> list[Path]:
    """Draws a sweep's ``results.csv``: heat maps, curves through the best setting, parallel coordinates.

    Raises:
        PlotError: the table is missing or damaged.
    """
    return draw_all(drawings_of("sweep", read_sweep(folder)), out)
