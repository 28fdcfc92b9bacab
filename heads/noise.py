"""The noise that keeps heads from learning features by heart: dropout, and variation that is borrowed from others."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 2**8  # of the bits that dropout goes by


@dataclass(frozen=True)
class Noise:
    """One draw for rows of features, (n, D); settings take of it as much as they want.

    Attributes:
        bits: uint8 (n, D), what dropout goes by.
        first, second: int64 (n,), the rows whose difference a row is moved by; share: float32 (n, 1), of it, in [0, 1].
    """

    bits: np.ndarray
    first: np.ndarray
    second: np.ndarray
    share: np.ndarray

    def part(self, places: np.ndarray | slice) -> "Noise":
        """That of some of the rows."""
        return Noise(self.bits[places], self.first[places], self.second[places], self.share[places])


def draw_noise(
    generator: np.random.Generator,
    pictures: np.ndarray,
    views: np.ndarray,
    captions: np.ndarray,
    image_of_text: np.ndarray,
    views_each: int,
    dims: tuple[int, int],
) -> tuple[Noise, Noise]:
    """Noise for a batch's images and for its captions; an image's rows are counted over all views of all images.

    Args:
        images, views, captions, image_of_text: as ``Batches.epoch`` gives them.
        views_each: how many views an image has. dims: of the features.
    """
    rows, others = (pictures * views_each + each for each in (views, another_view(views, views_each, generator)))
    images = _draw(generator, rows, others, dims[0])
    texts = _draw(generator, captions, captions[another(image_of_text, generator)], dims[1])
    # measured: images gain most from whole differences, captions from random parts of them
    return images, replace(texts, share=generator.random(texts.share.shape, np.float32))


def _draw(generator: np.random.Generator, rows: np.ndarray, others: np.ndarray, dim: int) -> Noise:
    """With whole differences. ``others``: for each row another one of its image, or the row itself."""
    count, size = len(rows), len(rows) * dim
    bits = generator.bit_generator.random_raw(math.ceil(size / 8)).view(np.uint8)  # four times as fast as bytes()
    order = generator.permutation(count)
    return Noise(bits[:size].reshape(count, dim), rows[order], others[order], np.ones((count, 1), np.float32))


def another(groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """For each place another one of its group, drawn at random; itself where there is none. Groups: ascending, (n,)."""
    sizes = np.bincount(groups)
    first, size = (np.cumsum(sizes) - sizes)[groups], sizes[groups]
    step = 1 + generator.integers(np.maximum(size - 1, 1))
    return first + (np.arange(len(groups)) - first + step) % size


def another_view(views: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """For each of the ``views`` (n,) another one of ``count``, drawn at random; itself where there is one alone."""
    return (views + 1 + generator.integers(max(count - 1, 1), size=len(views))) % count


def noisy(table: Tensor, rows: np.ndarray, noise: Noise, variation: float, rate: float) -> Tensor:
    """Rows of features that are moved as two views, or two captions, of some other image differ, and dropped out.

    What tells records of one image apart is no part of what is in it, and much the same for all images. (Feature
    transfer: Yin et al. 2019; Delta-encoder: Schwartz et al. 2018.) Then each number is left out with probability
    ``rate`` and the rest scaled, so that expectations stay (Srivastava et al. 2014).

    Args:
        table: standardised features, float32 (R, D). rows: int64 (n,), which of them; ``noise`` names others there.
        variation: how much of a share of their difference is added.

    Returns:
        float32 (n, D).
    """
    out = round(rate * _LEVELS)
    scale = _LEVELS / (_LEVELS - out)
    places, weights = [rows], [np.full((len(rows), 1), scale, np.float32)]
    if variation:
        places, share = [rows, noise.first, noise.second], np.float32(scale * variation) * noise.share
        weights += [share, -share]
    # one pass over a row and the two that move it
    sums = [torch.from_numpy(each).to(table.device) for each in (np.stack(places, 1), np.concatenate(weights, 1))]
    features = F.embedding_bag(sums[0], table, mode="sum", per_sample_weights=sums[1])
    if not out:
        return features
    kept = torch.from_numpy((noise.bits >= out).view(np.int8))  # which torch turns into floats faster than bool
    return features.mul_(kept.to(table.device).to(features.dtype))
