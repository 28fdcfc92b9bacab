"""Keeps the ranks of a store's baselines beside it, since they depend on the store alone and take a while.

The folder ``FILE.h5.baselines`` has a file for each measurement, named by a digest of all that it depends on. It can
be removed at any time.
"""

import json

import numpy as np

from onceover import __version__
from onceover.base.files import digest
from onceover.base.formats import BASELINES_VERSION
from onceover.base.kept_arrays import KeptArrays
from onceover.extract.store import FeatureStore
from onceover.retrieval.baseline_ranks import Baseline
from onceover.retrieval.metrics import RankPair
from onceover.retrieval.ranks import counts_of, ranks_from_counts
from onceover.retrieval.store_pairs import FittingRows, captions_of

_DIGEST_CHARS = 16  # of each digest in a file's name


class BaselineCache:
    """The kept ranks of the baselines of a store on some images.

    Args:
        images: rows of the measured images. rows: those that are fitted on, or None. seed: of the random maps.
    """

    def __init__(self, store: FeatureStore, images: np.ndarray, rows: FittingRows | None, seed: int):
        self._images = len(images)
        self._image_index = captions_of(store, images)[1]
        fitted = []
        if rows is not None:
            fitted = [part.tolist() for part in (rows.train, rows.validation, rows.fitted)]
        code_and_store = digest([store.fingerprints, BASELINES_VERSION, __version__])
        origin = digest([code_and_store, images.tolist(), fitted, seed])
        self._prefix = code_and_store[:_DIGEST_CHARS]
        folder = store.path.with_name(f"{store.path.name}.baselines")
        self._file = KeptArrays(folder, f"{self._prefix}-{origin[:_DIGEST_CHARS]}.npz", origin)

    def load(self) -> dict[str, Baseline] | None:
        """The baselines by name; None where they are not kept."""
        return self._file.read(self._baselines)

    def save(self, measured: dict[str, Baseline]) -> None:
        """Keeps baselines, and removes those of other features or of other versions of the program."""
        about = []
        arrays = {}
        for number, (name, baseline) in enumerate(measured.items()):
            about.append([name, baseline.hubs, baseline.settings, baseline.fitted_images])
            counts = [counts_of(pair) for pair in baseline.ranks]
            arrays[f"counts_{number}"] = np.array(counts, np.int32)  # (maps, above or level, directions, captions)
        arrays["about"] = np.array(json.dumps(about))
        self._file.write(arrays)
        self._file.remove_others(lambda name: not name.startswith(self._prefix))

    def _baselines(self, arrays: dict[str, np.ndarray]) -> dict[str, Baseline]:
        """Baselines made of arrays.

        Raises:
            Exception: of whatever kind, where the arrays are not those that were kept.
        """
        baselines = {}
        for number, (name, hubs, settings, fitted_images) in enumerate(json.loads(str(arrays["about"]))):
            pairs = [self._ranks(counts) for counts in arrays[f"counts_{number}"]]
            baselines[name] = Baseline(pairs, hubs, settings, fitted_images)
        return baselines

    def _ranks(self, counts: np.ndarray) -> RankPair:
        """Ranks made of counts, int32 (2, 2, M), once these are such as ``retrieval.metrics`` can count with."""
        captions = len(self._image_index)
        above, level = counts.astype(np.int64)
        galleries = np.array([[captions], [self._images]])
        if above.shape != (2, captions) or above.min() < 0 or level.min() < 1 or (above + level > galleries).any():
            raise ValueError("ranks that point outside the gallery")
        return ranks_from_counts(above, level, self._image_index, self._images)
