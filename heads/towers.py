"""Towers: from images, or captions, to the features that heads take, while encoders are fine-tuned.

A frozen tower returns the store's features. A tower that is fine-tuned recomputes the outputs of its unfrozen layers,
from cached activations or in whole forward passes, and takes those of its frozen layers from the store.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from onceover.base.errors import OnceoverError
from onceover.base.files import digest
from onceover.base.formats import ACTIVATIONS_VERSION
from onceover.base.threads import in_order
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder, by_length
from onceover.extract.image_source import ImageSource
from onceover.extract.pictures import decode
from onceover.extract.store import FeatureStore
from onceover.heads.activations import CaptionActivations, ImageActivations, write_activations
from onceover.heads.chunks import Features
from onceover.heads.unfreeze import Cut, Stages, UnfreezeError

TOLERANCE = 1e-3  # of the largest number, by which a pass from the cut may differ from a whole one
CAPTIONS = 128  # captions of similar length that go through the text encoder together
_CACHED_IMAGES = 16  # images that are encoded together while activations are cached
_CACHED_CAPTIONS = 1024  # captions, the same
_CROP_AREA = (0.5, 1.0)  # shares of the image
_CROP_ASPECT = (4 / 5, 5 / 4)  # relative to the image's own


class TowerError(OnceoverError):
    """Images that are not those of the store."""


class MicroBatch(NamedTuple):
    """Some records of a batch that go through a tower together.

    Attributes:
        positions: int64 (b,), in the batch.
        features: float32 (b, D), the store's, on the CPU.
        inputs: what an encoder takes; None in a frozen tower.
    """

    positions: np.ndarray
    features: Tensor
    inputs: Any


class Tower:
    """A frozen tower; the base of those that are fine-tuned.

    Args:
        features: the store's, (N, V, D) or (M, D).
        size: records that go through the tower together, at most.

    Attributes:
        depths: of the unfrozen parameters, by name (``Stages.unfreeze``).
        longest: tokens of the longest caption; 0 where there are none.
    """

    longest = 0

    def __init__(self, features: Features, size: int, device: torch.device):
        self.size = size
        self.device = device
        self.depths: dict[str, int] = {}
        self._features = features

    def unfrozen_parameters(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {}

    def micro_batches(
        self, rows: np.ndarray, views: np.ndarray | None = None, noise: np.ndarray | None = None
    ) -> list[MicroBatch]:
        """Loads records and splits them into micro-batches.

        Args:
            rows: int64 (B,), rows of the store.
            views: int64 (B,), the view of each image; None for captions.
            noise: random numbers in [0, 1) to augment with, (B, …); None: no augmentation.
        """
        loaded = []
        for positions in self._split(rows):
            some_views = None if views is None else views[positions]
            some_noise = None if noise is None else noise[positions]
            loaded.append(self._load(positions, rows[positions], some_views, some_noise))
        return loaded

    def forward(self, batch: MicroBatch) -> Tensor:
        """Features like the store's, float32 (b, D); gradients flow into the unfrozen layers."""
        return batch.features.to(self.device)

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        """The positions of each micro-batch."""
        return [np.arange(start, min(start + self.size, len(rows))) for start in range(0, len(rows), self.size)]

    def _load(
        self, positions: np.ndarray, rows: np.ndarray, views: np.ndarray | None, noise: np.ndarray | None
    ) -> MicroBatch:
        stored = self._features[rows] if views is None else self._features[rows, views]
        return MicroBatch(positions, torch.from_numpy(np.asarray(stored, np.float32)), None)


class TunedTower(Tower):
    """A tower with an encoder of which some layers are unfrozen.

    Its features are the outputs of the recipe's layers, side by side. With one unfrozen layer of two::

        features  (b, D1 + D2) = [ column of the store (b, D1) | output of the unfrozen layer (b, D2) ]

    Args:
        sample: inputs of the encoder, to find its stages with.
        layers: the names of those to unfreeze.
        bfloat16: whether the unfrozen layers multiply in bfloat16.

    Attributes:
        encoder: as it was saved, in float32.
        stages: of the encoder. lowest: the index of the lowest unfrozen one.

    Raises:
        UnfreezeError: no such layers, or layers that the features do not depend on.
    """

    kind = ""
    encoder: ImageEncoder | TextEncoder

    def __init__(
        self,
        features: Features,
        size: int,
        encoder: ImageEncoder | TextEncoder,
        bfloat16: bool,
        layers: Sequence[str],
        sample: Any,
    ):
        super().__init__(features, size, encoder.device)
        self.encoder = encoder
        self.stages = Stages(encoder.model, lambda: encoder.outputs(sample))
        self.lowest = self.stages.lowest(layers, self.kind)
        self.depths = self.stages.unfreeze(self.lowest)
        self._bfloat16 = bfloat16
        self._sample = sample
        self._cut: Cut | None = None
        outputs = self._outputs(sample)
        self._is_unfrozen = [output.requires_grad for output in outputs]
        self._widths = [output.shape[1] for output in outputs]
        if not any(self._is_unfrozen):
            raise UnfreezeError(
                f"the {self.kind} encoder's features do not depend on the layers to unfreeze; unfreeze another layer"
            )

    def unfrozen_parameters(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {name: value for name, value in self.encoder.model.named_parameters() if name in self.depths}

    def cache(self, folder: Path) -> None:
        """Runs the frozen stages once over all records and caches their activations; steps start there from now on."""
        raise NotImplementedError

    def sample_features(self, encoder: Any) -> np.ndarray:
        """Features that an encoder like the tower's gives for its first records."""
        raise NotImplementedError

    def checked_cut(self) -> Cut:
        """The cut below the lowest unfrozen stage, where passes from there give the same as whole ones.

        Raises:
            UnfreezeError: no stage lies below it, or the architecture has connections around it.
        """
        if self.lowest == 0:
            raise UnfreezeError(f"{self.kind}: all of it is unfrozen, and nothing is left to cache; add --no-cache")
        cut = self.stages.cut(self.lowest)
        with torch.no_grad():
            whole = self._outputs(self._sample)
            try:
                with cut.stopping():
                    activations = cut.below(lambda: self.encoder.outputs(self._sample))
                with cut.entered(activations):
                    upper = self._outputs(self._sample)
                is_same = self._agree(upper, whole)
            except Exception:  # models fail in their own ways where stages are left out
                is_same = False
        if not is_same:
            raise UnfreezeError(
                f"the {self.kind} encoder's architecture cannot be cut at {self.stages.names[self.lowest]}, so that "
                "its activations cannot be cached; unfreeze another layer, or add --no-cache"
            )
        return cut

    def _agree(self, upper: list[Tensor], whole: list[Tensor]) -> bool:
        """Whether the outputs of the unfrozen layers agree."""
        for output, expected, is_unfrozen in zip(upper, whole, self._is_unfrozen, strict=True):
            if not is_unfrozen:
                continue
            tolerance = TOLERANCE * float(expected.abs().max())
            if not torch.allclose(output, expected, rtol=0, atol=tolerance):
                return False

        return True

    def _outputs(self, inputs: Any) -> list[Tensor]:
        """The outputs of the recipe's layers, (b, D) each; in a whole pass of the model each of them has one."""
        return list(self.encoder.outputs(inputs))  # type: ignore[arg-type]

    def _joined(self, inputs: Any, activations: Tensor | None, features: Tensor) -> Tensor:
        """Joins the unfrozen layers' outputs and the store's columns of the frozen ones: float32 (b, D)."""
        entered: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._cut is not None and activations is not None:
            entered = self._cut.entered(activations)
        with entered, self._autocast():
            outputs = self.encoder.outputs(inputs)
        columns = features.to(self.device).split(self._widths, dim=1)
        joined = []
        for output, column, is_unfrozen in zip(outputs, columns, self._is_unfrozen, strict=True):
            if is_unfrozen and output is not None:
                joined.append(output.float())
            else:
                joined.append(column)
        return torch.cat(joined, dim=1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    def _fingerprint(self, keys: list[str]) -> str:
        """Fingerprint of the cached activations: all that changes them. ``keys``: of the records' content."""
        stage = self.stages.names[self.lowest]
        return digest([ACTIVATIONS_VERSION, self.encoder.recipe, stage, self._bfloat16, keys])

    def _threads(self) -> int:
        """How many threads prepare records, or encode them on a CPU."""
        if self.device.type == "cpu":
            return torch.get_num_threads()
        return 4


class ImageTower(TunedTower):
    """Images through an encoder of which some layers are unfrozen.

    Args:
        images: where the store's images come from.
        rows: those that are used, rows of the store, ascending.
        augment: random crops and mirror images in the place of the stored views, in whole passes.
    """

    kind = "image"
    encoder: ImageEncoder

    def __init__(
        self,
        store: FeatureStore,
        images: ImageSource,
        rows: np.ndarray,
        encoder: ImageEncoder,
        size: int,
        *,
        bfloat16: bool,
        layers: Sequence[str],
        augment: bool,
    ):
        self._images = images
        self._keys = store.image_paths
        self._sha256 = store.sha256
        self._rows = rows
        self._views = store.image_features.shape[1]
        self._augment = augment
        self._activations: ImageActivations | None = None
        self.encoder = encoder
        self._first = self._pixels(rows[0])[None]
        sample = encoder.preprocessing.view(self._first, 0).to(encoder.device)
        super().__init__(store.image_features, size, encoder, bfloat16, layers, sample)
        self._decoders = ThreadPoolExecutor(self._threads())

    def cache(self, folder: Path) -> None:
        """Runs the frozen stages once over all views of the images; steps start from these activations from now on."""
        cut = self.checked_cut()
        fingerprint = self._fingerprint([self._sha256[row] for row in self._rows])
        path = folder / f"image-{fingerprint[:16]}.h5"
        with torch.no_grad(), self._autocast(), cut.stopping():
            shape = self._below(cut, self._sample).shape[1:]
        whole = (len(self._rows), self._views, *shape)
        write_activations(path, fingerprint, whole, lambda: self._compute_activations(cut), "images")
        self._cut = cut
        self._activations = ImageActivations(path)

    def sample_features(self, encoder: ImageEncoder) -> np.ndarray:
        """Features that an encoder gives for the first image, as stored."""
        return encoder.encode(self._first)

    def _compute_activations(self, cut: Cut) -> Iterator[np.ndarray]:
        """Yields the activations of some images, float32 (b, V, …), in order."""
        tasks = [self._rows[start : start + _CACHED_IMAGES] for start in range(0, len(self._rows), _CACHED_IMAGES)]

        def encode(rows: np.ndarray) -> np.ndarray:
            pixels = torch.stack([self._pixels(row) for row in rows]).to(self.device)
            activations = []
            with torch.inference_mode(), self._autocast():
                for view in range(self._views):
                    activations.append(self._below(cut, self.encoder.preprocessing.view(pixels, view)))
                return torch.stack(activations, 1).float().cpu().numpy()

        with cut.stopping():
            yield from in_order(encode, tasks, self._threads())

    def _below(self, cut: Cut, pixels: Tensor) -> Tensor:
        """Activations at the cut, (B, …), feature maps with their channels last."""
        activations = cut.below(lambda: self.encoder.outputs(pixels))
        if activations.ndim == 4:
            return activations.permute(0, 2, 3, 1)
        return activations

    def _load(
        self, positions: np.ndarray, rows: np.ndarray, views: np.ndarray | None, noise: np.ndarray | None
    ) -> MicroBatch:
        assert views is not None, "an image is loaded in a view"
        batch = super()._load(positions, rows, views, noise)
        if self._activations:
            cached = self._activations.gather(np.searchsorted(self._rows, rows), views)
            return batch._replace(inputs=torch.from_numpy(cached))
        if noise is not None and self._augment:
            images = self._decoders.map(self._cropped, rows, noise)
        else:
            images = self._decoders.map(self._view, rows, views)
        return batch._replace(inputs=torch.stack(list(images)))

    def forward(self, batch: MicroBatch) -> Tensor:
        """As ``Tower.forward``."""
        inputs = batch.inputs.to(self.device)
        if not self._activations:
            return self._joined(inputs, None, batch.features)
        inputs = inputs.float()
        if inputs.ndim == 4:
            inputs = inputs.permute(0, 3, 1, 2)
        return self._joined(inputs, inputs, batch.features)

    def _image(self, row: int) -> Image.Image:
        """Reads and decodes an image.

        Raises:
            TowerError: it cannot be read, or is another one than the store was made of.
        """
        key = self._keys[row]
        try:
            data = self._images.open(key)
        except OSError as error:
            raise TowerError(
                f"{self._images.describe(key)} cannot be read: {error.strerror or error}; "
                "name the dataset's folder: --data DIR"
            ) from error
        if hashlib.sha256(data).hexdigest() != self._sha256[row]:
            raise TowerError(
                f"{self._images.describe(key)} is not the image that the store was made of; extract and fit again"
            )
        return decode(data, self.encoder.short_side)

    def _pixels(self, row: int) -> Tensor:
        return self.encoder.pixels(self._image(row))

    def _view(self, row: int, view: int) -> Tensor:
        return self.encoder.preprocessing.view(self._pixels(row), view)

    def _cropped(self, row: int, noise: np.ndarray) -> Tensor:
        """A random part of an image, mirrored or not. ``noise``: (5,) in [0, 1), which decides."""
        image = self._image(row)
        area_noise, aspect_noise, left_noise, top_noise, mirror_noise = noise.tolist()
        area = image.width * image.height * (_CROP_AREA[0] + area_noise * (_CROP_AREA[1] - _CROP_AREA[0]))
        aspect = _CROP_ASPECT[0] * (_CROP_ASPECT[1] / _CROP_ASPECT[0]) ** aspect_noise
        aspect *= image.width / image.height
        width = max(1, min(image.width, round((area * aspect) ** 0.5)))
        height = max(1, min(image.height, round((area / aspect) ** 0.5)))
        left = int(left_noise * (image.width - width + 1))
        top = int(top_noise * (image.height - height + 1))
        pixels = self.encoder.preprocessing.preprocess(image.crop((left, top, left + width, top + height)))
        if mirror_noise < 0.5:
            return pixels.flip(-1)
        return pixels


class _CaptionInputs(NamedTuple):
    """The text encoder's inputs for a micro-batch.

    Attributes:
        token_ids: of each caption.
        activations: (b, L, D), cached; None in whole passes.
        keep: bool (b, L), False for tokens that are dropped; None where none are.
    """

    token_ids: list[Tensor]
    activations: Tensor | None
    keep: Tensor | None


class TextTower(TunedTower):
    """Captions through an encoder of which some layers are unfrozen.

    Args:
        rows: the captions that are used, rows of the store, ascending.
        word_dropout: the share of tokens that are dropped while training.
    """

    kind = "text"
    encoder: TextEncoder

    def __init__(
        self,
        store: FeatureStore,
        rows: np.ndarray,
        encoder: TextEncoder,
        size: int,
        *,
        bfloat16: bool,
        layers: Sequence[str],
        word_dropout: float,
    ):
        self._rows = rows
        self._captions = [store.captions[row] for row in rows]
        self._word_dropout = word_dropout
        token_ids, _ = encoder.tokenize(self._captions)
        self._token_ids = [torch.tensor(ids, dtype=torch.long) for ids in token_ids]
        self._lengths = np.array([len(ids) for ids in token_ids])
        self._activations: CaptionActivations | None = None
        self.longest = int(self._lengths.max())
        sample = encoder.padded(self._token_ids[:8])
        super().__init__(store.text_features, size, encoder, bfloat16, layers, sample)

    def cache(self, folder: Path) -> None:
        """Runs the frozen stages once over all captions; steps start from these activations from now on.

        Where all is unfrozen, nothing is cached: every pass starts with the token ids.
        """
        if self.lowest == 0:
            return
        cut = self.checked_cut()
        fingerprint = self._fingerprint(self._captions)
        path = folder / f"text-{fingerprint[:16]}.h5"
        with torch.no_grad(), self._autocast(), cut.stopping():
            width = self._below(cut, self._token_ids[:1]).shape[2]
        lengths = self._lengths
        if "attention_mask" not in self._sample:  # padding takes part in the pass
            lengths = np.full(len(self._token_ids), self._sample["input_ids"].shape[1])
        offsets = np.r_[0, np.cumsum(lengths)]
        shape = (int(offsets[-1]), width)
        write_activations(
            path, fingerprint, shape, lambda: self._compute_activations(cut, lengths), "captions", offsets
        )
        self._cut = cut
        self._activations = CaptionActivations(path)

    def sample_features(self, encoder: TextEncoder) -> np.ndarray:
        """Features that an encoder gives for the first captions, as stored."""
        return encoder.encode(self._captions[:8])[0]

    def _compute_activations(self, cut: Cut, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the tokens' activations of some captions, float32 (sum of lengths, D), in order."""

        def encode(start: int) -> np.ndarray:
            token_ids = self._token_ids[start : start + _CACHED_CAPTIONS]
            activations: list = [None] * len(token_ids)
            with torch.inference_mode(), self._autocast():
                for positions, batch in by_length(token_ids, CAPTIONS):
                    states = self._below(cut, batch).float().cpu().numpy()
                    for position, caption_states in zip(positions, states, strict=True):
                        activations[position] = caption_states[: lengths[start + position]]
            return np.concatenate(activations)

        with cut.stopping():
            yield from in_order(encode, range(0, len(self._token_ids), _CACHED_CAPTIONS), self._threads())

    def _below(self, cut: Cut, token_ids: Sequence[Tensor]) -> Tensor:
        """Activations at the cut, (B, L, D)."""
        inputs = self.encoder.padded(list(token_ids))
        return cut.below(lambda: self.encoder.outputs(inputs))

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        """The positions of each micro-batch, captions of similar length together."""
        lengths = self._lengths[np.searchsorted(self._rows, rows)]
        order = np.argsort(lengths, kind="stable")
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    def _load(
        self, positions: np.ndarray, rows: np.ndarray, views: np.ndarray | None, noise: np.ndarray | None
    ) -> MicroBatch:
        batch = super()._load(positions, rows, None, noise)
        captions = np.searchsorted(self._rows, rows)  # positions among the captions that are used
        activations = None
        if self._activations:
            activations = torch.from_numpy(self._activations.gather(captions))
        keep = None
        if noise is not None and self._word_dropout:
            keep = torch.from_numpy(self._kept_tokens(self._lengths[captions], noise))
        token_ids = [self._token_ids[caption] for caption in captions]
        return batch._replace(inputs=_CaptionInputs(token_ids, activations, keep))

    def _kept_tokens(self, lengths: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Which tokens are not dropped, bool (b, L); the first and the last of a caption always stay: no words."""
        keep = noise[:, : lengths.max()] >= self._word_dropout
        keep[:, 0] = True
        keep[np.arange(len(lengths)), lengths - 1] = True
        return keep

    def forward(self, batch: MicroBatch) -> Tensor:
        """As ``Tower.forward``."""
        token_ids, activations, keep = batch.inputs
        inputs = self.encoder.padded(token_ids)
        if keep is not None and "attention_mask" in inputs:
            inputs["attention_mask"] = inputs["attention_mask"] * keep.to(self.device)
        if activations is not None:
            activations = activations.to(self.device).float()
        return self._joined(inputs, activations, batch.features)
