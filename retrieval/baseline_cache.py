"""Keeps the ranks of a store's baselines beside it, since they depend on the store alone and take a while.

The folder ``FILE.h5.baselines`` has a file for each measurement, named by a digest of all that it depends on. It can
be removed at any time. A folder that cannot be written to, or a file that cannot be read, costs no more than time.
"""

import inspect
import json

import numpy as np

from onceover import __version__
from onceover.base.errors import OnceoverError, first_line
from onceover.base.files import digest
from onceover.base.npz import npz_bytes, read_npz
from onceover.base.outputs import Outputs
from onceover.base.progress import LOGGER, warn
from onceover.extract.store import FeatureStore
from onceover.retrieval import baseline_ranks, baselines, closed_form, exact, hubness, neighbours, ranks, store_pairs
from onceover.retrieval.baseline_ranks import Baseline
from onceover.retrieval.metrics import RankPair
from onceover.retrieval.ranks import counts_of, ranks_from_counts
from onceover.retrieval.store_pairs import FittingRows, captions_of

_CODE = (baseline_ranks, baselines, closed_form, exact, hubness, neighbours, ranks, store_pairs)
_NAME = 16  # characters of each digest in a file's name


class BaselineCache:
    """The stored ranks of the baselines of a store on some images.

    Args:
        images: rows of the measured images. rows: those that are fitted on, or None. seed: of the random maps.
    """

    def __init__(self, store: FeatureStore, images: np.ndarray, rows: FittingRows | None, seed: int):
        self._images = len(images)
        self._image_index = captions_of(store, images)[1]
        self._outputs = Outputs(
            store.path.with_name(f"{store.path.name}.baselines"), "remove that folder", keep_changed=False
        )
        fitted = [part.tolist() for part in rows[:3]] if rows else []
        code = [inspect.getsource(module) for module in _CODE]
        self._key = digest([store.fingerprints, images.tolist(), fitted, seed, __version__, code])
        self._store = digest(store.fingerprints)[:_NAME]
        self._file = f"{self._store}-{self._key[:_NAME]}.npz"

    def load(self) -> dict[str, Baseline] | None:
        """The baselines by name; None where they are not stored, or damaged."""
        path = self._outputs.folder / self._file
        if not path.exists():
            return None
        try:
            LOGGER.debug("reading the baselines %s", path)
            return self._baselines(read_npz(path))
        except Exception as error:  # the parsers of NumPy and zipfile raise errors of many kinds
            warn(f"{path} is damaged ({first_line(error)}); the baselines are measured again")
            return None

    def save(self, measured: dict[str, Baseline]) -> None:
        """Stores baselines, in the place of those of earlier features; does without where that cannot be."""
        about = []
        arrays = {}
        for number, (name, baseline) in enumerate(measured.items()):
            about.append([name, baseline.hubs, baseline.settings, baseline.fitted_images])
            counts = [counts_of(pair) for pair in baseline.ranks]
            arrays[f"counts_{number}"] = np.array(counts, np.int32)  # (maps, above or level, directions, captions)
        arrays["about"] = np.array(json.dumps([self._key, about]))
        try:
            with self._outputs.writing([self._file]):
                self._outputs.remove(lambda name: not name.startswith(self._store))
                self._outputs.write_bytes(self._file, bytes(npz_bytes(arrays)))
        except (OSError, OnceoverError) as error:
            warn(f"the baselines are not kept for the next evaluation: {first_line(error)}")

    def _baselines(self, arrays: dict[str, np.ndarray]) -> dict[str, Baseline]:
        """Baselines made of arrays.

        Raises:
            Exception: of whatever kind, where the arrays are not those that were stored.
        """
        key, about = json.loads(str(arrays["about"]))
        if key != self._key:
            raise ValueError("of another measurement")
        measured = {}
        for number, (name, hubs, settings, fitted_images) in enumerate(about):
            pairs = [self._ranks(counts) for counts in arrays[f"counts_{number}"]]
            measured[name] = Baseline(pairs, hubs, settings, fitted_images)
        return measured

    def _ranks(self, counts: np.ndarray) -> RankPair:
        """Ranks made of counts, int32 (2, 2, M), that are such as can be."""
        captions = len(self._image_index)
        above, level = counts.astype(np.int64)
        galleries = np.array([[captions], [self._images]])
        if above.shape != (2, captions) or above.min() < 0 or level.min() < 1 or (above + level > galleries).any():
            raise ValueError("ranks that point outside the gallery")
        return ranks_from_counts(above, level, self._image_index, self._images)
