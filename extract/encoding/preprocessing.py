"""An image model's preprocessing in two steps: pixels of 8 bits on a processor, scaled wherever the network is."""

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from onceover.extract import pictures
from onceover.extract.encoders import PreprocessSteps


class Preprocessing:
    """The preprocessing that belongs to an image model's weights, for several views of an image.

    ``pixels`` are of 8 bits, and are made on a processor: a GPU would round in another way. ``scaled`` gives each level
    its number, on any device.

    Attributes:
        views: the parts of an image that are encoded (``pictures.VIEWS``).
        short_side: pixels that an image's shorter side must have for nothing to be lost (``pictures.decode``), or
            None where the preprocessing does not say.
        preprocess: an RGB image -> uint8 (3, H, W); where the two steps cannot be told apart, float32 and scaled.
    """

    def __init__(self, steps: PreprocessSteps, views: int):
        self._resized = steps.resized
        self._cropped = steps.cropped
        self.views = views_for(views, self._resized >= self._cropped > 0)
        self.short_side = None
        if self._resized:
            self.short_side = pictures.needed(self._resized, self.views)
        self._parts = list(dict.fromkeys(part for part, _ in self.views))
        self._levels: Tensor | None = None
        self.preprocess = steps.pixels
        if not self._split(steps):
            self._levels = None
            self.preprocess = steps.whole

    def _split(self, steps: PreprocessSteps) -> bool:
        """Makes the table of 256 levels; whether it gives a sample the numbers that the steps as a whole give it."""
        gradient = Image.linear_gradient("L")
        sample = Image.merge("RGB", [gradient.rotate(angle) for angle in (0, 90, 180)])
        whole = steps.whole(sample)
        with contextlib.suppress(Exception):  # processors differ in which of their steps can be left out
            self._levels = steps.levels(torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)).flatten(1)
            return torch.equal(self.scaled(self.preprocess(sample)[None])[0], whole)
        return False

    def read(self, data: bytes) -> tuple[Image.Image, Callable[[], Tensor]]:
        """The image in ``data``, decoded as far as its views need it, and a function that gives its ``pixels``.

        Raises:
            PictureError, MemoryError: as ``pictures.decode``.
        """
        image = pictures.decode(data, self.short_side)
        return image, partial(self.pixels, image)

    def pixels(self, image: Image.Image) -> Tensor:
        """The P different parts of an RGB image that its views show: (P, 3, H, W) of ``preprocess``."""
        return torch.stack([self.preprocess(self._part(image, part)) for part in self._parts])

    def _part(self, image: Image.Image, part: Any) -> Image.Image:
        """The image to preprocess so that the result shows ``part`` (``pictures.VIEWS``) of ``image``."""
        if part == pictures.WHOLE:
            return pictures.inset(image, self._resized, self._cropped)
        return pictures.crop(image, part)

    def view(self, pixels: Tensor, number: int) -> Tensor:
        """One view: (…, P, 3, H, W) of ``pixels`` -> (…, 3, H, W)."""
        part, mirrored = self.views[number]
        shown = pixels.select(-4, self._parts.index(part))
        if mirrored:
            return shown.flip(-1)
        return shown

    def scaled(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) of pixels as the network takes them, channels last; what is no longer of 8 bits stays."""
        if pixels.dtype != torch.uint8 or self._levels is None:
            return pixels
        channels = []
        for levels, channel in zip(self._levels, pixels.unbind(1), strict=True):
            channels.append(levels.index_select(0, channel.flatten().int()).view(channel.shape))
        return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)

    def on(self, device: torch.device, dtype: torch.dtype) -> "Preprocessing":
        """The same, scaling on ``device`` to ``dtype``."""
        moved = copy.copy(self)
        if self._levels is not None:
            moved._levels = self._levels.to(device, dtype)
        return moved


def composed_steps(transform: Any, resized: int, cropped: int) -> PreprocessSteps:
    """The steps of torchvision's ``Compose``, told apart where an image becomes a tensor.

    Args:
        resized, cropped: as in ``PreprocessSteps``.
    """
    steps = list(transform.transforms)
    image: Any = Image.new("RGB", (8, 8))
    before = 0
    while not isinstance(image, Tensor):
        image = steps[before](image)
        before += 1

    def pixels(image: Image.Image) -> Tensor:
        for step in steps[: before - 1]:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def levels(values: Tensor) -> Tensor:
        values = values.float() / 255
        for step in steps[before:]:
            values = step(values)
        return values

    return PreprocessSteps(transform, pixels, levels, resized, cropped)


def views_for(count: int, is_cropped: bool) -> list[tuple]:
    """The first ``count`` views, without those of the whole image where the preprocessing crops nothing."""
    return [view for view in pictures.VIEWS[:count] if is_cropped or view[0] != pictures.WHOLE]
