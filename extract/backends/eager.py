"""torch itself, with BatchNorm folded into convolutions, and channels last."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from onceover.extract.backends import agree, plain
from onceover.extract.encoding.networks import ImageNetwork, TextNetwork


def image(
    network: ImageNetwork, sample: Tensor, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The network with BatchNorm folded and its channels last."""
    fold_batch_norms(network.module, lambda: network.own_feature(sample), network.layers)
    return plain.image(network, sample, device, dtype)


def text(
    network: TextNetwork, sample: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[dict[str, Tensor]], Tensor]:
    """The network, which has nothing to fold."""
    return plain.text(network, sample, device, dtype)


def fold_batch_norms(model: nn.Module, forward: Callable[[], Tensor], left_alone: Sequence[str] = ()) -> int:
    """Multiplies each BatchNorm of a model in eval mode into the convolution whose output it takes.

    Which belong together is seen by following one pass, ``forward``, so that it works module by module on models that
    cannot be traced. Where a convolution's output goes elsewhere too, the features would change: then nothing is
    folded. Convolutions that are ``left_alone``, by name, stay as they are.

    Returns:
        How many were folded.
    """
    with torch.no_grad():
        expected, pairs = _followed(model, forward, left_alone)
        convolutions = {convolution for convolution, _ in pairs}
        norms = {norm for _, norm in pairs}
        if len(convolutions) < len(pairs) or len(norms) < len(pairs):
            return 0  # a module stands in two positions
        names = {module: name for name, module in model.named_modules()}
        weights = [(convolution.weight, convolution.bias) for convolution, _ in pairs]
        for convolution, norm in pairs:
            assert norm.running_mean is not None, "a norm in eval mode has statistics"
            assert norm.running_var is not None, "a norm in eval mode has statistics"
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            _replace_module(model, names[norm], nn.Identity().eval())
        if agree(forward(), expected):
            return len(pairs)
        for (convolution, norm), (weight, bias) in zip(pairs, weights, strict=True):
            convolution.weight = weight
            convolution.bias = bias
            _replace_module(model, names[norm], norm)
    return 0


def _replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts another module in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _followed(
    model: nn.Module, forward: Callable[[], Tensor], left_alone: Sequence[str]
) -> tuple[Tensor, list[tuple[nn.Conv2d, nn.BatchNorm2d]]]:
    """The output of one pass, and each BatchNorm in it with the convolution whose output it took."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors are held, so that no identity is given twice
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_convolution(convolution: nn.Conv2d, _inputs: Any, output: Tensor) -> None:
        outputs[id(output)] = (convolution, output)

    def before_norm(norm: nn.BatchNorm2d, inputs: tuple) -> None:
        if id(inputs[0]) in outputs:
            convolution, _ = outputs[id(inputs[0])]
            pairs.append((convolution, norm))

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name and name not in left_alone:
            hooks.append(module.register_forward_hook(after_convolution))
        if isinstance(module, nn.BatchNorm2d) and name:
            hooks.append(module.register_forward_pre_hook(before_norm))
    expected = forward()
    for hook in hooks:
        hook.remove()
    return expected, pairs
