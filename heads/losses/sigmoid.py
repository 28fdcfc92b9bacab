"""The sigmoid loss of SigLIP (Zhai et al. 2023): classifies each pair of an image and a caption as matching or not.

Its scalars are ``log_temperature``, the logarithm of the temperature that cosines are divided by, and ``bias``, which
is added to them and starts low, since nearly all pairs of a batch do not match.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from onceover.configs.schema import ModelConfig
from onceover.heads.losses import Scalar, log_temperature

BIAS = -10.0  # as in the paper


def scalars(config: ModelConfig) -> dict[str, Scalar]:
    """The logarithm of the temperature, learned unless ``model.learn_temperature`` is false, and the learned bias."""
    return {"log_temperature": log_temperature(config), "bias": Scalar(BIAS, True, -math.inf, math.inf)}


def shown(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """The temperature and the bias."""
    return {"temperature": scalars["log_temperature"].exp(), "bias": scalars["bias"]}


def loss(images: Tensor, texts: Tensor, image_of_text: Tensor, scalars: dict[str, Tensor]) -> Tensor:
    """Computes the mean over captions of ``-log sigmoid`` of each signed logit, summed over the images of the batch.

    The logit of a caption and an image is their cosine, divided by the temperature, plus the bias; its sign is changed
    where they do not match.

    Args:
        images: vectors (..., B, D) of any length, each image once.
        texts: vectors (..., T, D) of any length.
        image_of_text: int64 (T,), the row in ``images`` of each caption's image.
        scalars: ``log_temperature`` and ``bias``, each (...).

    Returns:
        The losses, (...).
    """
    temperature = scalars["log_temperature"].exp()[..., None, None]
    cosines = F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).transpose(-1, -2)
    logits = cosines / temperature + scalars["bias"][..., None, None]
    is_match = image_of_text[:, None] == torch.arange(images.shape[-2], device=images.device)
    signed = torch.where(is_match, logits, -logits)
    return -F.logsigmoid(signed).sum(-1).mean(-1)
