"""Backends: ways to compute a loaded model's features, each one file here, or a module of another package.

Another package adds a backend by an entry point of the group ``onceover.backends``. A backend is a module, or an
object, with what ``Backend`` lists. Features of any two agree but for rounding, which is why a fingerprint does not
cover the backend.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from onceover.base.registry import Registry
from onceover.extract.encoding.networks import ImageNetwork, TextNetwork

BACKENDS = Registry("onceover.extract.backends", "onceover.backends", "backend")
ROUNDING = 1e-4  # of the largest feature, what another way to compute may change; in float32 it stays below 1e-5


class Backend(Protocol):
    """A way to compute a loaded model's features."""

    def image(
        self, network: ImageNetwork, sample: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor]:
        """Readies an image network, in eval mode and float32 on the processor, to compute on a device in a dtype.

        Args:
            network: it may be changed, and has to be told to ``capture`` its layers once its modules are as they stay.
            sample: an image as it takes it, float32 (1, 3, H, W) on the processor.

        Returns:
            The function from (B, 3, H, W) of ``dtype`` on ``device`` to features (B, D); called from several threads.
        """

    def text(
        self, network: TextNetwork, device: torch.device, dtype: torch.dtype
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        """Readies a text network, as ``image`` does.

        Returns:
            The function from ``input_ids`` and ``attention_mask``, int64 (B, L) on ``device``, to features (B, D).
        """


def agree(features: Tensor, expected: Tensor) -> bool:
    """Whether features differ by no more than rounding; those that are not finite never agree."""
    return bool((features - expected).abs().max() <= ROUNDING * expected.abs().max())
