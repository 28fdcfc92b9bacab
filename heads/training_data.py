"""The train and validation features of a fit: standardised, in memory or in chunks, and the validation of trials."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from onceover.base.errors import OnceoverError
from onceover.base.memory import keep_freed_memory
from onceover.configs.schema import Config
from onceover.extract.store import FeatureStore, Roles
from onceover.heads.chunks import Chunks, blocks, chunks_needed, standardised
from onceover.heads.embed import check_units, embed
from onceover.heads.models import Standardize, unit
from onceover.heads.rows import captions_of
from onceover.heads.seeds import seed_for
from onceover.heads.trials import Trial
from onceover.retrieval.metrics import quality

#: image vectors (N, D), text vectors (M, D), image_index (M,) -> a report with "rsum" and both directions' recalls
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], dict]


class FeatureError(OnceoverError):
    """Features that heads cannot be fitted on."""


class PairedFeatures(NamedTuple):
    """Standardised features of some images and of their captions.

    Attributes:
        images: float32 (N, V, D), or (N, D) averaged over views.
        texts: float32 (M, E).
        image_index: int64 (M,), the position in ``images`` of each caption's image.
    """

    images: Tensor
    texts: Tensor
    image_index: np.ndarray

    def numpy(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same as arrays."""
        return self.images.numpy(), self.texts.numpy(), self.image_index


class TrainingData:
    """The features that fits on a store pass over.

    Args:
        roles: which images train, and which validate.
        device: of the features and the heads.
        memory: bytes that the features may take.

    Attributes:
        standardize: the layers, by ``image`` and ``text``, fitted on the train images.
        dims: dimensions of the features of a view and of a caption.
        captions: rows of the train images' captions.
        chunk_count: into how many chunks the features are dealt.

    Raises:
        FeatureError: features that are not finite. ChunkError: too little memory.
    """

    def __init__(self, store: FeatureStore, roles: Roles, device: torch.device, memory: int):
        self._store = store
        self._roles = roles
        self._device = device
        self._dealt: _DealtChunks | None = None
        self.captions = captions_of(store.image_index, roles.train)
        self.chunk_count = chunks_needed(store, roles.train, roles.selection, memory)
        keep_freed_memory()
        self.dims = store.dims
        self.standardize = {"image": Standardize(self.dims[0]), "text": Standardize(self.dims[1])}
        self.standardize["image"].fit(lambda: blocks(store.image_features, roles.train))
        self.standardize["text"].fit(lambda: blocks(store.text_features, self.captions))
        for kind, layer in self.standardize.items():
            if not bool(torch.isfinite(layer.mean).all()):
                raise FeatureError(
                    f"the {kind} features of {store.path} hold numbers that are not finite; onceover verify "
                    f"{store.path} tells which, and extract makes them anew"
                )

    def new_trial(self, config: Config, member: int = 0) -> Trial:
        """A trial at its start. ``member``: its number in an ensemble."""
        states = {kind: layer.state_dict() for kind, layer in self.standardize.items()}
        return Trial(config, self.dims, states, member).to(self._device)

    def chunks_of(self, config: Config) -> tuple[Chunks, np.ndarray]:
        """The chunks that a fit passes over, and each caption's image, int64 (M,); those of the last call are kept."""
        shuffle_seed = config.training.seed if config.training.shuffle_pairs else None
        if self._dealt is None or self._dealt.shuffle_seed != shuffle_seed:
            self.release()
            image_index = self._store.image_index
            if shuffle_seed is not None:
                image_index = shuffle_pairs(image_index, self._roles.train, seed_for(shuffle_seed, "shuffle"))
            captioned = np.intersect1d(self._roles.train, image_index)
            chunks = Chunks(self._store, captioned, image_index, self.standardize, self.chunk_count, self._device)
            self._dealt = _DealtChunks(chunks, image_index, shuffle_seed)
        return self._dealt.chunks, self._dealt.image_index

    def release(self) -> None:
        """Frees the memory of the chunks of the last ``chunks_of``."""
        self._dealt = None

    def validate(self, trial: Trial, measure: Measure = quality) -> dict:
        """Measures a trial on the validation images, and records the result in it.

        Args:
            measure: how; by its rsum the best epoch is chosen.

        Raises:
            EmbedError: an embedding that is not finite or has no direction.
        """
        trial.heads.eval()
        if self.chunk_count > 1:
            measured = measure(*embed(trial.heads, self._store, self._roles.selection))
        else:
            validation = self._validation
            with torch.inference_mode():
                image_vectors, text_vectors, _ = trial.heads(validation.images, validation.texts)
                image_units = unit(unit(image_vectors).mean(1))
                text_units = unit(text_vectors)
            images = check_units("image", image_units.cpu().numpy())
            texts = check_units("caption", text_units.cpu().numpy())
            measured = measure(images, texts, validation.image_index)
        trial.record(measured)
        return measured

    @cached_property
    def _validation(self) -> PairedFeatures:
        """The validation images' features, on the device."""
        features = self.standardised(self._roles.selection)
        return features._replace(images=features.images.to(self._device), texts=features.texts.to(self._device))

    def standardised(self, images: np.ndarray) -> PairedFeatures:
        """The features of some images, rows of the store, with all their views, on the CPU."""
        image_features = standardised(self.standardize["image"], self._store.image_features, images)
        return self._with_captions(images, image_features, self._store.image_index)

    def averaged(self, images: np.ndarray, image_index: np.ndarray) -> PairedFeatures:
        """As ``standardised``, with the mean over the views of each image: (N, D).

        Args:
            image_index: int64 (M,), each caption's image, as ``chunks_of`` gives it.
        """
        layer = self.standardize["image"]
        image_features = torch.cat([layer(block).mean(1) for block in blocks(self._store.image_features, images)])
        return self._with_captions(images, image_features, image_index)

    def _with_captions(self, images: np.ndarray, image_features: Tensor, image_index: np.ndarray) -> PairedFeatures:
        captions = captions_of(image_index, images)
        texts = standardised(self.standardize["text"], self._store.text_features, captions)
        return PairedFeatures(image_features, texts, np.searchsorted(images, image_index[captions]))


class _DealtChunks(NamedTuple):
    """Chunks with the map that they were dealt by. ``shuffle_seed``: of swapped captions; None: the true ones."""

    chunks: Chunks
    image_index: np.ndarray
    shuffle_seed: int | None


def shuffle_pairs(image_index: np.ndarray, images: np.ndarray, seed: int) -> np.ndarray:
    """Moves the captions of each of ``images`` to another one of them: an ``image_index`` for the sanity check."""
    order = np.random.default_rng(seed).permutation(images)
    new_image = np.arange(max(images.max(), image_index.max()) + 1)
    new_image[order] = np.roll(order, 1)
    return new_image[image_index]
