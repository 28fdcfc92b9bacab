"""The points of the interactive map (``pages/map.js``): images and captions of a run in two dimensions."""

from dataclasses import dataclass

import numpy as np

from onceover.analysis.coordinates import map_coordinates, pca, tsne
from onceover.analysis.sources import PairSample, RunFiles

MAX_IMAGES = 1000  # each with one caption
_OTHER_SPLITS = 0.2  # share of them that other splits get, to be compared with


@dataclass(frozen=True)
class MapPoints:
    """A seeded sample of images with one caption each, and their coordinates.

    Attributes:
        pairs: rows of the embeddings, ``images`` (n,) and ``captions`` (n,).
        coordinates: by projection, ``tsne`` and ``pca``: float32 (2 n, 2), the images and then their captions.
    """

    pairs: PairSample
    coordinates: dict[str, np.ndarray]


def map_points(run: RunFiles, most: int = MAX_IMAGES) -> MapPoints:
    """The points of a map of a run's split, a fifth of them from other splits where the run has some.

    The coordinates by t-SNE, which take a while, are kept in the run's folder.

    Raises:
        PlotError: the split has too few images with captions.
    """
    own = run.sample_pairs(most)
    wanted = min(most, len(own.images) / (1 - _OTHER_SPLITS))
    others = sample_others(run, round(_OTHER_SPLITS * wanted))
    room = most - len(others.images)
    if len(own.images) > room:
        own = run.sample_pairs(room)
    images = np.concatenate([own.images, others.images])
    captions = np.concatenate([own.captions, others.captions])
    pairs = PairSample(images, captions, own.total + others.total)
    vectors = np.concatenate([run.embeddings.images[images], run.embeddings.texts[captions]])
    coordinates = {
        "tsne": map_coordinates(run, pairs, lambda: tsne(vectors, run.seed)),
        "pca": pca(vectors)[0].astype(np.float32),
    }
    return MapPoints(pairs, coordinates)


def sample_others(run: RunFiles, most: int) -> PairSample:
    """A seeded sample of images with captions of all named splits but the run's, each with one caption."""
    embeddings = run.embeddings
    splits = np.array(embeddings.splits)
    images, first = np.unique(embeddings.image_index, return_index=True)
    is_other = (splits[images] != run.split) & (splits[images] != "")
    candidates = np.flatnonzero(is_other)
    chosen = np.sort(np.random.default_rng(run.seed).permutation(candidates)[:most])
    return PairSample(images[chosen], first[chosen], len(candidates))
