"""The features of a store: PCA of images and captions, coloured by split, and the variance that components hold."""

import textwrap
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.drawing import CAPTION_COLOUR, IMAGE_COLOUR, WIDTH, hidden_points, legend_under, plain_ticks
from onceover.analysis.sources import PlotError, StoreFiles
from onceover.base.hdf5 import RowsOnDisk
from onceover.extract.store import KINDS, FeatureStore, row_blocks

SOURCE = "store"
ORDER = 10
SPLIT_COLOURS = {"train": "#0072B2", "dev": "#E69F00", "test": "#009E73", "": "#999999"}
SPLIT_MARKERS = {"train": "o", "dev": "^", "test": "s", "": "D"}
MAX_COMPONENTS = 256
_NAMES = {"image": "image features", "text": "caption features"}
_COLOURS = {"image": IMAGE_COLOUR, "text": CAPTION_COLOUR}
_MIN_ROWS = 1000  # that are drawn in however little memory
_MEMORY_SHARE = 8  # features take at most one part in so many of the memory
_FLOAT_BYTES = 4
_LAYERS = 20  # in which the points of all splits are drawn, so that none hides another
_NOTE = 30  # characters of a line above a panel
_DIGITS = 6  # points that agree in them are at one place


class _Projection(NamedTuple):
    """Rows of features in two dimensions, float (R, 2), their splits, all components' shares of variance, and notes."""

    points: np.ndarray
    splits: np.ndarray
    variances: np.ndarray
    notes: list[str]


def drawings(source: StoreFiles) -> dict[str, Callable[[], Figure]]:
    """Both kinds of features in one figure."""
    return {"features": partial(draw_features, source.store, source.memory)}


def draw_features(store: FeatureStore, memory: int) -> Figure:
    """Draws the features of a store; a kind that the store has not is left out.

    Args:
        memory: limit in bytes; of features that would take more than an eighth of it a sample of rows is drawn.

    Raises:
        PlotError: no kind has two rows.
    """
    splits = np.array([*store.image_splits, ""])  # the last one: of a caption without an image
    splits_of = {"image": splits[:-1], "text": splits[store.image_index]}
    kinds = [kind for kind in KINDS if store.recipes[kind] and len(splits_of[kind]) > 1]
    if not kinds:
        raise PlotError(f"{store.path} has no two images or captions with features; there is nothing to draw")
    figure = Figure(figsize=(WIDTH * (len(kinds) + 1) / 3, 3.6), layout="constrained")
    *scatters, curve = figure.subplots(1, len(kinds) + 1)
    titles = []
    for axes, kind, style in zip(scatters, kinds, ("-", "--"), strict=False):
        projection = _project(store.features(kind), splits_of[kind], memory)
        _draw_points(axes, projection)
        first, second = 100 * np.pad(projection.variances, (0, 1))[:2]
        axes.set(xlabel=f"component 1 ({first:.0f} %)", ylabel=f"component 2 ({second:.0f} %)")
        titles.append([f"PCA of {_NAMES[kind]}", *projection.notes])
        components = np.arange(1, len(projection.variances) + 1)
        curve.plot(components, 100 * np.cumsum(projection.variances), style, color=_COLOURS[kind], label=_NAMES[kind])
    curve.set(xscale="log", xlabel="components", ylabel="explained variance in %", ylim=(0, 101))
    titles.append(["Cumulative explained variance"])
    if components[-1] == MAX_COMPONENTS:
        titles[-1].append(f"of the first {MAX_COMPONENTS} components")
    most = max(map(len, titles))
    for axes, title in zip(figure.axes, titles, strict=True):
        axes.set_title("\n".join(title) + "\n" * (most - len(title)))  # titles begin at one height
    plain_ticks(curve)
    legend_under(curve, 1)
    return figure


def _project(stored: RowsOnDisk, splits: np.ndarray, memory: int) -> _Projection:
    """Fits a PCA to features, or to a seeded sample of rows where they are too many for the memory."""
    from sklearn.decomposition import PCA

    most = max(_MIN_ROWS, memory // (_MEMORY_SHARE * _FLOAT_BYTES * stored.shape[-1]))
    rows = np.sort(np.random.default_rng(0).permutation(len(stored))[:most])
    features = _plain_features(stored, rows)
    shown = f"{len(stored):,}"
    if len(rows) < len(stored):
        shown = f"{len(rows):,} of {len(stored):,}"
    components = min(MAX_COMPONENTS, *features.shape)
    notes = [f"{shown} rows, {features.shape[1]:,} dimensions"]
    if not np.ptp(features, axis=0).any():
        return _Projection(np.zeros((len(rows), 2)), splits[rows], np.zeros(components), [*notes, "all rows are equal"])
    model = PCA(components, svd_solver="randomized", random_state=0).fit(features)
    points = np.pad(model.transform(features), ((0, 0), (0, 1)))[:, :2]  # one component: a line
    places = len(np.unique(np.round(points / np.abs(points).max(), _DIGITS), axis=0))
    if places < len(rows):
        notes += textwrap.wrap(hidden_points(len(rows) - places, len(rows)), _NOTE)
    return _Projection(points, splits[rows], model.explained_variance_ratio_, notes)


def _draw_points(axes: Axes, projection: _Projection) -> None:
    """Draws the rows of each split in a colour of its own, in layers of all splits, so that none hides another."""
    order = np.random.default_rng(0).permutation(len(projection.points))
    for number, layer in enumerate(np.array_split(order, _LAYERS)):
        for split, colour in SPLIT_COLOURS.items():
            count = np.count_nonzero(projection.splits == split)
            points = projection.points[layer[projection.splits[layer] == split]]
            if not count or (number and not len(points)):
                continue
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=3,
                marker=SPLIT_MARKERS[split],
                linewidths=0,
                alpha=0.5,
                c=colour,
                label=None if number else f"{split or 'no split'} ({count:,})",
                rasterized=True,
            )
    legend_under(axes, 1, markerscale=3)


def _plain_features(stored: RowsOnDisk, rows: np.ndarray) -> np.ndarray:
    """The features of some rows, of images those of the plain view: float32 (R, D)."""
    features = np.empty((len(rows), stored.shape[-1]), np.float32)
    for block in row_blocks(len(rows)):
        values = stored[rows[block]]
        if values.ndim == 3:
            values = values[:, 0]
        features[block] = values
    return features
