"""The images and captions of a store that an evaluation measures, and those that its baselines are fitted on."""

from typing import NamedTuple

import numpy as np

from onceover.base.progress import warn
from onceover.extract.store import FeatureStore, Roles, StoreError, row_blocks
from onceover.retrieval.baselines import Pairs
from onceover.retrieval.embeddings import EmbeddingsError

COPIES = 5  # of features, float64, that the fitted baselines hold at a time
_SQUARES = 6  # matrices of dimensions by dimensions, float64, that they hold beside
_OVERHEAD = 2**29  # bytes beside all these
MIN_TRAIN = 1000  # images that the fitted baselines are fitted on in however little memory


class FittingRows(NamedTuple):
    """Rows of the images that baselines are fitted on.

    Attributes:
        train, validation: those that each setting is fitted on, and those that choose among the settings.
        fitted: those that the chosen settings are then fitted on.
        available: how many ``fitted`` would have with memory for all.
    """

    train: np.ndarray
    validation: np.ndarray
    fitted: np.ndarray
    available: int


def roles_of(store: FeatureStore) -> Roles:
    """The store's roles; a dual encoder's store without train or validation images is reported on all the same."""
    try:
        return store.roles()
    except StoreError:
        if not is_dual_encoder(store):
            raise
        splits = np.array(store.image_splits)
        for split in ("test", "dev"):
            images = np.flatnonzero(splits == split)
            if len(images):
                nothing = np.empty(0, int)
                return Roles(nothing, nothing, images, "", split)
        raise


def is_dual_encoder(store: FeatureStore) -> bool:
    """Whether both kinds of features are projections of one model into its own shared space."""
    return _are_projections(store.recipes["image"], store.recipes["text"])


def has_own_space(store: FeatureStore) -> bool:
    """Whether images and captions may be compared by their features.

    They may if they are a dual encoder's, or if they are imported, of one width, and not known to be of encoders that
    share no space.
    """
    image = store.recipes["image"]
    text = store.recipes["text"]
    if _are_projections(image, text):
        return True
    if not image.get("architecture") == text.get("architecture") == "imported":
        return False
    if "encoder" in image or "encoder" in text:
        return _are_projections(image.get("encoder", {}), text.get("encoder", {}))
    return store.dims[0] == store.dims[1]


def _are_projections(image: dict, text: dict) -> bool:
    """Whether two encoders' recipes are of one model that projects both kinds into one space."""
    return image.get("weights") == text.get("weights") and image.get("pooling") == text.get("pooling") == "projection"


def images_of(store: FeatureStore, roles: Roles, split: str) -> np.ndarray:
    """Rows of a split's images.

    Raises:
        EmbeddingsError: there are none with captions.
    """
    rows_of = {"train": roles.train, roles.selection_name: roles.selection, roles.report_name: roles.report}
    images = rows_of.get(split, np.flatnonzero(np.array(store.image_splits) == split))
    if not np.isin(store.image_index, images).any():
        known = ", ".join(filter(None, rows_of))
        raise EmbeddingsError(f"there are no images with captions in the split {split!r}; use {known}")
    return images


def read_pairs(store: FeatureStore, images: np.ndarray) -> Pairs:
    """The plain features of images, float32 (N, D), each the mean over its views, and of their captions, (M, E)."""
    captions, index = captions_of(store, images)
    features = np.empty((len(images), store.image_features.shape[2]), np.float32)
    for rows in row_blocks(len(images)):
        features[rows] = store.image_features[images[rows]].mean(1, dtype=np.float32)
    return Pairs(features, store.text_features[captions].astype(np.float32, copy=False), index)


def captions_of(store: FeatureStore, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the captions of some images, int64 (M,), and the image of each, counted among these, int64 (M,)."""
    captions = np.flatnonzero(np.isin(store.image_index, images))
    return captions, np.searchsorted(images, store.image_index[captions])


def fitting_rows(store: FeatureStore, roles: Roles, measured: int, memory: int, refit: bool) -> FittingRows | None:
    """The images for the fitted baselines, a sample where memory is short; None where there is nothing to fit on.

    Args:
        measured: how many images the measured split has. memory: limit in bytes.
        refit: fit again on train and validation images once the settings are chosen, as a run with ``training.refit``.
    """
    if not len(roles.train):
        return None
    train = images_of(store, roles, "train")
    validation = images_of(store, roles, roles.selection_name)
    together = roles.together().train if refit else train
    most = most_images(store, max(measured, len(validation)), memory)
    if most < min(MIN_TRAIN, len(together)):
        warn(f"the memory limit is less than the fitted baselines need with {MIN_TRAIN:,} images, which they have")
        most = MIN_TRAIN
    return FittingRows(sample(train, most), validation, sample(together, most), len(together))


def sample(images: np.ndarray, most: int) -> np.ndarray:
    """At most so many of some images, drawn with a fixed seed, in ascending order."""
    if len(images) <= most:
        return images
    return np.sort(np.random.default_rng(0).permutation(images)[:most])


def most_images(store: FeatureStore, measured: int, memory: int) -> int:
    """How many images with their captions the fitted baselines can be fitted on in ``memory`` bytes.

    Beside them, a measured split of so many images has its captions in the wider of the two spaces.
    """
    image_dim, text_dim = store.dims
    squares = _SQUARES * (image_dim**2 + text_dim**2)
    captions = len(store.image_index)
    mapped = measured * max(image_dim, text_dim) * captions / len(store.image_splits)
    per_image = image_dim + text_dim * captions / len(store.image_splits)
    return int((((memory - _OVERHEAD) / 8 - squares) / COPIES - mapped) / per_image)
