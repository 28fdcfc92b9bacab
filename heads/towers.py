"""The two sides of fine-tuning: what images and captions go through before the heads, and from where they come.

A side of which nothing thaws gives the store's features. One that thaws gives its live layers' outputs, from cached
activations or in full passes, and the store's columns in the place of its frozen layers'.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
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
from onceover.heads.activations import Maps, Tokens, write_activations
from onceover.heads.thaw import Cut, Stages, ThawError

TOLERANCE = 1e-3  # of the largest number, by which a pass from the cut may differ from a whole one
CAPTIONS = 128  # of similar length that go through the text encoder together
_PICTURES = 16  # that are encoded together while activations are cached
_BLOCK = 1024  # captions, the same
_CROP_AREA, _CROP_ASPECT = (0.5, 1.0), (4 / 5, 5 / 4)


class SideError(OnceoverError):
    """Images that are not those of the store."""


class Part(NamedTuple):
    """Some records of a batch that are passed together.

    ``places``: where they stand in the batch, (b,). ``features``: the store's, (b, D). ``inputs``: what a live side
    takes beside them.
    """

    places: np.ndarray
    features: Tensor
    inputs: Any


class Side:
    """What both sides have in common; by itself, one of which nothing thaws.

    Args:
        features: the store's, (N, V, D) or (M, D).
        size: records that are passed together.

    Attributes:
        depths: of the thawed parameters by name (``Stages.thaw``).
    """

    encoder: ImageEncoder | TextEncoder | None = None

    def __init__(self, features: np.ndarray, size: int, device: torch.device):
        self._stored, self.size, self.device = features, size, device
        self.depths: dict[str, int] = {}

    def thawed(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        named = self.encoder.model.named_parameters() if self.encoder else ()
        return {name: parameter for name, parameter in named if name in self.depths}

    def parts(self, rows: np.ndarray, views: np.ndarray | None = None, noise: Any = None) -> list[Part]:
        """Rows of the store (B,), images in a view each, as parts of at most ``size``."""
        return [
            self._part(places, rows[places], None if views is None else views[places], noise)
            for places in self._dealt(rows)
        ]

    def forward(self, part: Part) -> Tensor:
        """float32 features (b, D) as the store has them; gradients flow into what is thawed."""
        return part.features.to(self.device)

    def _dealt(self, rows: np.ndarray) -> list[np.ndarray]:
        return [np.arange(start, min(start + self.size, len(rows))) for start in range(0, len(rows), self.size)]

    def _part(self, places: np.ndarray, rows: np.ndarray, views: np.ndarray | None, _noise) -> Part:
        chosen = self._stored[rows] if views is None else self._stored[rows, views]
        return Part(places, torch.from_numpy(np.asarray(chosen, np.float32)), None)


class _Thawed(Side):
    """A side with a live encoder: which of its layers are live, and how a pass begins at the cut."""

    kind = ""

    def __init__(self, features, size, device, encoder, bfloat16: bool, chosen: list[str], sample: Any):
        super().__init__(features, size, device)
        self.encoder, self._bfloat16, self._cut = encoder, bfloat16, None
        self.stages = Stages(encoder.model, lambda: encoder.outputs(sample))
        self.lowest = self.stages.lowest(chosen, self.kind)
        self.depths = self.stages.thaw(self.lowest)
        outputs = encoder.outputs(sample)
        self._live = [output.requires_grad for output in outputs]
        self._widths = [output.shape[1] for output in outputs]
        if not any(self._live):
            raise ThawError(f"what thaws of the {self.kind} encoder has no part in its features; thaw another layer")

    def cut_below(self, sample: Any) -> Cut:
        """The cut, found to give what whole passes give.

        Raises:
            ThawError: nothing lies below it, or the architecture has connections around it.
        """
        if self.lowest == 0:
            raise ThawError(f"{self.kind}: all of it thaws, and nothing is left to cache; add --no-cache")
        cut = self.stages.cut(self.lowest)
        with torch.no_grad():
            whole = self.encoder.outputs(sample)
            try:
                with cut.stopping():
                    activations = cut.below(lambda: self.encoder.outputs(sample))
                with cut.entered(activations):
                    upper = self.encoder.outputs(sample)
                same = all(
                    torch.allclose(one, other, rtol=0, atol=TOLERANCE * float(other.abs().max()))
                    for one, other, live in zip(upper, whole, self._live, strict=True)
                    if live
                )
            except Exception:  # models fail in their own ways where stages are left out
                same = False
        if not same:
            raise ThawError(
                f"the {self.kind} encoder's architecture cannot be cut at {self.stages.names[self.lowest]}, so that "
                "its activations cannot be cached; thaw another layer, or add --no-cache"
            )
        return cut

    def _joined(self, inputs: Any, activations: Tensor | None, features: Tensor) -> Tensor:
        entered = self._cut.entered(activations) if self._cut else contextlib.nullcontext()
        with entered, self._autocast():
            outputs = self.encoder.outputs(inputs)
        columns = features.to(self.device).split(self._widths, dim=1)
        chosen = zip(outputs, columns, self._live, strict=True)
        return torch.cat([output.float() if live else column for output, column, live in chosen], dim=1)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    def _fingerprint(self, keys: list[str]) -> str:
        """Of activations: all that changes them."""
        stage = self.stages.names[self.lowest]
        return digest([ACTIVATIONS_VERSION, self.encoder.recipe, stage, self._bfloat16, keys])

    def _streams(self) -> int:
        return torch.get_num_threads() if self.device.type == "cpu" else 4


class Pictures(_Thawed):
    """Images with a live encoder, whole or above the cut.

    Args:
        images: where the store's images come from. rows: those that are used, ascending.
        augment: random crops and mirror images in the place of the stored views, in whole passes.
    """

    kind = "image"

    def __init__(
        self,
        store: FeatureStore,
        images: ImageSource,
        rows: np.ndarray,
        encoder,
        size,
        bfloat16,
        chosen,
        augment,
    ):
        self._images = images
        self._keys = store.image_paths
        self._sha256 = store.sha256
        self._rows = rows
        self._views, self._augment, self._maps = store.image_features.shape[1], augment, None
        self.encoder = encoder
        self._first = self._pixels(rows[0])[None]
        self._sample = encoder.preprocessing.view(self._first, 0).to(encoder.device)
        super().__init__(store.image_features, size, encoder.device, encoder, bfloat16, chosen, self._sample)
        self._decoders = ThreadPoolExecutor(self._streams())

    def cache(self, folder: Path, say: Callable[[str], None]) -> None:
        """Runs what lies below the cut once over the images' views; steps begin there from now on."""
        self._cut = self.cut_below(self._sample)
        fingerprint = self._fingerprint([self._sha256[row] for row in self._rows])
        path = folder / f"image-{fingerprint[:16]}.h5"
        with torch.no_grad(), self._autocast(), self._cut.stopping():
            shape = self._below(self._sample).shape[1:]
        whole = (len(self._rows), self._views, *shape)
        write_activations(path, fingerprint, whole, self._activations, "images", say)
        self._maps = Maps(path)

    def sample_features(self, encoder: ImageEncoder) -> np.ndarray:
        """What an encoder makes of the first image."""
        return encoder.encode(self._first)

    def _activations(self) -> Iterator[np.ndarray]:
        tasks = [self._rows[start : start + _PICTURES] for start in range(0, len(self._rows), _PICTURES)]

        def encode(rows: np.ndarray) -> np.ndarray:
            pixels = torch.stack([self._pixels(row) for row in rows]).to(self.device)
            with torch.inference_mode(), self._autocast():
                views = [self._below(self.encoder.preprocessing.view(pixels, view)) for view in range(self._views)]
                return torch.stack(views, 1).float().cpu().numpy()

        with self._cut.stopping():
            yield from in_order(encode, tasks, self._streams())

    def _below(self, pixels: Tensor) -> Tensor:
        """Activations (B, …), maps with their channels last."""
        activations = self._cut.below(lambda: self.encoder.outputs(pixels))
        return activations.permute(0, 2, 3, 1) if activations.ndim == 4 else activations

    def _part(self, places, rows, views, noise) -> Part:
        part = super()._part(places, rows, views, noise)
        if self._maps:
            inputs = torch.from_numpy(self._maps.gather(np.searchsorted(self._rows, rows), views))
        elif noise is not None and self._augment:
            inputs = torch.stack([*self._decoders.map(self._cropped, rows, noise[places])])
        else:
            inputs = torch.stack([*self._decoders.map(self._view, rows, views)])
        return part._replace(inputs=inputs)

    def forward(self, part: Part) -> Tensor:
        """As ``Side.forward``."""
        inputs = part.inputs.to(self.device)
        if not self._maps:
            return self._joined(inputs, None, part.features)
        inputs = inputs.float()
        if inputs.ndim == 4:
            inputs = inputs.permute(0, 3, 1, 2)
        return self._joined(inputs, inputs, part.features)

    def _picture(self, row: int) -> Image.Image:
        key = self._keys[row]
        try:
            data = self._images.open(key)
        except OSError as error:
            raise SideError(
                f"{self._images.describe(key)} cannot be read: {error.strerror or error}; "
                "name the dataset's folder: --data DIR"
            ) from error
        if hashlib.sha256(data).hexdigest() != self._sha256[row]:
            raise SideError(
                f"{self._images.describe(key)} is not the image that the store was made of; extract and fit again"
            )
        return decode(data, self.encoder.short_side)

    def _pixels(self, row: int) -> Tensor:
        return self.encoder.pixels(self._picture(row))

    def _view(self, row: int, view: int) -> Tensor:
        return self.encoder.preprocessing.view(self._pixels(row), view)

    def _cropped(self, row: int, noise: np.ndarray) -> Tensor:
        """A random part of an image, mirrored or not, decided by ``noise``: (5,) in [0, 1)."""
        picture = self._picture(row)
        area, aspect, left, top, mirror = noise.tolist()
        area = picture.width * picture.height * (_CROP_AREA[0] + area * (_CROP_AREA[1] - _CROP_AREA[0]))
        aspect = _CROP_ASPECT[0] * (_CROP_ASPECT[1] / _CROP_ASPECT[0]) ** aspect
        aspect *= picture.width / picture.height
        width = max(1, min(picture.width, round((area * aspect) ** 0.5)))
        height = max(1, min(picture.height, round((area / aspect) ** 0.5)))
        left, top = int(left * (picture.width - width + 1)), int(top * (picture.height - height + 1))
        pixels = self.encoder.preprocessing.preprocess(picture.crop((left, top, left + width, top + height)))
        return pixels.flip(-1) if mirror < 0.5 else pixels


class Captions(_Thawed):
    """Captions with a live encoder, whole or above the cut.

    Args:
        rows: the captions that are used, ascending. word_dropout: the share of tokens that ``noise`` leaves out.
    """

    kind = "text"

    def __init__(self, store: FeatureStore, rows: np.ndarray, encoder, size, bfloat16, chosen, word_dropout: float):
        self._captions, self._rows, self._word_dropout = [store.captions[row] for row in rows], rows, word_dropout
        ids, _ = encoder.tokenize(self._captions)
        self._ids = [torch.tensor(each, dtype=torch.long) for each in ids]
        self._lengths, self._tokens = np.array([len(each) for each in ids]), None
        self._sample = encoder.padded(self._ids[:8])
        super().__init__(store.text_features, size, encoder.device, encoder, bfloat16, chosen, self._sample)

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return int(self._lengths.max())

    def cache(self, folder: Path, say: Callable[[str], None]) -> None:
        """Runs what lies below the cut once over the captions, if anything does; steps begin there from now on."""
        if self.lowest == 0:
            return  # token ids are what all passes begin with
        self._cut = self.cut_below(self._sample)
        fingerprint = self._fingerprint(self._captions)
        path = folder / f"text-{fingerprint[:16]}.h5"
        with torch.no_grad(), self._autocast(), self._cut.stopping():
            width = self._below(self._ids[:1]).shape[2]
        padded = "attention_mask" not in self._sample
        lengths = np.full(len(self._ids), self._sample["input_ids"].shape[1]) if padded else self._lengths
        offsets = np.r_[0, np.cumsum(lengths)]
        shape = (int(offsets[-1]), width)
        write_activations(path, fingerprint, shape, lambda: self._activations(lengths), "captions", say, offsets)
        self._tokens = Tokens(path)

    def sample_features(self, encoder: TextEncoder) -> np.ndarray:
        """What an encoder makes of the first captions."""
        return encoder.encode(self._captions[:8])[0]

    def _activations(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        def encode(start: int) -> np.ndarray:
            ids = self._ids[start : start + _BLOCK]
            tokens: list = [None] * len(ids)
            with torch.inference_mode(), self._autocast():
                for places, batch in by_length(ids, CAPTIONS):
                    for place, states in zip(places, self._below(batch).float().cpu().numpy(), strict=True):
                        tokens[place] = states[: lengths[start + place]]
            return np.concatenate(tokens)

        with self._cut.stopping():
            yield from in_order(encode, range(0, len(self._ids), _BLOCK), self._streams())

    def _below(self, ids: Sequence[Tensor]) -> Tensor:
        inputs = self.encoder.padded(list(ids))
        return self._cut.below(lambda: self.encoder.outputs(inputs))

    def _dealt(self, rows: np.ndarray) -> list[np.ndarray]:
        order = np.argsort(self._lengths[np.searchsorted(self._rows, rows)], kind="stable")
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    def _part(self, places, rows, views, noise) -> Part:
        part, mine = super()._part(places, rows, None, noise), np.searchsorted(self._rows, rows)
        tokens = torch.from_numpy(self._tokens.gather(mine)) if self._tokens else None
        kept = None
        if noise is not None and self._word_dropout:
            lengths = self._lengths[mine]
            kept = noise[places][:, : lengths.max()] >= self._word_dropout
            kept[:, 0] = True  # the first and the last token are no words
            kept[np.arange(len(mine)), lengths - 1] = True
            kept = torch.from_numpy(kept)
        return part._replace(inputs=([self._ids[row] for row in mine], tokens, kept))

    def forward(self, part: Part) -> Tensor:
        """As ``Side.forward``."""
        ids, tokens, kept = part.inputs
        inputs = self.encoder.padded(ids)
        if kept is not None and "attention_mask" in inputs:
            inputs["attention_mask"] = inputs["attention_mask"] * kept.to(self.device)
        activations = None if tokens is None else tokens.to(self.device).float()
        return self._joined(inputs, activations, part.features)
