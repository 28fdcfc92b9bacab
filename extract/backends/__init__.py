"""Backends: ways to compute a loaded model's features, each one file here, or a module of another package.

Another package adds a backend by an entry point of the group ``onceover.backends``. A backend is a module, or an
object, with what ``Backend`` lists. Features of any two agree but for rounding, which is why a fingerprint does not
cover the backend.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from onceover.base.errors import OnceoverError
from onceover.base.progress import LOGGER, say
from onceover.base.registry import Registry
from onceover.extract.encoding.networks import ImageNetwork, TextNetwork

BACKENDS = Registry("onceover.extract.backends", "onceover.backends", "backend")
AUTO = "auto"
EAGER = "eager"
OPENVINO = "openvino"
CONVERSION_PAYS = {"image": 200, "text": 1000}  # rows that are to be encoded; with fewer, converting takes longer
ROUNDING = 1e-4  # of the largest feature, what another way to compute may change; in float32 it stays below 1e-5


class BackendError(OnceoverError):
    """A network, device or dtype that a backend cannot compute; the backend ``eager`` can."""


class Backend(Protocol):
    """A way to compute a loaded model's features. What it cannot compute it refuses with a ``BackendError``."""

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
        self, network: TextNetwork, sample: dict[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        """Readies a text network, as ``image`` does.

        Args:
            sample: two captions as it takes them: ``input_ids`` and, unless it takes all captions at one length,
                ``attention_mask``, int64 (2, L) on the processor.

        Returns:
            The function from such inputs, (B, L) on ``device``, to float32 features (B, D).
        """


def backend_for(name: str, kind: str, rows: int, engine_name: str, device: torch.device) -> str:
    """The name of the backend that encodes so many rows of a kind; ``auto`` takes OpenVINO where that is faster.

    That is where it is installed, on an x86 processor with AVX2 or AVX-512, under the engine ``threads``, which
    computes each batch in one thread, if converting, 2 to 3 s, pays. Measured on an EPYC with AVX-512: ResNet50 took
    0.94 of the time of ``eager``, DistilBERT 0.46; held to AVX2, ResNet50 0.83 (docs/results.md). On other processors
    nothing was measured. It is a rule, and no timing, so that the same command chooses alike again.
    """
    if name != AUTO:
        return name
    is_cpu_engine = device.type == "cpu" and engine_name == "threads"
    if not is_cpu_engine or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        reason = f"not measured on {device} with {engine_name}"
    elif rows < CONVERSION_PAYS[kind]:
        reason = f"{rows:,} rows are too few for it to pay"
    elif find_spec(OPENVINO) is None:
        reason = "it is not installed"
    else:
        return OPENVINO
    LOGGER.debug("the %s encoder is not converted for OpenVINO: %s", kind, reason)
    return EAGER


def readied(name: str, ready: Callable[[Backend], Callable[[Any], Tensor]]) -> tuple[str, Callable[[Any], Tensor]]:
    """The name of a backend with the function that it gives; those of ``eager`` where it refuses, which is told.

    Args:
        ready: calls ``image`` or ``text`` of a backend.

    Raises:
        RegistryError: there is no such backend.
    """
    try:
        return name, ready(BACKENDS.load(name))
    except BackendError as error:
        say(f"the backend {name} is not used, but {EAGER}: {error}")
        return EAGER, ready(BACKENDS.load(EAGER))


def agree(features: Tensor, expected: Tensor) -> bool:
    """Whether features differ by no more than rounding; those that are not finite never agree."""
    return bool((features - expected).abs().max() <= ROUNDING * expected.abs().max())
