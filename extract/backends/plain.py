"""The model as it was saved, by public torch: nothing is folded or replaced, so that it can be trained and saved."""

from collections.abc import Callable

import torch
from torch import Tensor

from onceover.extract.encoding.networks import ImageNetwork, TextNetwork


def image(
    network: ImageNetwork, sample: Tensor, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The network with its channels last."""
    network.capture(sample)
    network.module.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(batch: Tensor) -> Tensor:
        return network.features(batch.contiguous(memory_format=torch.channels_last))

    return features


def text(
    network: TextNetwork, sample: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[dict[str, Tensor]], Tensor]:
    """The network."""
    network.module.to(device, dtype)
    return network.features
