"""Losses by name, for ``training.loss``: each is one file here, or a module of another package (``onceover.losses``).

A loss is a module, or an object, with the functions of ``Loss``.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from onceover.base.registry import Registry
from onceover.configs.schema import ModelConfig

LOSSES = Registry("onceover.heads.losses", "onceover.losses", "loss")
MIN_TEMPERATURE = 0.01  # of a learned temperature; CLIP's own bound: a logit scale of at most 100
MAX_TEMPERATURE = 1.0


class Scalar(NamedTuple):
    """A number that a loss may learn beside the heads: where it starts, whether it is learned, and its bounds."""

    start: float
    is_learned: bool
    low: float
    high: float


def log_temperature(config: ModelConfig) -> Scalar:
    """The logarithm of the temperature, learned unless ``model.learn_temperature`` is false."""
    start = float(torch.tensor(config.temperature, device="cpu").log())
    return Scalar(start, config.learn_temperature, math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))


class Loss(Protocol):
    """The functions of a loss."""

    def scalars(self, config: ModelConfig) -> dict[str, Scalar]:
        """The loss's scalars by name. Heads keep them as parameters of these names."""

    def loss(self, images: Tensor, texts: Tensor, image_of_text: Tensor, scalars: dict[str, Tensor]) -> Tensor:
        """Computes the loss of a batch, for each of a stack of heads at once.

        Args:
            images: vectors (..., B, D) of any length, each image once.
            texts: vectors (..., T, D) of any length.
            image_of_text: int64 (T,), the row in ``images`` of each caption's image.
            scalars: the loss's scalars by name, each (...).

        Returns:
            The losses, (...), differentiable by ``images``, ``texts`` and ``scalars``.
        """

    def shown(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """The columns that the scalars get in a fit's history, by name, each (...) like the scalars."""
