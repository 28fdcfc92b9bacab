"""The coordinates of a run's t-SNE map, which take seconds to compute: kept in the run's folder and used again."""

from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from onceover.analysis.sources import PairSample, RunFiles
from onceover.base.errors import OnceoverError, first_line
from onceover.base.files import digest
from onceover.base.formats import MAP
from onceover.base.npz import npz_bytes, read_npz
from onceover.base.outputs import Outputs
from onceover.base.progress import LOGGER, warn


def kept_points(run: RunFiles, pairs: PairSample, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The two coordinates of the images and then of the captions of pairs, (2 * pairs, 2): as kept, or computed.

    Coordinates of other vectors are replaced, and a file that was changed since is set aside. A folder that cannot be
    written to costs no more than time.
    """
    embeddings = run.embeddings
    rows = [pairs.images.tolist(), pairs.captions.tolist()]
    origin = digest([embeddings.space, embeddings.fingerprints, rows, run.seed, version("scikit-learn")])
    name = MAP.format(run.split)
    points = _read(run, name, origin, len(pairs.images))
    if points is not None:
        return points
    points = compute()
    outputs = Outputs(run.folder, "move it elsewhere")
    try:
        with outputs.locked():
            outputs.check_origin(name)
            outputs.set_aside(name)
            outputs.write_bytes(name, bytes(npz_bytes({"origin": np.array(origin), "points": points})))
    except (OSError, OnceoverError) as error:
        warn(f"the map's coordinates are not kept for the next figures: {first_line(error)}")
    return points


def _read(run: RunFiles, name: str, origin: str, pairs: int) -> np.ndarray | None:
    """The coordinates in a file; None where it is not there, damaged, or of other vectors."""
    file = run.folder / name
    if not file.is_file():
        return None
    try:
        LOGGER.debug("reading the map's coordinates %s", file)
        arrays = read_npz(file)
        points = arrays["points"]
        is_sound = points.shape == (2 * pairs, 2) and points.dtype == np.float32 and np.isfinite(points).all()
        return points if is_sound and str(arrays["origin"]) == origin else None
    except Exception as error:  # the parsers of NumPy and zipfile raise errors of many kinds
        warn(f"{file} is damaged ({first_line(error)}); the map is computed again")
        return None
