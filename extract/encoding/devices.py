"""Devices: which one computes, in what dtype it is fast, and batches on their way to it and back."""

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onceover.base.progress import LOGGER, warn
from onceover.base.threads import available_cpus
from onceover.extract.encoders import EncoderError
from onceover.extract.encoding.library_errors import reason

STREAMS = 2  # batches on a GPU at a time: one is copied while the other is computed
_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # capabilities of processors that multiply in bfloat16


def pick_device(name: str | None = None) -> torch.device:
    """The device called ``name``, or the best one at hand: CUDA, Apple's, the processor.

    On CUDA convolutions in float32 are then computed in float32; torch would round what they take to 10 bits (TF32).
    torch then has no more threads than there are processors for it: of itself it does not see a container's quota.

    Raises:
        EncoderError: no such device here.
    """
    if name is None:
        name = _best_device()
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()
    except Exception as error:  # each backend raises its own
        raise EncoderError(f"the device {name!r:.80} cannot be used ({reason(error)}); try --device cpu") from error
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    if torch.get_num_threads() > available_cpus():
        torch.set_num_threads(available_cpus())
    return device


def pick_devices(names: str | None = None) -> list[torch.device]:
    """The devices called ``names``, separated by commas and of one kind, or the best one at hand.

    Raises:
        EncoderError: one is not here, or they are of several kinds.
    """
    devices = [pick_device(name.strip()) for name in names.split(",")] if names else [pick_device()]
    kinds = {device.type for device in devices}
    if len(kinds) > 1:
        raise EncoderError(
            f"the devices {names} are of several kinds, between which features differ; name several of one kind"
        )
    if len({hardware(device) for device in devices}) > 1:
        warn(f"the devices {names} are not alike, and may round the last bits of features differently")
    return devices


def _best_device() -> str:
    """The name of the fastest kind of device that is here."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def hardware(device: torch.device) -> str:
    """The name of a processor or GPU; between two of them features may differ in the last bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{cpu_capabilities().get('cpu_name', '')} {torch.backends.cpu.get_cpu_capability()}".strip()
    return device.type


def log_device(device: torch.device) -> None:
    """Logs at the level DEBUG which device computes, and in how many threads the processor does."""
    LOGGER.debug("device %s: %s; threads of the processor: %d", device, hardware(device), torch.get_num_threads())


def cpu_capabilities() -> dict[str, Any]:
    """The processor's name (``cpu_name``) and capabilities, such as ``avx512_bf16``.

    torch before 2.11 does not tell; Linux does then, and elsewhere nothing is known.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return _linux_capabilities()


def _linux_capabilities() -> dict[str, Any]:
    """The first processor's name and flags as ``/proc/cpuinfo`` has them, under torch's names."""
    capabilities: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                capabilities["cpu_name"] = value.strip()
            elif key.strip() in ("flags", "Features"):
                capabilities |= dict.fromkeys(value.split(), True)
                break
    return capabilities


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies in bfloat16 itself; elsewhere it is imitated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = cpu_capabilities()
    return any(capabilities.get(name) for name in _NATIVE_BFLOAT16)


def fast_dtype(device: torch.device) -> str | None:
    """The dtype in which ``device`` encodes faster than in float32, or None.

    float16 on CUDA, where it is as fast as bfloat16 and rounds eight times finer; bfloat16 where a processor has it.
    """
    if device.type == "cuda":
        return "float16"
    if native_bfloat16(device):
        return "bfloat16"
    return None


def joined(blocks: list[Tensor], device: torch.device) -> Tensor:
    """Blocks of rows, one after the other, where ``device`` copies from the fastest: (n, …) each -> (N, …)."""
    shape = (sum(map(len, blocks)), *blocks[0].shape[1:])
    return torch.cat(blocks, out=torch.empty(shape, dtype=blocks[0].dtype, pin_memory=device.type == "cuda"))


class BatchQueue:
    """A device's batches. On CUDA two are under way at a time, so that one is copied while the other is computed."""

    def __init__(self, device: torch.device):
        self._device = device
        self._streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            self._streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]
        self._turns = itertools.cycle(self._streams)

    def begin(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], np.ndarray]:
        """Begins ``compute`` of ``inputs``, which lie on the processor; the call that is returned waits for the result.

        Elsewhere than on CUDA it is there already.
        """
        if not self._streams:
            return compute(*(tensor.to(self._device) for tensor in inputs)).cpu().numpy
        with torch.cuda.stream(next(self._turns)):
            result = compute(*(tensor.pin_memory().to(self._device, non_blocking=True) for tensor in inputs))
            output = torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result, non_blocking=True)
            done = torch.cuda.current_stream(self._device).record_event()

        def finish() -> np.ndarray:
            done.synchronize()
            return output.numpy()

        return finish
