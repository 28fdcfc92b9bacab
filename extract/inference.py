"""Makes a frozen model faster on the machine it runs on. Its features stay the same but for rounding. torch, numpy."""

from collections.abc import Callable, Sequence
from types import MethodType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

ROUNDING = 1e-4  # of the largest feature, what folding may change; in float32 it stays below 1e-5


_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # what processors call it that multiply in bfloat16


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies in bfloat16 itself; elsewhere it is imitated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in _NATIVE_BFLOAT16)


def fast_dtype(device: torch.device) -> str | None:
    """In what ``device`` encodes faster than in float32, or None.

    float16 on CUDA, where it is as fast as bfloat16 and rounds eight times finer; bfloat16 where a processor has it.
    """
    if device.type == "cuda":
        return "float16"
    return "bfloat16" if native_bfloat16(device) else None


def relative_error(features: np.ndarray, reference: np.ndarray, spread: np.ndarray | None = None) -> float:
    """Root-mean-square difference of two (N, ...) arrays, in units of the spread of the features over the N records.

    A cosine says little, since features of different pictures can agree to 0.998. The spread is that of ``reference``
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
        if torch.allclose(forward(), expected, rtol=0, atol=ROUNDING * float(expected.abs().max())):
            return len(pairs)
        for (convolution, norm), before_folding in zip(pairs, weights, strict=True):
            convolution.weight, convolution.bias = before_folding
            model.set_submodule(modules[norm], norm)
    return 0


def use_onednn(model: nn.Module) -> None:
    """Lets the linear layers of a float32 model multiply through oneDNN.

    torch multiplies float32 matrices through MKL, which reaches less than half of a processor that is not Intel's; its
    half precision and its convolutions go through oneDNN anyway.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and not module.weight.is_cuda:
            module.forward = MethodType(_onednn_linear, module)


def _onednn_linear(layer: nn.Linear, rows: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, "none", [], "")
