"""Faster ways to compute a float32 model on a processor, by MKL's and oneDNN's products and torch's private operators.

Winograd's filtering, fused residual blocks, and linear layers through oneDNN. Features stay the same but for rounding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onceover.extract.backends import agree
from onceover.extract.encoding.devices import cpu_capabilities

WINOGRAD_CHANNELS = 128  # with fewer, transforming costs what it saves (docs/results.md)
WINOGRAD_WASTE = 1.5  # times an image's size that its tiles may cover
_BLOCK = 256  # tiles at a time, or an image's: what lies between two steps stays in the cache

# F(4x4, 3x3) of Lavin and Gray 2016: transforms of weights, and of tiles of input and output, along an axis
_OF_WEIGHTS = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # to be divided by 24
_OF_INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_OF_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
_BIAS = 7  # of the 36 positions: what is added there is added to all 16 of the output

_RESIDUAL_BLOCKS = ("torchvision.models.resnet.Bottleneck", "torchvision.models.resnet.BasicBlock")
_FUSED = ("_convolution_pointwise", "_convolution_pointwise_")  # torch's own, not public


def optimise(model: nn.Module, forward: Callable[[], Tensor], left_alone: Sequence[str] = ()) -> None:
    """Replaces parts of a float32 model on a processor by faster ones that give the same features but for rounding.

    Where ``forward``, one pass, then gives other features, or some that are not finite, all is left as it was.
    """
    replaced = {module for module in model.modules() if _is_replaced(module)}
    with torch.no_grad():
        expected = forward()
        use_onednn(model)
        use_winograd(model)
        fuse_blocks(model, left_alone)
        if agree(forward(), expected):
            return
    for module in {*model.modules()} - replaced:
        vars(module).pop("forward", None)


def _is_replaced(module: nn.Module) -> bool:
    """Whether a module computes something else than its class says."""
    return "forward" in vars(module)


def mkl_keeps_up() -> bool:
    """Whether torch's products of float32 matrices, which are MKL's, are as fast here as oneDNN's.

    With AVX2, and on Intel's processors: on others with AVX-512 MKL uses half of the width, and reaches less than half
    of the speed. Elsewhere than on x86 there is no MKL.
    """
    if not torch.backends.mkl.is_available():
        return False
    intel = "Intel" in cpu_capabilities().get("cpu_name", "")
    return torch.backends.cpu.get_cpu_capability() == "AVX2" or intel


def use_onednn(model: nn.Module) -> None:
    """Lets the linear layers of a float32 model multiply through oneDNN, where torch's own products are slower.

    Half precision and convolutions go through oneDNN anyway.
    """
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if mkl_keeps_up() or not has_operator:
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.forward = MethodType(_onednn_linear, module)  # type: ignore[method-assign]


def _onednn_linear(layer: nn.Linear, rows: Tensor) -> Tensor:
    """A linear layer's output, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, "none", [], "")


def use_winograd(model: nn.Module) -> None:
    """Lets 3×3 convolutions of a float32 model take a quarter of the multiplications, where that is faster.

    By Winograd's minimal filtering F(4×4, 3×3) (Lavin and Gray 2016): tiles of 6×6 pixels are transformed, multiplied
    with the weights position by position, and transformed to 4×4 pixels of the output. The result is the convolution's
    but for rounding, which is a few times what it was. Transformed weights take four times the memory of theirs. Where
    torch's products of matrices are half as fast as its convolutions, nothing would be won.
    """
    if not mkl_keeps_up():
        return
    of_input = _both_axes(_OF_INPUT).float()
    of_output = _both_axes(_OF_OUTPUT).float()
    for module in model.modules():
        if type(module) is nn.Conv2d and module.weight.dtype == torch.float32 and _winograd_pays(module):
            weights = _transformed_weights(module.weight)
            forward = partial(_winograd, module, weights, of_input, of_output)
            module.forward = forward  # type: ignore[method-assign]


def _winograd_pays(layer: nn.Conv2d) -> bool:
    """Whether a convolution is of the kind that Winograd's filtering computes, with channels enough."""
    shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
    channels = min(layer.in_channels, layer.out_channels)
    return channels >= WINOGRAD_CHANNELS and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _both_axes(matrix: Sequence[Sequence[float]]) -> Tensor:
    """The transform along both axes of one along an axis, (a, b) -> float64 (a·a, b·b)."""
    along = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(along, along)


def _transformed_weights(weight: Tensor) -> Tensor:
    """The weights of a convolution by position of a tile, (O, C, 3, 3) -> (36, C, O)."""
    transformed = _both_axes(_OF_WEIGHTS) / 24**2 @ weight.double().permute(2, 3, 1, 0).reshape(9, -1)
    return transformed.to(weight.dtype).view(36, *weight.shape[1::-1])


def _winograd(layer: nn.Conv2d, weights: Tensor, of_input: Tensor, of_output: Tensor, batch: Tensor) -> Tensor:
    """A 3×3 convolution's output, by Winograd's filtering: (B, C, H, W) -> (B, O, H, W), channels last."""
    count, channels, height, width = batch.shape
    rows = -(-height // 4)
    columns = -(-width // 4)
    if 16 * rows * columns > WINOGRAD_WASTE * height * width:
        return nn.Conv2d.forward(layer, batch)
    padded = F.pad(batch.permute(0, 2, 3, 1), (0, 0, 1, 4 * columns - width + 1, 1, 4 * rows - height + 1))
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(0, 1, 2, 4, 5, 3)  # (B, rows, columns, 6, 6, C)
    output = batch.new_empty(count, rows, 4, columns, 4, layer.out_channels)
    step = max(1, _BLOCK // (rows * columns))
    for block, block_output in zip(tiles.split(step), output.split(step), strict=True):
        count_of_tiles = len(block) * rows * columns
        transformed = torch.bmm(of_input.expand(count_of_tiles, 36, 36), block.reshape(-1, 36, channels))
        products = torch.bmm(transformed.transpose(0, 1), weights)  # (36, T, O)
        if layer.bias is not None:
            products[_BIAS] += layer.bias
        pixels = torch.bmm(of_output.expand(count_of_tiles, 16, 36), products.transpose(0, 1))  # (T, 16, O)
        block_output.copy_(pixels.view(len(block), rows, columns, 4, 4, -1).transpose(2, 3))
    whole = output.view(count, 4 * rows, 4 * columns, -1)[:, :height, :width]
    return whole.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def fuse_blocks(model: nn.Module, left_alone: Sequence[str] = ()) -> None:
    """Lets the convolutions of a ResNet's blocks add and rectify what they put out, instead of passes over memory.

    For torchvision's float32 blocks on a processor, whose BatchNorms are folded. Blocks with a module that is
    ``left_alone``, by name, stay as they are.
    """
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in _FUSED):
        return
    for name, block in model.named_modules():
        kind = f"{type(block).__module__}.{type(block).__name__}"
        is_left_alone = any(layer.startswith(f"{name}.") for layer in left_alone)
        if kind not in _RESIDUAL_BLOCKS or is_left_alone:
            continue
        numbers = [number for number in range(1, 4) if hasattr(block, f"conv{number}")]
        convolutions = [block.get_submodule(f"conv{number}") for number in numbers]
        norms = [block.get_submodule(f"bn{number}") for number in numbers]
        is_folded = all(isinstance(norm, nn.Identity) for norm in norms)
        if is_folded and convolutions[0].weight.dtype == torch.float32:
            block.forward = partial(_residual, block.downsample, convolutions)


def _residual(downsample: nn.Module | None, layers: list[nn.Conv2d], batch: Tensor) -> Tensor:
    """The output of a residual block."""
    shortcut = batch
    if downsample:
        shortcut = downsample(batch)
    for layer in layers[:-1]:
        batch = _rectified(layer, batch)
    return _rectified(layers[-1], batch, shortcut)


def _rectified(layer: nn.Conv2d, batch: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """ReLU of a convolution, or of its sum with ``shortcut``, which is then overwritten. oneDNN's makes 0 of NaN."""
    if _is_replaced(layer):
        output = layer(batch)
        if shortcut is not None:
            output.add_(shortcut)
        return F.relu_(output)
    geometry = layer.weight, layer.bias, [*layer.padding], [*layer.stride], [*layer.dilation], layer.groups
    if shortcut is None:
        return torch.ops.mkldnn._convolution_pointwise(batch, *geometry, "relu", [], "")
    return torch.ops.mkldnn._convolution_pointwise_.binary(shortcut, batch, *geometry, "add", 1.0, "relu", [], "")
