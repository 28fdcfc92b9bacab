"""OpenVINO on a processor: the eager network, exported by torch, converted, and compiled.

Each batch is computed in one thread, and as many batches at a time as torch has threads, so that features depend
neither on the number of threads nor on which of them computes. On the processor where it was measured OpenVINO computes
in bfloat16 unless told otherwise: precision and threads are always set.

OpenVINO sends usage data when it is imported and when it converts, and keeps an identity for that in the home folder.
Here it is imported as if its package for that were not installed. A program that has imported it before has chosen for
itself.
"""

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from onceover.base.extras import Extra
from onceover.base.progress import say
from onceover.extract.backends import BackendError, agree, eager
from onceover.extract.encoding.library_errors import reason
from onceover.extract.encoding.networks import ImageNetwork, TextNetwork

_OPENVINO = Extra("openvino", "openvino", "openvino")
_TELEMETRY = "openvino_telemetry"
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def image(
    network: ImageNetwork, sample: Tensor, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The network for images of the sample's size, any number of them in a batch."""
    _check_device(device)
    expected = eager.image(network, sample, device, torch.float32)
    model = _converted(network, {"batch": sample.repeat(2, 1, 1, 1)}, dynamic=[0])
    compute = _compiled(model, torch.float32)
    for batch in (sample, sample.repeat(3, 1, 1, 1)):
        _check_features(compute(batch), expected(batch))
    if dtype == torch.float32:
        return compute
    rounded = _compiled(model, dtype)
    return lambda batch: rounded(batch.float())


def text(
    network: TextNetwork, sample: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[dict[str, Tensor]], Tensor]:
    """The network for any number of captions, and of any length where they have a mask."""
    _check_device(device)
    expected = eager.text(network, sample, device, torch.float32)
    dynamic = [0]
    other = {name: tensor[:1] for name, tensor in sample.items()}
    if "attention_mask" in sample:
        dynamic = [0, 1]
        other = {name: tensor[:, :-1] for name, tensor in other.items()}
    model = _converted(network, sample, dynamic)
    compute = _compiled(model, torch.float32)
    for inputs in (sample, other):
        _check_features(compute(*inputs.values()), expected(inputs))
    if dtype != torch.float32:
        compute = _compiled(model, dtype)
    return lambda inputs: compute(*(inputs[name] for name in sample))


class _Features(nn.Module):
    """A network as a module from its inputs to its features, all layers of them, as torch exports it."""

    def __init__(self, network: ImageNetwork | TextNetwork, names: list[str]):
        super().__init__()
        self.module = network.module  # so that its weights are exported
        self._network = network
        self._names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        """The inputs in the order of their names -> (B, sum of the layers' dimensions)."""
        if isinstance(self._network, ImageNetwork):
            return self._network.features(tensors[0])
        return self._network.features(dict(zip(self._names, tensors, strict=True)))


def _check_device(device: torch.device) -> None:
    """Refuses any device but a processor."""
    if device.type != "cpu":
        raise BackendError(f"OpenVINO is used on a processor alone, and the device is {device}")


def _check_features(features: Tensor, expected: Tensor) -> None:
    """Refuses a converted network whose features of a sample are others than the eager network's."""
    if not agree(features, expected):
        raise BackendError("the converted network gives other features")


def _converted(network: ImageNetwork | TextNetwork, sample: dict[str, Tensor], dynamic: list[int]) -> Any:
    """OpenVINO's model of a network.

    Args:
        sample: its inputs by name, two rows or more of them.
        dynamic: the dimensions of each input whose size may differ from the sample's.

    Raises:
        BackendError: torch cannot export it, or OpenVINO cannot convert it. MissingPackageError: it is not installed.
    """
    with _without_telemetry():
        openvino = _imported()
        if not hasattr(torch.export.Dim, "DYNAMIC"):
            raise BackendError(f"torch {torch.__version__} is too old to export for it; 2.6 or later can")
        say(f"converting the {'image' if isinstance(network, ImageNetwork) else 'text'} encoder, for some seconds")
        try:
            dimensions = dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC)
            shapes = (tuple(dimensions for _ in sample),)
            module = _Features(network, list(sample)).eval()
            with torch.no_grad():
                inputs = tuple(sample.values())
                exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
            return openvino.convert_model(exported)
        except MemoryError:
            raise
        except Exception as error:  # whatever the two libraries raise
            raise BackendError(f"the network cannot be exported ({reason(error)})") from error


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Within, OpenVINO finds no package to send usage data with, and no library's warnings are shown."""
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's way to make an import fail
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        del sys.modules[_TELEMETRY]
        if before is not None:
            sys.modules[_TELEMETRY] = before


def _imported() -> Any:
    """The library OpenVINO.

    Raises:
        MissingPackageError: it is not installed.
    """
    return _OPENVINO.imported("the backend openvino", "choose --backend eager")


@cache
def _core() -> Any:
    """OpenVINO's runtime, one for the life of the process.

    Each lends the thread that first compiles with it a stack for the handlers of signals, and takes it away when it
    ends, even where another one has come after it: the next signal would then end the process.
    """
    with _without_telemetry():
        return _imported().Core()


def _compiled(model: Any, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A model as a function from its inputs, on the processor, to float32 (B, D); called from several threads.

    Raises:
        BackendError: the processor does not compute in this dtype by OpenVINO.
    """
    threads = torch.get_num_threads()
    precision = _PRECISIONS[dtype]
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": threads,
        "ENABLE_CPU_PINNING": False,  # the threads that decode use the same cores
    }
    compiled = _core().compile_model(model, "CPU", options)
    actual = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if actual != precision:
        raise BackendError(f"OpenVINO would compute in {actual} here where {precision} is asked for")
    requests = threading.local()

    def features(*inputs: Tensor) -> Tensor:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        return torch.from_numpy(requests.own.infer(arrays, share_inputs=True)[0])

    return features
