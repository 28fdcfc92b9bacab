"""The contrastive loss of CLIP, for images with several captions, with its gradient written out.

Its scalar ``log_temperature`` is the logarithm of the divisor of the cosines.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onceover.configs.schema import ModelConfig
from onceover.heads.losses import Scalar, log_temperature

_NO_LENGTH = 1e-12  # what is shorter has no direction


def scalars(config: ModelConfig) -> dict[str, Scalar]:
    """The logarithm of the temperature, learned unless ``model.learn_temperature`` is false."""
    return {"log_temperature": log_temperature(config)}


def shown(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """The temperature."""
    return {"temperature": scalars["log_temperature"].exp()}


def loss(images: Tensor, texts: Tensor, image_of_text: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    """``contrastive_loss`` at the temperature that the scalars give."""
    return contrastive_loss(images, texts, image_of_text, scalars["log_temperature"].exp())


def contrastive_loss(images: Tensor, texts: Tensor, image_of_text: Tensor, temperature: Tensor | float) -> Tensor:
    """Symmetric cross-entropy over in-batch cosines; captions of one image are never each other's negatives.

    With s = cosine(images, texts) / temperature, caption t and its image i give
    ``-log(exp s_it / (exp s_it + sum of exp s_iu over captions u of other images))`` (image to text) and
    ``-log(exp s_it / sum of exp s_jt over images j)`` (text to image); the result is the mean over captions of
    the two's mean. With one caption per image it is the loss of CLIP (Radford et al. 2021), as in ConVIRT
    (Zhang et al. 2020).

    Args:
        images: vectors (..., B, D) of any length, each image once. texts: vectors (..., T, D) of any length. Leading
            dimensions are those of a stack: losses that have nothing to do with each other.
        image_of_text: int64 (T,), the row in ``images`` of each caption's image.
        temperature: divisor of the cosines, a scalar or (...).

    Returns:
        (...).
    """
    temperature = torch.as_tensor(temperature, dtype=images.dtype, device=images.device).expand(images.shape[:-2])
    return _Contrast.apply(images, texts, image_of_text, temperature)


class _Contrast(torch.autograd.Function):
    """The loss and, in place of the similarities, its derivative by them: a dozen passes over (..., T, B) in all.

    Captions, the largest array, are never normalised: what their lengths do is done to similarities and gradients.
    """

    @staticmethod
    def forward(ctx, images, texts, image_of_text, temperature):
        inverse = (1 / temperature)[..., None, None]
        of_image, of_text = (
            torch.linalg.vector_norm(side, dim=-1, keepdim=True).clamp_min_(_NO_LENGTH) for side in (images, texts)
        )
        directions = images / of_image
        scores = (texts @ (directions * inverse).transpose(-1, -2)).div_(of_text)  # (..., T, B)
        own = image_of_text[:, None].expand(*scores.shape[:-1], 1)
        positive = scores.gather(-1, own)
        highest = scores.amax(-1, keepdim=True)
        among_pictures = (scores - highest).exp_()
        total = among_pictures.sum(-1, keepdim=True)
        text_to_image = highest + total.log() - positive
        # over captions of other images, for each image; -inf where a batch has none
        scores.scatter_(-1, own, -torch.inf)
        highest = scores.amax(-2, keepdim=True)
        highest.masked_fill_(highest == -torch.inf, 0)
        among_texts = scores.sub_(highest).exp_()
        rest = among_texts.sum(-2, keepdim=True)
        others = (highest + rest.log()).expand_as(scores).gather(-1, own)
        either = torch.logaddexp(positive, others)
        image_to_text = either - positive
        # derivatives by the scores, twice the number of captions left out
        missed = (others - either).exp()  # 1 - the probability of the image's caption among captions
        # a product, since a card's index_add_ adds up in no fixed order
        belongs = missed.new_zeros(scores.shape[-2:]).scatter_(-1, image_of_text[:, None], 1)
        of_picture = missed[..., 0] @ belongs
        among_texts.mul_((of_picture / rest[..., 0, :].clamp_min(torch.finfo(rest.dtype).tiny))[..., None, :])
        slopes = among_pictures.mul_(1 / total).add_(among_texts).scatter_add_(-1, own, -1 - missed).div_(of_text)
        ctx.save_for_backward(directions, of_image, texts, of_text, temperature, slopes)
        return (image_to_text + text_to_image).mean((-2, -1)) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        directions, of_image, texts, of_text, temperature, slopes = ctx.saved_tensors
        factor = (gradient / (2 * texts.shape[-2] * temperature))[..., None, None]
        by_images = (slopes.transpose(-1, -2) @ texts).mul_(factor)
        along_images = torch.linalg.vecdot(by_images, directions).unsqueeze(-1)
        by_images = torch.addcmul(by_images, directions, along_images, value=-1).div_(of_image)
        by_texts = slopes @ (directions * factor)
        along = torch.linalg.vecdot(by_texts, texts).unsqueeze(-1)
        by_texts.addcmul_(texts, along / of_text.square(), value=-1)
        return by_images, by_texts, None, -along.sum((-2, -1)) / temperature
