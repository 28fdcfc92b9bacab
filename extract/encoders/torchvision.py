"""Image classifiers of torchvision, without their last layer: ``torchvision:NAME[@WEIGHTS]``.

WEIGHTS: a name of torchvision's (``IMAGENET1K_V1`` if left out), a file, or ``random``.
"""

import contextlib
import difflib
import os
import socket
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from onceover.base.files import check_regular
from onceover.base.progress import LOGGER
from onceover.extract.encoders import (
    NETWORK_TIMEOUT,
    EncoderError,
    ImageModel,
    PreprocessSteps,
    Spec,
    TextModel,
    file_stamps,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

NAME = "torchvision"
FORM = "torchvision:NAME[@WEIGHTS]"
DEFAULT_WEIGHTS = "IMAGENET1K_V1"


def parse(text: str) -> Spec:
    """Parses ``torchvision:NAME[@WEIGHTS]``."""
    name, _, weights = text.removeprefix(f"{NAME}:").partition("@")
    return Spec(text, NAME, name, weights or DEFAULT_WEIGHTS)


def knows(text: str) -> str | None:
    """The classifier of that name, whatever its case and hyphens: ``ResNet-50@random`` -> ``…:resnet50@random``."""
    if Path(text).exists():
        return None
    name, at, weights = text.partition("@")
    near = _nearest(name, cutoff=1)
    if near is None:
        return None
    return f"{NAME}:{near}{at}{weights}"


def change_stamp(spec: Spec) -> dict:
    """The model, torchvision's version, and the file of the weights, where they lie in one."""
    files = [path for path in [Path(spec.weights)] if path.is_file()]
    return {"name": spec.name, "torchvision": version("torchvision"), "files": file_stamps(files)}


def load_image(spec: Spec, seed: int) -> ImageModel:
    """The classifier without its last layer, and the preprocessing of its weights."""
    from onceover.extract.encoding.weights import load_backbone

    weights_enum = _weights_of(spec)
    names = list(weights_enum.__members__)
    if spec.weights not in names and not spec.random and not Path(spec.weights).is_file():
        raise EncoderError(
            f"{spec.text}: {spec.weights!r} is neither a file nor one of {spec.name}'s weights: "
            f"{', '.join(names)}, random"
        )
    entry = weights_enum[_base_weights(spec, names)]
    if spec.weights in names:
        model = _pretrained(spec, entry)
        _drop_classifier(model)
    else:
        model = _random_model(spec, seed)
        classifier = _drop_classifier(model)
        if not spec.random:
            load_backbone(model, Path(spec.weights), spec, partial(_is_unused, classifier), spec.name)
    transforms = entry.transforms()
    recipe = {
        "architecture": f"torchvision:{spec.name}",
        "preprocessing": str(transforms),
        "pooling": "before the classifier",
    }
    steps = PreprocessSteps(
        whole=transforms,
        pixels=partial(_pixels, transforms),
        levels=partial(_levels, transforms),
        resized=transforms.resize_size[0],
        cropped=transforms.crop_size[0],
    )
    return ImageModel(model, steps, _output, recipe)


def load_text(
    spec: Spec, seed: int, captions: Sequence[str] | None, tokenizer_files: dict[str, bytes] | None
) -> TextModel:
    """Refuses: torchvision has no text models.

    Raises:
        EncoderError: always.
    """
    raise EncoderError(f"{spec.text!r} is no text encoder; use hf:NAME_OR_FOLDER")


def save(spec: Spec, kind: str, module: "nn.Module", folder: Path) -> str:
    """Writes ``weights.safetensors``, a complete state dict, whose classifier has random weights."""
    import safetensors.torch
    from torchvision import models

    from onceover.extract.encoding.library_errors import system_errors

    complete = _random_model(spec, 0)
    complete.load_state_dict(module.state_dict(), strict=False)
    base = _base_weights(spec, list(models.get_model_weights(spec.name).__members__))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "weights.safetensors"
    with system_errors(folder):
        safetensors.torch.save_model(complete, str(file), {"base": base})
    return f"{NAME}:{spec.name}@{file}"


def write_example(folder: Path) -> dict[str, str]:
    """The smallest of torchvision's models with random weights, which needs no file."""
    return {"image": f"{NAME}:shufflenet_v2_x0_5@random"}


def _weights_of(spec: Spec) -> Any:
    """The enumeration of a classifier's pretrained weights.

    Raises:
        EncoderError: torchvision has no such classifier.
    """
    from torchvision import models

    try:
        weights_enum = models.get_model_weights(spec.name)
        if not hasattr(models, spec.name):
            raise ValueError("not a classifier")
    except ValueError as error:
        near = _nearest(spec.name, cutoff=0.8)
        hint = f"; did you mean {NAME}:{near}?" if near else " (resnet50 and vit_b_16 are two)"
        raise EncoderError(f"{spec.text}: torchvision has no classifier {spec.name!r}{hint}") from error
    return weights_enum


def _nearest(name: str, cutoff: float) -> str | None:
    """The classifier whose name is the most like ``name``; case, hyphens and underscores do not count.

    Args:
        cutoff: how like it has to be, 0 to 1 (``difflib``).
    """
    from torchvision import models

    classifiers = {_letters(known): known for known in models.list_models() if hasattr(models, known)}
    near = difflib.get_close_matches(_letters(name), classifiers, n=1, cutoff=cutoff)
    return classifiers[near[0]] if near else None


def _letters(name: str) -> str:
    """A name without case, hyphens and underscores."""
    return name.lower().replace("-", "").replace("_", "")


def _base_weights(spec: Spec, names: list[str]) -> str:
    """The name of the weights whose preprocessing belongs to ``spec``; a file that ``save`` wrote states it."""
    if spec.weights in names:
        return spec.weights
    return _stated_base(Path(spec.weights), names) or names[0]


def _stated_base(file: Path, names: list[str]) -> str | None:
    """The one of ``names`` that a safetensors file states as its base, if it does."""
    import safetensors

    if file.suffix != ".safetensors" or not file.is_file():
        return None
    with contextlib.suppress(safetensors.SafetensorError), safetensors.safe_open(file, "pt") as opened:
        stated = (opened.metadata() or {}).get("base")
        if stated in names:
            return stated
    return None


def _random_model(spec: Spec, seed: int) -> "nn.Module":
    """The classifier with seeded random weights."""
    from torchvision import models

    from onceover.extract.encoding.weights import seeded

    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GoogLeNet and Inception announce their slow initialisation
        return models.get_model(spec.name, weights=None)


def _pretrained(spec: Spec, entry: Any) -> "nn.Module":
    """The classifier with torchvision's weights, from its cache or downloaded.

    Raises:
        EncoderError: not to be had, or the cached file is damaged.
    """
    import torch
    from torchvision import models

    from onceover.extract.encoding.library_errors import reason

    cached = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    check_regular(cached)
    LOGGER.debug("%s the weights %s", "reading" if cached.exists() else "downloading", cached)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        # the builders read their checkpoint as a pickle that may run code, unless torch is told otherwise
        with patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            return models.get_model(spec.name, weights=entry)
    except OSError as error:
        raise EncoderError(
            f"{spec.text}: the weights are not at {cached} and {entry.url} could not be downloaded ({error}); "
            f"put the file there, name a local one (torchvision:{spec.name}@FILE), or use "
            f"torchvision:{spec.name}@random, untrained"
        ) from error
    except Exception as error:  # torch raises many kinds on a damaged archive
        raise EncoderError(f"{spec.text}: {cached} is damaged ({reason(error)}); remove it and try again") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _drop_classifier(model: "nn.Module") -> str:
    """Replaces the last layer with weights, the classifier of every torchvision model, by an identity.

    Returns:
        The classifier's name.
    """
    from torch import nn

    name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return name


def _is_unused(classifier: str, name: str) -> bool:
    """Whether a weight plays no part in the features: the classifier's, and those of classifiers for training alone."""
    return name.startswith((f"{classifier}.", "aux", "AuxLogits."))


def _output(module: "nn.Module", batch: "Tensor") -> "Tensor":
    """The output of the layer before the classifier, (B, D)."""
    return module(batch)


def _pixels(transforms: Any, image: "Image.Image") -> "Tensor":
    """The first steps of torchvision's ImageClassification, up to pixels of 8 bits."""
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    resized = resize(image, transforms.resize_size, transforms.interpolation, antialias=transforms.antialias)
    return pil_to_tensor(center_crop(resized, transforms.crop_size))


def _levels(transforms: Any, levels: "Tensor") -> "Tensor":
    """The last steps of torchvision's ImageClassification, from pixels of 8 bits on."""
    from torchvision.transforms.functional import convert_image_dtype, normalize

    return normalize(convert_image_dtype(levels), transforms.mean, transforms.std)
