"""Regularises heads by augmenting their features: dropout, and feature transfer from other images.

Block dropout leaves out neighbouring numbers of an image's features, as DropBlock does in maps (Ghiasi et al. 2018).
Most neighbours are of one layer of the encoder, so that heads learn not to lean on any layer alone.

Feature transfer (Yin et al. 2019; Delta-encoder: Schwartz et al. 2018) adds the difference between two views, or two
captions, of another image: such differences are no part of an image's content, and much the same for all images.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onceover.heads.batches import Batch

_LEVELS = 2**8  # dropout rates are multiples of 1 / _LEVELS, since a byte decides on each number


@dataclass(frozen=True)
class Noise:
    """Random numbers for the features (n, D) of a batch; each setting uses as many of them as it needs.

    Attributes:
        bits: uint8 (n, D), which decide on dropout.
        first, second: int64 (n,), the rows whose difference is added to a row.
        share: float32 (n, 1), in [0, 1], how much of the difference.
        block_start: int64 (n,), where the block begins that is left out; empty for captions, and where none is.
    """

    bits: np.ndarray
    first: np.ndarray
    second: np.ndarray
    share: np.ndarray
    block_start: np.ndarray

    def part(self, positions: np.ndarray | slice) -> "Noise":
        """The noise of some of the rows, by their positions in the batch."""
        starts = self.block_start[positions] if len(self.block_start) else self.block_start
        return Noise(self.bits[positions], self.first[positions], self.second[positions], self.share[positions], starts)


def draw_noise(
    generator: np.random.Generator, batch: Batch, views_per_image: int, dims: tuple[int, int], *, has_blocks: bool
) -> tuple[Noise, Noise]:
    """Draws the noise of a batch's images and of its captions.

    Rows of images are counted over all views of all images: ``image * views_per_image + view``.

    Args:
        dims: dimensions of the features of a view and of a caption.
        has_blocks: whether blocks of the images' features are to be left out.
    """
    image_rows = batch.images * views_per_image + batch.views
    other_views = another_view(batch.views, views_per_image, generator)
    other_rows = batch.images * views_per_image + other_views
    images = _draw(generator, image_rows, other_rows, dims[0])
    other_captions = batch.captions[another(batch.image_of_text, generator)]
    texts = _draw(generator, batch.captions, other_captions, dims[1])
    # measured: images gain most from whole differences, captions from random parts of them
    texts = replace(texts, share=generator.random(texts.share.shape, np.float32))
    if has_blocks:
        images = replace(images, block_start=generator.integers(dims[0], size=len(image_rows)))
    return images, texts


def _draw(generator: np.random.Generator, rows: np.ndarray, others: np.ndarray, dim: int) -> Noise:
    """Draws noise with whole differences. ``others``: for each row another one of its image, or the row itself."""
    count = len(rows)
    size = count * dim
    words = generator.bit_generator.random_raw(math.ceil(size / 8))  # four times as fast as Generator.bytes
    bits = words.view(np.uint8)[:size].reshape(count, dim)
    order = generator.permutation(count)
    return Noise(bits, rows[order], others[order], np.ones((count, 1), np.float32), np.zeros(0, np.int64))


def another(groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws for each position another one of the same group: int64 (n,); itself where it is alone.

    ``groups``: int64 (n,), ascending. With the groups 0 0 0 1, position 1 gets 0 or 2, position 3 gets 3.
    """
    sizes = np.bincount(groups)
    starts = np.cumsum(sizes) - sizes
    start = starts[groups]
    size = sizes[groups]
    step = 1 + generator.integers(np.maximum(size - 1, 1))
    return start + (np.arange(len(groups)) - start + step) % size


def another_view(views: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws for each of the ``views`` (n,) another one of ``count`` views; the same where there is only one."""
    return (views + 1 + generator.integers(max(count - 1, 1), size=len(views))) % count


def augment(
    table: Tensor, rows: np.ndarray, noise: Noise, variation: float, dropout: float, block_dropout: float = 0.0
) -> Tensor:
    """Features of some rows, with feature transfer and dropout: float32 (n, D).

    Row i becomes ``keep * scale * (table[rows[i]] + variation * share[i] * (table[first[i]] - table[second[i]]))``,
    where ``keep`` is 0 with the probability ``dropout``, and in an image's block; ``scale`` leaves expectations as they
    are (Srivastava et al. 2014).

    Args:
        table: standardised features, float32 (R, D).
        rows: int64 (n,), rows of the table; ``noise`` names others of it.
        variation: factor on the added difference. dropout: probability that a number becomes 0.
        block_dropout: the part of an image's numbers that its block takes.
    """
    dropped_levels = round(dropout * _LEVELS)
    dim = table.shape[1]
    length = dim * round(block_dropout * _LEVELS) // _LEVELS if len(noise.block_start) else 0
    scale = _LEVELS / (_LEVELS - dropped_levels) * dim / (dim - length)
    terms = [rows]
    weights = [np.full((len(rows), 1), scale, np.float32)]
    if variation:
        weight = np.float32(scale * variation) * noise.share
        terms += [noise.first, noise.second]
        weights += [weight, -weight]
    indices = torch.from_numpy(np.stack(terms, 1)).to(table.device)
    per_sample_weights = torch.from_numpy(np.concatenate(weights, 1)).to(table.device)
    # one pass over a row and the two whose difference is added
    features = F.embedding_bag(indices, table, mode="sum", per_sample_weights=per_sample_weights)
    if not dropped_levels and not length:
        return features
    keep = noise.bits >= dropped_levels
    for row, start in enumerate(noise.block_start.tolist()):
        keep[row, start : start + length] = False
        keep[row, : max(0, start + length - dim)] = False  # a block that goes beyond the end goes on at the beginning
    kept = torch.from_numpy(keep.view(np.int8))  # torch turns int8 into floats faster
    return features.mul_(kept.to(table.device).to(features.dtype))
