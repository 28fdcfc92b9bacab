"""Weights of models: read from files without running code, or drawn from a seed."""

import contextlib
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from onceover.base.files import check_regular
from onceover.base.progress import LOGGER
from onceover.extract.encoders import EncoderError, Spec
from onceover.extract.encoding.library_errors import reason

_KEYS = ("state_dict", "model_state_dict", "model")  # under which programs that train keep weights
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of torch's wrappers and of training frameworks


def read_weights(file: Path, spec: Spec) -> dict[str, Tensor]:
    """The weights in a file by their names, which lie in it bare, or as programs that train put them there.

    Pickles are read with ``weights_only``, which runs no code.

    Raises:
        EncoderError: the file holds none. OSError: it cannot be read.
    """
    weights = _unwrapped(_read(file, spec))
    for prefix in _PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if not weights:
        raise EncoderError(f"{spec.text}: {file} holds no weights by their names; save a model's state_dict()")
    return weights


def _read(file: Path, spec: Spec) -> Any:
    """The content of a file of weights."""
    LOGGER.debug("reading the weights %s", file)
    try:
        check_regular(file)
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on other programs' pickles
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{spec.text}: {file} is damaged, or holds Python objects other than tensors, which are not run; "
            "convert it to safetensors"
        ) from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # torch and safetensors raise many kinds; the user needs the file and the reason
        raise EncoderError(f"{spec.text}: {file} holds no weights ({reason(error)}); name another file") from error


def _unwrapped(content: Any) -> dict[str, Tensor]:
    """The tensors in a file's content by their names."""
    for key in _KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        return {}
    weights = {}
    for name, tensor in content.items():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            weights[name] = tensor
    return weights


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws random weights from ``seed``, and leaves torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
