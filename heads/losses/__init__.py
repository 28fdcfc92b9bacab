"""Losses by name, for ``training.loss``: each is one file here, or a module of another package (``onceover.losses``).

A loss is a module, or an object, with what ``Loss`` lists.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from onceover.base.registry import Registry
from onceover.configs.schema import ModelConfig

LOSSES = Registry("onceover.heads.losses", "onceover.losses", "loss")


class Scalar(NamedTuple):
    """A number that a loss may learn beside the heads: where it starts, whether it is learned, and its bounds."""

    start: float
    is_learned: bool
    low: float
    high: float


class Loss(Protocol):
    """What a loss offers."""

    def scalars(self, config: ModelConfig) -> dict[str, Scalar]:
        """The loss's scalars by name. Heads keep them as parameters of these names."""

    def loss(self, images: Tensor, texts: Tensor, image_of_text: Tensor, scalars: dict[str, Tensor]) -> Tensor:
        """The loss of a batch, and of each of a stack of heads at once.

        Args:
            images: vectors (..., B, D) of any length, each image once.
            texts: vectors (..., T, D) of any length.
            image_of_text: int64 (T,), the row in ``images`` of each caption's image.
            scalars: the loss's scalars by name, each (...).

        Returns:
            (...), differentiable by ``images``, ``texts`` and ``scalars``.
        """

    def shown(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """The columns that the scalars get in a fit's history, by name, each (...) like the scalars."""
