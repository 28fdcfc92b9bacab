"""Keeps the ranks of a store's baselines beside it, since they depend on the store alone and take a while.

The folder ``FILE.h5.baselines`` has a file for each measurement, named by a digest of all that it depends on. It can
be removed at any time.
"""

import json
import re

import numpy as np

from onceover import __version__
from onceover.base.files import digest
from onceover.base.formats import BASELINES_VERSION
from onceover.base.kept_arrays import KeptArrays
from onceover.base.progress import warn
from onceover.extract.store import FeatureStore
from onceover.retrieval.baseline_ranks import FITTED, UNLEARNED, Baseline, baseline_names
from onceover.retrieval.baselines import MAPS
from onceover.retrieval.metrics import RankPair
from onceover.retrieval.ranks import counts_of, ranks_from_counts
from onceover.retrieval.store_pairs import FittingRows, captions_of

_DIGEST_CHARS = 16  # of each digest in a file's name
_FILE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.npz")
_LARGEST = 1e9  # settings and hubs are smaller; NaN is not


def _is_plain(values: object) -> bool:
    """Whether something is a dict of texts to texts or finite numbers, as hubs and settings are."""
    if not isinstance(values, dict):
        return False
    numbers = [value for value in values.values() if not isinstance(value, str)]
    return all(type(number) in (int, float) and abs(number) < _LARGEST for number in numbers)


class BaselineCache:
    """The kept ranks of the baselines of a store on some images.

    Args:
        images: rows of the measured images. rows: those that are fitted on, or None. seed: of the random maps.
    """

    def __init__(self, store: FeatureStore, images: np.ndarray, rows: FittingRows | None, seed: int):
        self._images = len(images)
        self._image_index = captions_of(store, images)[1]
        self._fitted_images = dict.fromkeys(baseline_names(store, rows))
        fitted = []
        if rows is not None:
            fitted = [part.tolist() for part in (rows.train, rows.validation, rows.fitted)]
            self._fitted_images |= dict.fromkeys(FITTED, len(rows.fitted))
        code_and_store = digest([store.fingerprints, BASELINES_VERSION, __version__])
        origin = digest([code_and_store, images.tolist(), fitted, seed])
        self._prefix = code_and_store[:_DIGEST_CHARS]
        self._folder = store.local.with_name(f"{store.local.name}.baselines")
        self._file = KeptArrays(self._folder, f"{self._prefix}-{origin[:_DIGEST_CHARS]}.npz", origin)

    def load(self) -> dict[str, Baseline] | None:
        """The baselines by name; None where they are not kept."""
        if self._folder.is_symlink():
            return None
        return self._file.read(self._baselines)

    def save(self, measured: dict[str, Baseline]) -> None:
        """Keeps baselines, and removes those of other features or of other versions of the program."""
        if self._folder.is_symlink():
            warn(f"{self._folder} is a link, and the baselines are not kept for the next time")
            return
        about = []
        arrays = {}
        for number, (name, baseline) in enumerate(measured.items()):
            about.append([name, baseline.hubs, baseline.settings, baseline.fitted_images])
            counts = [counts_of(pair) for pair in baseline.ranks]
            arrays[f"counts_{number}"] = np.array(counts, np.int32)  # (maps, above or level, directions, captions)
        arrays["about"] = np.array(json.dumps(about))
        self._file.write(arrays)
        self._file.remove_others(self._is_stale)

    def _is_stale(self, name: str) -> bool:
        """Whether a file's name is one of this cache's, for other features or another version."""
        return _FILE.fullmatch(name) is not None and not name.startswith(self._prefix)

    def _baselines(self, arrays: dict[str, np.ndarray]) -> dict[str, Baseline]:
        """Baselines made of arrays.

        Raises:
            Exception: of whatever kind, where the arrays are not those that were kept.
        """
        baselines = {}
        about = json.loads(str(arrays["about"]))
        for number, (name, hubs, settings, fitted_images) in enumerate(about):
            if fitted_images != self._fitted_images[name] or not _is_plain(hubs) or not _is_plain(settings):
                raise ValueError(f"no measurement of {name}")
            counts = arrays[f"counts_{number}"]
            if counts.dtype != np.int32 or len(counts) != (MAPS if name in UNLEARNED else 1):
                raise ValueError(f"no ranks of {name}")
            baselines[name] = Baseline([self._ranks(own) for own in counts], hubs, settings, fitted_images)
        names = [name for name in self._fitted_images if name in baselines]
        if list(baselines) != names or len(about) != len(names) or not set(UNLEARNED) <= set(names):
            raise ValueError("other baselines than there are")
        return baselines

    def _ranks(self, counts: np.ndarray) -> RankPair:
        """Ranks made of counts, int32 (2, 2, M), once these are such as ``retrieval.metrics`` can count with."""
        captions = len(self._image_index)
        above, level = counts.astype(np.int64)
        galleries = np.array([[captions], [self._images]])
        if above.shape != (2, captions) or above.min() < 0 or level.min() < 1 or (above + level > galleries).any():
            raise ValueError("ranks that point outside the gallery")
        return ranks_from_counts(above, level, self._image_index, self._images)
