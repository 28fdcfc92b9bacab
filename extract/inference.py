"""Makes a frozen model faster on the machine it runs on. Its features stay the same but for rounding. torch, numpy."""

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

ROUNDING = 1e-4  # of the largest feature, what folding may change; in float32 it stays below 1e-5
WINOGRAD_CHANNELS = 128  # with fewer, transforming costs what it saves (docs/results.md)
WINOGRAD_WASTE = 1.5  # times an image's size that its tiles may cover
_BLOCK = 256  # tiles at a time, or an image's: what lies between two steps stays in the cache

# F(4x4, 3x3) of Lavin and Gray 2016: what transforms weights, and tiles of the input and the output, along an axis
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
_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # what processors call it that multiply in bfloat16


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies in bfloat16 itself; elsewhere it is imitated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in _NATIVE_BFLOAT16)


def hardware(device: torch.device) -> str:
    """What computes there: between two of them features differ in the last bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{torch.cpu.get_capabilities().get('cpu_name', '')} {torch.backends.cpu.get_cpu_capability()}".strip()
    return device.type


def fast_dtype(device: torch.device) -> str | None:
    """In what ``device`` encodes faster than in float32, or None.

    float16 on CUDA, where it is as fast as bfloat16 and rounds eight times finer; bfloat16 where a processor has it.
    """
    if device.type == "cuda":
        return "float16"
    return "bfloat16" if native_bfloat16(device) else None


def relative_error(features: np.ndarray, reference: np.ndarray, spread: np.ndarray | None = None) -> float:
    """Root-mean-square difference of two (N, ...) arrays, in units of the spread of the features over the N records.

    A cosine says little, since features of different images can agree to 0.998. The spread is that of ``reference``
    unless a larger sample (N', ...) of such features is given. A single record has no spread: infinite.
    """
    if len(reference if spread is None else spread) < 2:
        return float("inf")
    deviation = float(np.std(reference if spread is None else spread, axis=0, dtype=np.float64).mean())
    error = float(np.sqrt(np.mean(np.square(features.astype(np.float64) - reference))))
    return error / max(deviation, np.finfo(np.float32).tiny)


def neighbour_overlap(features: np.ndarray, reference: np.ndarray, k: int) -> float:
    """Share of each record's ``k`` nearest others, by cosine, that two (N, D) arrays of features have in common."""

    def nearest(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(np.finfo(np.float32).tiny)
        scores = rows @ rows.T
        np.fill_diagonal(scores, -np.inf)
        return np.argsort(-scores, axis=1, kind="stable")[:, :k]

    pairs = zip(nearest(features), nearest(reference), strict=True)
    return float(np.mean([len(np.intersect1d(*pair)) / k for pair in pairs]))


def fold_batch_norms(model: nn.Module, forward: Callable[[], Tensor], asked: Sequence[str] = ()) -> int:
    """Multiplies each BatchNorm of a model in eval mode into the convolution whose output it takes.

    Which belong together is seen by following one pass, ``forward``, so that it works module by module on models that
    cannot be traced. Where a convolution's output goes elsewhere too, the features would change: then nothing is
    folded. Convolutions whose own output is ``asked`` for, by name, stay as they are.

    Returns:
        How many were folded.
    """
    modules = {module: name for name, module in model.named_modules() if name}
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are held, so that no identity is given twice
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def after(convolution, _, output):
        outputs[id(output)] = convolution, output

    def before(norm, inputs):
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], norm))

    convolutions = [module for module, name in modules.items() if isinstance(module, nn.Conv2d) and name not in asked]
    hooks = [module.register_forward_hook(after) for module in convolutions]
    hooks += [module.register_forward_pre_hook(before) for module in modules if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        expected = forward()
        for hook in hooks:
            hook.remove()
        outputs.clear()
        if any(len({*column}) < len(column) for column in zip(*pairs, strict=True)):
            return 0  # a module stands in two places
        weights = [(convolution.weight, convolution.bias) for convolution, _ in pairs]
        for convolution, norm in pairs:
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, *statistics
            )
            model.set_submodule(modules[norm], nn.Identity().eval())
        if _same(forward(), expected):
            return len(pairs)
        for (convolution, norm), before_folding in zip(pairs, weights, strict=True):
            convolution.weight, convolution.bias = before_folding
            model.set_submodule(modules[norm], norm)
    return 0


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether features differ by no more than rounding; those that are not finite never are the same."""
    return bool((found - expected).abs().max() <= ROUNDING * expected.abs().max())


def optimise(model: nn.Module, forward: Callable[[], Tensor], asked: Sequence[str] = ()) -> None:
    """Lets a float32 model on a processor compute in the ways below. Its features stay the same but for rounding.

    Where ``forward``, one pass, would then put out something else, or nothing finite, all is left as it was.
    """
    before = {module for module in model.modules() if _replaced(module)}
    with torch.no_grad():
        expected = forward()
        use_onednn(model)
        use_winograd(model)
        fuse_blocks(model, asked)
        if _same(forward(), expected):
            return
    for module in {*model.modules()} - before:
        vars(module).pop("forward", None)


def _replaced(module: nn.Module) -> bool:
    """Whether something else is computed than its class says."""
    return "forward" in vars(module)


def mkl_keeps_up() -> bool:
    """Whether torch's products of float32 matrices, which are MKL's, are as fast here as oneDNN's.

    With AVX2, and on Intel's processors: on others with AVX-512 MKL uses half of the width, and reaches less than half
    of the speed. Elsewhere than on x86 there is no MKL.
    """
    if not torch.backends.mkl.is_available():
        return False
    intel = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")
    return torch.backends.cpu.get_cpu_capability() == "AVX2" or intel


def use_onednn(model: nn.Module) -> None:
    """Lets the linear layers of a float32 model multiply through oneDNN, where torch's own products are slower.

    Half precision and convolutions go through oneDNN anyway.
    """
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if mkl_keeps_up() or not there:
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.forward = MethodType(_onednn_linear, module)


def _onednn_linear(layer: nn.Linear, rows: Tensor) -> Tensor:
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
    axes = _both_axes(_OF_INPUT).float(), _both_axes(_OF_OUTPUT).float()
    for module in model.modules():
        if type(module) is nn.Conv2d and module.weight.dtype == torch.float32 and _winograd_pays(module):
            module.forward = partial(_winograd, module, _transformed(module.weight), *axes)


def _winograd_pays(layer: nn.Conv2d) -> bool:
    shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
    channels = min(layer.in_channels, layer.out_channels)
    return channels >= WINOGRAD_CHANNELS and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _both_axes(matrix: list[list[float]]) -> Tensor:
    """What transforms along an axis, (a, b) -> along both, float64 (a·a, b·b)."""
    along = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(along, along)


def _transformed(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (36, C, O)."""
    found = _both_axes(_OF_WEIGHTS) / 24**2 @ weight.double().permute(2, 3, 1, 0).reshape(9, -1)
    return found.to(weight.dtype).view(36, *weight.shape[1::-1])


def _winograd(layer: nn.Conv2d, weights: Tensor, into: Tensor, back: Tensor, batch: Tensor) -> Tensor:
    count, channels, height, width = batch.shape
    rows, columns = -(-height // 4), -(-width // 4)
    if 16 * rows * columns > WINOGRAD_WASTE * height * width:
        return nn.Conv2d.forward(layer, batch)
    padded = F.pad(batch.permute(0, 2, 3, 1), (0, 0, 1, 4 * columns - width + 1, 1, 4 * rows - height + 1))
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(0, 1, 2, 4, 5, 3)  # (B, rows, columns, 6, 6, C)
    output = batch.new_empty(count, rows, 4, columns, 4, layer.out_channels)
    step = max(1, _BLOCK // (rows * columns))
    for part, place in zip(tiles.split(step), output.split(step), strict=True):
        there = torch.bmm(into.expand(len(part) * rows * columns, 36, 36), part.reshape(-1, 36, channels))
        products = torch.bmm(there.transpose(0, 1), weights)  # (36, T, O)
        if layer.bias is not None:
            products[_BIAS] += layer.bias
        found = torch.bmm(back.expand(len(there), 16, 36), products.transpose(0, 1))  # (T, 16, O)
        place.copy_(found.view(len(part), rows, columns, 4, 4, -1).transpose(2, 3))
    whole = output.view(count, 4 * rows, 4 * columns, -1)[:, :height, :width]
    return whole.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def fuse_blocks(model: nn.Module, asked: Sequence[str] = ()) -> None:
    """Lets the convolutions of a ResNet's blocks add and rectify what they put out, instead of passes over memory.

    For torchvision's float32 blocks on a processor, whose BatchNorms are folded. Blocks with a module that is ``asked``
    for, by name, stay as they are.
    """
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in _FUSED):
        return
    for name, block in model.named_modules():
        kind = f"{type(block).__module__}.{type(block).__name__}"
        if kind in _RESIDUAL_BLOCKS and not any(each.startswith(f"{name}.") for each in asked):
            numbers = [number for number in range(1, 4) if hasattr(block, f"conv{number}")]
            layers, norms = ([block.get_submodule(f"{each}{number}") for number in numbers] for each in ("conv", "bn"))
            folded = all(isinstance(norm, nn.Identity) for norm in norms)
            if folded and layers[0].weight.dtype == torch.float32:
                block.forward = partial(_residual, block.downsample, layers)


def _residual(downsample: nn.Module | None, layers: list[nn.Conv2d], batch: Tensor) -> Tensor:
    kept = downsample(batch) if downsample else batch
    for layer in layers[:-1]:
        batch = _rectified(layer, batch)
    return _rectified(layers[-1], batch, kept)


def _rectified(layer: nn.Conv2d, batch: Tensor, kept: Tensor | None = None) -> Tensor:
    """ReLU of a convolution, or of its sum with ``kept``, which is then overwritten. oneDNN's makes 0 of NaN."""
    if _replaced(layer):
        found = layer(batch)
        return F.relu_(found if kept is None else found.add_(kept))
    geometry = layer.weight, layer.bias, [*layer.padding], [*layer.stride], [*layer.dilation], layer.groups
    if kept is None:
        return torch.ops.mkldnn._convolution_pointwise(batch, *geometry, "relu", [], "")
    return torch.ops.mkldnn._convolution_pointwise_.binary(kept, batch, *geometry, "add", 1.0, "relu", [], "")
