"""Frozen image encoders: images -> features.

An encoder is always in eval mode: BatchNorm uses its stored statistics and dropout is inert, so a feature does not
depend on what else is in its batch beyond the last bits of the arithmetic. Gradients are off. One made with ``plain``
is the model as it was saved, in float32, so that ``heads.finetune`` can train it and ``save`` can write it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from onceover.extract.backends import EAGER, readied
from onceover.extract.encoders import library_of, parse_spec
from onceover.extract.encoding.devices import BatchQueue, pick_device
from onceover.extract.encoding.layers import image_layers
from onceover.extract.encoding.library_errors import loading
from onceover.extract.encoding.networks import ImageNetwork
from onceover.extract.encoding.preprocessing import Preprocessing
from onceover.extract.encoding.recipes import as_stored, hash_weights


class ImageEncoder:
    """A frozen image encoder with the preprocessing that belongs to its weights.

    Attributes:
        recipe: all that changes a feature, as plain values; its digest is the features' fingerprint.
        preprocessing: the steps before the network.
        model: the network.
        device: where it computes.
        backend: the name of the backend that computes; ``eager`` where the one that was asked for could not.
    """

    def __init__(
        self,
        spec: str,
        *,
        layers: str = "last",
        views: int = 1,
        dtype: str = "float32",
        store_dtype: str = "float32",
        seed: int = 0,
        device: str | None = None,
        plain: bool = False,
        backend: str = EAGER,
    ):
        """Loads the encoder.

        Args:
            spec: as ``extract.image_encoder`` in the settings.
            layers: the layers that lie side by side in a feature, as ``extract.image_layers`` in the settings.
            views: how many views of an image are encoded.
            dtype: of the arithmetic. store_dtype: of the features.
            seed: of random weights.
            device: as ``pick_device``.
            plain: computes in float32 by the backend ``plain``, whatever ``dtype`` and ``backend`` say.
            backend: the name of a backend.
        """
        self._spec = parse_spec(spec)
        self._library = library_of(self._spec)
        self.device = pick_device(device)
        self._dtype = getattr(torch, dtype)
        self._store_dtype = getattr(torch, store_dtype)
        if plain:
            backend = "plain"
            self._dtype = torch.float32
        with loading(self._spec):
            loaded = self._library.load_image(self._spec, seed)
            self.preprocessing = Preprocessing(loaded.steps, views)
        self.model = loaded.module.eval().requires_grad_(False)
        layer_names = image_layers(layers, loaded.recipe)
        self.recipe = as_stored(
            loaded.recipe
            | {
                "weights": hash_weights(self.model),
                "layers": layer_names,
                "views": self.preprocessing.views,
                "short_side": self.preprocessing.short_side,
                "dtype": dtype,
                "store_dtype": store_dtype,
            }
        )
        sample = self.preprocessing.scaled(self.pixels(Image.linear_gradient("L").convert("RGB"))[:1])
        self._network = ImageNetwork(loaded, layer_names, self._spec)
        with loading(self._spec):
            self.backend, self._compute = readied(
                backend, lambda chosen: chosen.image(self._network, sample, self.device, self._dtype)
            )
        self._scaled = self.preprocessing.on(self.device, self._dtype).scaled
        self._queue = BatchQueue(self.device)

    @property
    def short_side(self) -> int | None:
        """As ``Preprocessing.short_side``."""
        return self.preprocessing.short_side

    def read(self, data: bytes) -> Tensor:
        """The pixels of the image in ``data``, decoded as far as its views need it."""
        return self.preprocessing.read(data)[1]()

    def pixels(self, image: Image.Image) -> Tensor:
        """As ``Preprocessing.pixels``."""
        return self.preprocessing.pixels(image)

    def encode(self, pixels: Tensor) -> np.ndarray:
        """Features of B images: (B, P, 3, H, W) of ``pixels`` -> (B, V, D) as stored, one forward pass per view.

        May be called from several threads.
        """
        return self.begin(pixels)()

    @torch.inference_mode()
    def begin(self, pixels: Tensor) -> Callable[[], np.ndarray]:
        """Begins to encode; the call that is returned waits for what ``encode`` gives."""
        return self._queue.begin(self._features, pixels)

    def _features(self, pixels: Tensor) -> Tensor:
        """Features as stored, of pixels that lie on the device."""
        views = [self._view(number, pixels) for number in range(len(self.preprocessing.views))]
        return torch.stack(views, dim=1).to(self._store_dtype)

    @torch.inference_mode()
    def computed(self, pixels: Tensor) -> np.ndarray:
        """Features of the first view of B images before they are rounded to the storage dtype: float32 (B, D)."""
        return self._queue.begin(partial(self._view, 0), pixels)()

    def _view(self, number: int, pixels: Tensor) -> Tensor:
        """Features of one view, float32 (B, D), of pixels that lie on the device."""
        batch = self._scaled(self.preprocessing.view(pixels, number)).to(self._dtype)
        return self._compute(batch).float()

    def outputs(self, pixels: Tensor) -> list[Tensor | None]:
        """A pass over images (B, 3, H, W) on the device: (B, D) of each of the recipe's layers; gradients flow.

        ``pixels``: a view of 8-bit pixels, or scaled already. None for a layer that plays no part in the pass.
        """
        return self._network.outputs(self._scaled(pixels))

    def save(self, folder: Path) -> str:
        """Writes the weights as safetensors, with the preprocessing that belongs to them; returns their spec."""
        return self._library.save(self._spec, "image", self.model, folder)
