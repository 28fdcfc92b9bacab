"""Measures what a preprocessing shows of an image, by what it does to gradients, since its settings may not say so."""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

WIDE = (600, 300)  # pixels of the images that it is measured with
TALL = (200, 400)
_NOTHING_LOST = 0.99  # of a side: below it, something is cut off
_MARGIN = 10  # a tenth of a side is left out at each end
_ROUNDING = 1.5  # pixels by which two measurements of one side may differ


def resized_and_cropped(whole: Callable[[Image.Image], Tensor]) -> tuple[int, int]:
    """The pixels of the shorter side after resizing, and those of a side after the centre is cut out.

    The first is 0 where nothing is resized, the second 0 where nothing is cut off, or where no square remains.

    Args:
        whole: all steps, an RGB image -> float (3, H, W), the same size for each; a level of grey becomes a number
            that is linear in it.
    """
    black = _grey(whole, Image.new("RGB", WIDE, "black"))
    white = _grey(whole, Image.new("RGB", WIDE, "white"))
    height, width = black.shape
    if (black == white).any():  # something is put around the image
        return max(height, width), 0
    shares = []
    sides = []
    for size in (WIDE, TALL):
        across = _grey(whole, _gradient(size))
        down = _grey(whole, _gradient(size[::-1]).transpose(Image.Transpose.TRANSPOSE))
        share_of_width = _slope((across - black) / (white - black)) * width
        share_of_height = _slope(((down - black) / (white - black)).T) * height
        shares += [share_of_width, share_of_height]
        sides.append(height / share_of_height if size is WIDE else width / share_of_width)
    if min(shares) >= _NOTHING_LOST:
        return max(height, width), 0
    resized = round(sides[0])
    if abs(sides[0] - sides[1]) > _ROUNDING:
        resized = 0
    return resized, height if height == width else 0


def _grey(whole: Callable[[Image.Image], Tensor], image: Image.Image) -> np.ndarray:
    """What an image becomes, on the average of the channels: (H, W)."""
    return whole(image).double().mean(0).numpy()


def _gradient(size: tuple[int, int]) -> Image.Image:
    """An image whose level rises from left to right, from black to white."""
    width, height = size
    levels = ((np.arange(width) + 0.5) / width * 255).round().astype(np.uint8)
    return Image.fromarray(np.tile(levels, (height, 1))).convert("RGB")


def _slope(levels: np.ndarray) -> float:
    """The slope of the levels (H, W) along a row, without the outermost tenths."""
    margin = levels.shape[1] // _MARGIN
    profile = levels.mean(0)[margin : levels.shape[1] - margin]
    slope, _ = np.polyfit(np.arange(len(profile)), profile, 1)
    return float(slope)
