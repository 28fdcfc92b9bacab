"""The features of a store: PCA of images and captions, coloured by split, and the variance that components hold."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.drawing import CAPTION_COLOUR, IMAGE_COLOUR, legend_under, plain_ticks
from onceover.analysis.sources import PlotError, StoreFiles
from onceover.base.hdf5 import StoredRows
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
_DIGITS = 6  # points that agree in them are at one place


class _Projection(NamedTuple):
    """Rows of features in two dimensions, float (R, 2), with their splits, and the variance of all components."""

    points: np.ndarray
    splits: np.ndarray
    variances: np.ndarray
    title: str


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
    figure = Figure(figsize=(12.5 * (len(kinds) + 1) / 3, 4.2), layout="constrained")
    *scatters, curve = figure.subplots(1, len(kinds) + 1)
    for axes, kind, style in zip(scatters, kinds, ("-", "--"), strict=False):
        projection = _project(store.features(kind), splits_of[kind], memory)
        _draw_points(axes, projection)
        axes.set(xlabel="component 1", ylabel="component 2", title=f"PCA of {_NAMES[kind]}\n{projection.title}")
        components = np.arange(1, len(projection.variances) + 1)
        curve.plot(components, 100 * np.cumsum(projection.variances), style, color=_COLOURS[kind], label=_NAMES[kind])
    curve.set(
        xscale="log",
        xlabel="components",
        ylabel="variance held, in %",
        ylim=(0, 101),
        title="How many dimensions the features use",
    )
    plain_ticks(curve)
    legend_under(curve, 2, fontsize=9)
    return figure


def _project(stored: StoredRows, splits: np.ndarray, memory: int) -> _Projection:
    """Fits a PCA to features, or to a seeded sample of rows where they are too many for the memory."""
    from sklearn.decomposition import PCA

    most = max(_MIN_ROWS, memory // (_MEMORY_SHARE * _FLOAT_BYTES * stored.shape[-1]))
    rows = np.sort(np.random.default_rng(0).permutation(len(stored))[:most])
    features = _plain_features(stored, rows)
    shown = f"{len(stored):,} rows"
    if len(rows) < len(stored):
        shown = f"{len(rows):,} of {len(stored):,} rows"
    components = min(MAX_COMPONENTS, *features.shape)
    title = f"{shown} of {features.shape[1]:,} numbers"
    if not np.ptp(features, axis=0).any():
        return _Projection(np.zeros((len(rows), 2)), splits[rows], np.zeros(components), f"{title}\nall rows are equal")
    model = PCA(components, svd_solver="randomized", random_state=0).fit(features)
    points = np.pad(model.transform(features), ((0, 0), (0, 1)))[:, :2]  # one component: a line
    places = len(np.unique(np.round(points / np.abs(points).max(), _DIGITS), axis=0))
    if places < len(rows):
        title += f"\nat {places:,} places: equal rows share one"
    return _Projection(points, splits[rows], model.explained_variance_ratio_, title)


def _draw_points(axes: Axes, projection: _Projection) -> None:
    """Draws the rows of each split in a colour of its own."""
    for split, colour in SPLIT_COLOURS.items():
        is_in_split = projection.splits == split
        if not is_in_split.any():
            continue
        points = projection.points[is_in_split]
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=5,
            marker=SPLIT_MARKERS[split],
            linewidths=0,
            alpha=0.5,
            c=colour,
            label=f"{split or 'no split'} ({is_in_split.sum():,})",
            rasterized=True,
        )
    legend_under(axes, 2, markerscale=3, fontsize=9)


def _plain_features(stored: StoredRows, rows: np.ndarray) -> np.ndarray:
    """The features of some rows, of images those of the plain view: float32 (R, D)."""
    features = np.empty((len(rows), stored.shape[-1]), np.float32)
    for block in row_blocks(len(rows)):
        values = stored[rows[block]]
        if values.ndim == 3:
            values = values[:, 0]
        features[block] = values
    return features
