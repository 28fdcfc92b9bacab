"""The coordinates of a run's t-SNE map, which take seconds to compute: kept in the run's folder and used again."""

from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from onceover.analysis.sources import PairSample, RunFiles
from onceover.base.files import digest
from onceover.base.formats import MAP, MAP_VERSION
from onceover.base.kept_arrays import KeptArrays


def map_coordinates(run: RunFiles, pairs: PairSample, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The coordinates of the images and then of the captions of pairs, float32 (2 * pairs, 2): kept, or computed."""
    embeddings = run.embeddings
    rows = [pairs.images.tolist(), pairs.captions.tolist()]
    versions = [MAP_VERSION, version("scikit-learn")]
    origin = digest([embeddings.space, embeddings.fingerprints, rows, run.seed, versions])
    file = KeptArrays(run.folder, MAP.format(run.split), origin)

    def build(arrays: dict[str, np.ndarray]) -> np.ndarray:
        points = arrays["points"]
        if points.shape != (2 * len(pairs.images), 2) or points.dtype != np.float32 or not np.isfinite(points).all():
            raise ValueError("no coordinates of these pairs")
        return points

    points = file.read(build)
    if points is None:
        points = compute()
        file.write({"points": points})
    return points
