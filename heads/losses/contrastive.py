"""The contrastive loss of CLIP, for images with several captions, with its gradient written out.

Its scalar ``log_temperature`` is the logarithm of the temperature, which cosines are divided by.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onceover.configs.schema import ModelConfig
from onceover.heads.losses import Scalar, log_temperature

_MIN_LENGTH = 1e-12  # of a vector; a shorter one is treated as if it had this length


def scalars(config: ModelConfig) -> dict[str, Scalar]:
    """The logarithm of the temperature, learned unless ``model.learn_temperature`` is false."""
    return {"log_temperature": log_temperature(config)}


def shown(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """The temperature."""
    return {"temperature": scalars["log_temperature"].exp()}


def loss(images: Tensor, texts: Tensor, image_of_text: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    """Computes ``contrastive_loss`` at the temperature that the scalars give."""
    return contrastive_loss(images, texts, image_of_text, scalars["log_temperature"].exp())


def contrastive_loss(images: Tensor, texts: Tensor, image_of_text: Tensor, temperature: Tensor | float) -> Tensor:
    """Symmetric cross-entropy over in-batch cosines; captions of one image are never each other's negatives.

    With s = cosine(images, texts) / temperature, caption t and its image i give
    ``-log(exp s_it / (exp s_it + sum of exp s_iu over captions u of other images))`` (image to text) and
    ``-log(exp s_it / sum of exp s_jt over images j)`` (text to image); the result is the mean over captions of
    the two's mean. With one caption per image it is the loss of CLIP (Radford et al. 2021), as in ConVIRT
    (Zhang et al. 2020).

    Args:
        images: vectors (..., B, D) of any length, each image once. Leading dimensions are those of a stack:
            independent losses.
        texts: vectors (..., T, D) of any length.
        image_of_text: int64 (T,), the row in ``images`` of each caption's image.
        temperature: divisor of the cosines, a scalar or (...).

    Returns:
        The losses, (...).

    >>> vectors = torch.eye(2)
    >>> round(float(contrastive_loss(vectors, vectors, torch.tensor([0, 1]), 1.0)), 4)  # log(1 + exp(-1))
    0.3133
    """
    temperature = torch.as_tensor(temperature, dtype=images.dtype, device=images.device).expand(images.shape[:-2])
    return _Contrast.apply(images, texts, image_of_text, temperature)


class _Contrast(torch.autograd.Function):
    """The loss, with its gradient computed in a dozen passes over the (..., T, B) scores, most of them in place.

    For the captions t = 0, 1, 2 of the images 0, 0, 1 the scores s_tj = cosine / temperature are a table::

                 image 0   image 1
        text 0   s00 *     s01        * the caption's own image: ``positive``
        text 1   s10 *     s11        text to image: softmax over a row
        text 2   s20       s21 *      image to text: s21 against s01 and s11, the captions of other images in the column

    With p_tj the softmax over a row, q_tj that over a column's captions of other images, and m_t = 1 - the probability
    of caption t in image to text, the slope (derivative by a score, times 2 T) is

        p_tj - 1 - m_t                             of the caption's own image
        p_tj + q_tj * (sum of m_u over captions u of image j)   of another image

    Captions, the largest array, are never normalised: scores and gradients are divided by their lengths instead.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, image_of_text: Tensor, temperature: Tensor) -> Tensor:
        """Computes the loss (...) and, for ``backward``, the slopes (..., T, B)."""
        inverse_temperature = (1 / temperature)[..., None, None]
        image_lengths = torch.linalg.vector_norm(images, dim=-1, keepdim=True).clamp_min_(_MIN_LENGTH)
        text_lengths = torch.linalg.vector_norm(texts, dim=-1, keepdim=True).clamp_min_(_MIN_LENGTH)
        image_units = images / image_lengths
        scores = (texts @ (image_units * inverse_temperature).transpose(-1, -2)).div_(text_lengths)  # (..., T, B)
        own = image_of_text[:, None].expand(*scores.shape[:-1], 1)
        positive = scores.gather(-1, own)
        row_max = scores.amax(-1, keepdim=True)
        row_exp = (scores - row_max).exp_()
        row_sum = row_exp.sum(-1, keepdim=True)
        text_to_image = row_max + row_sum.log() - positive
        # over captions of other images, for each image; -inf where a batch has none
        scores.scatter_(-1, own, -torch.inf)
        column_max = scores.amax(-2, keepdim=True)
        column_max.masked_fill_(column_max == -torch.inf, 0)
        column_exp = scores.sub_(column_max).exp_()
        column_sum = column_exp.sum(-2, keepdim=True)
        negatives = (column_max + column_sum.log()).expand_as(scores).gather(-1, own)
        normaliser = torch.logaddexp(positive, negatives)
        image_to_text = normaliser - positive
        missed = (negatives - normaliser).exp()  # m
        # a product, since index_add_ on a GPU sums in no fixed order
        belongs = missed.new_zeros(scores.shape[-2:]).scatter_(-1, image_of_text[:, None], 1)
        missed_of_image = missed[..., 0] @ belongs
        tiny = torch.finfo(column_sum.dtype).tiny
        column_exp.mul_((missed_of_image / column_sum[..., 0, :].clamp_min(tiny))[..., None, :])
        slopes = row_exp.mul_(1 / row_sum).add_(column_exp).scatter_add_(-1, own, -1 - missed).div_(text_lengths)
        ctx.save_for_backward(image_units, image_lengths, texts, text_lengths, temperature, slopes)
        return (image_to_text + text_to_image).mean((-2, -1)) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        """Multiplies the slopes by the vectors, and takes off what lies along each vector, since lengths do not count.

        For a unit vector u of a vector of length l, the gradient g by u becomes ``(g - u (u·g)) / l``.
        """
        image_units, image_lengths, texts, text_lengths, temperature, slopes = ctx.saved_tensors
        factor = (gradient / (2 * texts.shape[-2] * temperature))[..., None, None]
        by_images = (slopes.transpose(-1, -2) @ texts).mul_(factor)
        along_images = torch.linalg.vecdot(by_images, image_units).unsqueeze(-1)
        by_images = torch.addcmul(by_images, image_units, along_images, value=-1).div_(image_lengths)
        by_texts = slopes @ (image_units * factor)
        along_texts = torch.linalg.vecdot(by_texts, texts).unsqueeze(-1)
        by_texts.addcmul_(texts, along_texts / text_lengths.square(), value=-1)
        by_temperature = -along_texts.sum((-2, -1)) / temperature
        return by_images, by_texts, None, by_temperature
