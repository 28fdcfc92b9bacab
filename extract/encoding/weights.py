"""Weights of models: read from files without running code, or drawn from a seed."""

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from onceover.base.errors import OnceoverError
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


def load_backbone(
    model: nn.Module, file: Path, spec: Spec, is_unused: Callable[[str], bool], architecture: str
) -> None:
    """Loads a file's weights into a classifier without its last layer; the file may hold any other one, or none.

    Args:
        is_unused: whether a weight of this name plays no part in the features, so that it may be there or lack.
        architecture: the model's name, for messages.

    Raises:
        EncoderError: weights of the backbone are missing, of another shape, or too many.
    """
    weights = {name: tensor for name, tensor in read_weights(file, spec).items() if not is_unused(name)}
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights and not is_unused(name)]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # old checkpoints have none
    others = sorted(weights.keys() - expected.keys())
    start = f"{spec.text}: {file}"
    if missing:
        raise EncoderError(
            f"{start} lacks {len(missing)} weights of {architecture} (the first: {missing[0]}); "
            "name the model that it is of"
        )
    if others:
        raise EncoderError(
            f"{start} holds {len(others)} weights that {architecture} has not (the first: {others[0]:.80}); "
            "name the model that it is of"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise EncoderError(
                f"{start}: {name} has the shape {tuple(tensor.shape)}, and that of {architecture} is "
                f"{tuple(expected[name].shape)}; name the model that it is of"
            )
    model.load_state_dict(weights, strict=False)


def _read(file: Path, spec: Spec) -> Any:
    """The content of a file of weights."""
    with reading(file, spec):
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def reading(file: Path, spec: Spec) -> Iterator[None]:
    """Turns what torch and safetensors raise on a file of weights that is read within into errors of one line.

    Raises:
        EncoderError: the file holds none. OSError: it cannot be read.
    """
    LOGGER.debug("reading the weights %s", file)
    try:
        check_regular(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on other programs' pickles
            yield
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{spec.text}: {file} is damaged, or holds Python objects other than tensors, which are not run; "
            "convert it to safetensors"
        ) from error
    except (MemoryError, OSError, OnceoverError):
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
