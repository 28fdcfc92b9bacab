"""Image models of timm, without their last layer: ``timm:NAME[@WEIGHTS]``, or a folder as timm saves it.

WEIGHTS: a tag of timm's (its default one if left out), a file, or ``random``. ``NAME.TAG`` is ``NAME@TAG``; with a
file it says whose preprocessing belongs to it.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from onceover.base.extras import Extra
from onceover.base.files import write_json
from onceover.extract.encoders import EncoderError, ImageModel, PreprocessSteps, Spec, TextModel
from onceover.extract.encoders._local import folder_config, local_stamps, spec_with_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "timm"
FORM = "timm:NAME_OR_FOLDER[@WEIGHTS]"
_TIMM = Extra("timm", "timm", "timm")
_CONFIG = "config.json"
_NAMES = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)?")  # of models, with or without a tag
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder, and on Hugging Face's hub


class _Model(NamedTuple):
    """What builds a model.

    Attributes:
        name: of the architecture.
        pretrained: timm's settings of its weights: the tag of known ones, or those of a folder.
        arguments: of the architecture, beside its name.
    """

    name: str
    pretrained: str | dict[str, Any] | None
    arguments: dict[str, Any]


def parse(text: str) -> Spec:
    """Parses ``timm:NAME_OR_FOLDER[@WEIGHTS]``."""
    return spec_with_weights(text, NAME)


def knows(text: str) -> str | None:
    """A folder of timm's, or a model by its name, whatever its case: ``ResNet50@random`` -> ``…:resnet50@random``."""
    if Path(text).is_dir():
        config = folder_config(Path(text))
        return f"{NAME}:{text}" if "architecture" in config and "model_type" not in config else None
    name, at, weights = text.partition("@")
    name = name.lower()
    if not _NAMES.fullmatch(name) or not _TIMM.is_installed():
        return None
    if not _TIMM.imported(text).is_model(name.partition(".")[0]):
        return None
    return f"{NAME}:{name}{at}{weights}"


def change_stamp(spec: Spec) -> dict[str, Any]:
    """The model, timm's version, and the files of its weights, where they lie on this machine."""
    return {"name": spec.name, "timm": _TIMM.version(spec.text), "files": local_stamps(spec)}


def load_image(spec: Spec, seed: int) -> ImageModel:
    """The model without its last layer, and the preprocessing of its weights."""
    timm = _TIMM.imported(spec.text)
    model = _described(timm, spec)
    if spec.random:
        module = _built(timm, model, seed)
    elif Path(spec.name).is_dir():
        module = _with_weights_of(timm, model, _weights_file(spec), spec)
    elif Path(spec.weights).is_file():
        module = _with_weights_of(timm, model, Path(spec.weights), spec)
    else:
        module = _pretrained(timm, model, spec)
    data = timm.data.resolve_data_config({}, model=module)
    if data["input_size"][0] != 3:
        raise EncoderError(f"{spec.text} takes images of {data['input_size'][0]} channels; name a model of RGB images")
    architecture = f"timm:{model.name}"
    if model.arguments:
        architecture += f" {json.dumps(model.arguments, sort_keys=True)}"
    recipe = {"architecture": architecture, "preprocessing": data, "pooling": "before the classifier"}
    return ImageModel(module, _steps(timm, data), partial(_output, spec), recipe)


def load_text(
    spec: Spec, seed: int, captions: Sequence[str] | None, tokenizer_files: dict[str, bytes] | None
) -> TextModel:
    """Refuses: timm has no text models.

    Raises:
        EncoderError: always.
    """
    raise EncoderError(f"{spec.text!r} is no text encoder; use hf:NAME_OR_FOLDER, st:NAME_OR_FOLDER or open_clip:NAME")


def save(spec: Spec, kind: str, module: Any, folder: Path) -> str:
    """Writes a folder as timm saves it: ``config.json`` and ``model.safetensors``."""
    import safetensors.torch

    from onceover.extract.encoding.library_errors import system_errors

    model = _described(_TIMM.imported(spec.text), spec)
    settings = {key: value for key, value in module.pretrained_cfg.items() if value is not None}
    for key in ("architecture", "file", "source", "state_dict"):
        settings.pop(key, None)
    config = {
        "architecture": model.name,
        "num_classes": 0,
        "model_args": model.arguments,
        "pretrained_cfg": settings | {"num_classes": 0, "custom_load": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with system_errors(folder):
        safetensors.torch.save_model(module, str(folder / _WEIGHTS[0]))
    write_json(folder / _CONFIG, config)
    return f"{NAME}:{folder}"


def write_example(folder: Path) -> dict[str, str]:
    """One of timm's own models for tests with random weights, which needs no file."""
    return {"image": f"{NAME}:test_resnet@random"}


def _described(timm: Any, spec: Spec) -> _Model:
    """The model that a specification names.

    Raises:
        EncoderError: timm has no such model, or no such weights of it, or the folder is none of timm's.
    """
    if Path(spec.name).is_dir():
        return _of_folder(timm, spec)
    name, _, tag = spec.name.partition(".")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0)
        raise EncoderError(f"{spec.text}: timm has no model {name!r}, and there is no such folder; near are "
                           f"{', '.join(near)}")  # fmt: skip
    if not spec.random and not Path(spec.weights).is_file():
        if tag and spec.weights:
            raise EncoderError(f"{spec.text}: {spec.weights!r} is no file; write timm:{name}@TAG, FILE or random")
        tag = tag or spec.weights
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=5, cutoff=0.0)
        raise EncoderError(
            f"{spec.text}: {tag!r} is neither a file nor one of {name}'s weights: {', '.join([*near, 'random'])}"
        )
    return _Model(name, tag or None, {})


def _of_folder(timm: Any, spec: Spec) -> _Model:
    """The model that a folder's ``config.json`` describes.

    Raises:
        EncoderError: it has none, or one of another library.
    """
    file = Path(spec.name) / _CONFIG
    try:
        config = json.loads(file.read_bytes())
        name = config["architecture"]
        settings = dict(config.get("pretrained_cfg") or {})
        arguments = dict(config.get("model_args") or {})
        arguments.pop("num_classes", None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(
            f"{spec.text}: {file} does not describe a model of timm; a model of Hugging Face's is hf:{spec.name}"
        ) from error
    if not timm.is_model(name):
        raise EncoderError(f"{spec.text}: {file} names the model {name!r:.80}, which timm {timm.__version__} has not")
    known = {field.name for field in dataclasses.fields(timm.models.PretrainedCfg)}
    settings = {key: value for key, value in settings.items() if key in known}
    return _Model(name, settings | {"architecture": name}, arguments)


def _weights_file(spec: Spec) -> Path:
    """The file of weights in a folder.

    Raises:
        EncoderError: there is none.
    """
    for name in _WEIGHTS:
        if (Path(spec.name) / name).is_file():
            return Path(spec.name) / name
    raise EncoderError(f"{spec.text}: the folder holds none of {', '.join(_WEIGHTS)}; write {spec.text}@random")


def _built(timm: Any, model: _Model, seed: int, **settings: Any) -> Any:
    """The model without its last layer; ``settings`` say which weights it has, if not random ones."""
    from onceover.extract.encoding.weights import seeded

    arguments = model.arguments | {"num_classes": 0}
    with seeded(seed):
        return timm.create_model(model.name, pretrained_cfg=model.pretrained, **arguments, **settings)


def _with_weights_of(timm: Any, model: _Model, file: Path, spec: Spec) -> Any:
    """The model with the weights of a file, whose last layer may be any, or lack."""
    from onceover.extract.encoding.weights import load_backbone

    module = _built(timm, model, 0)
    names = module.pretrained_cfg.get("classifier") or getattr(timm.get_pretrained_cfg(model.name), "classifier", ())
    classifiers = (names,) if isinstance(names, str) else names or ()

    def is_unused(name: str) -> bool:
        return name.startswith(tuple(f"{classifier}." for classifier in classifiers))

    load_backbone(module, file, spec, is_unused, model.name)
    return module


def _pretrained(timm: Any, model: _Model, spec: Spec) -> Any:
    """The model with weights of timm's, from the cache or downloaded.

    Raises:
        EncoderError: it has none, or they are not to be had.
    """
    from onceover.extract.encoding.hub import hub_file
    from onceover.extract.encoding.weights import read_weights

    instead = f"name a local copy ({NAME}:{model.name}@FILE) or use {NAME}:{model.name}@random, untrained"
    settings = timm.get_pretrained_cfg(model.name, *([model.pretrained] if model.pretrained else []))
    if settings is None or not (settings.hf_hub_id or settings.url):
        raise EncoderError(f"{spec.text}: timm has no weights of {model.name}; {instead}")
    if not settings.hf_hub_id:
        raise EncoderError(f"{spec.text}: the weights are at {settings.url} alone; download them, and {instead}")
    names = [settings.hf_hub_filename] if settings.hf_hub_filename else list(_WEIGHTS)
    names = [*(f"{Path(name).stem}.safetensors" for name in names if not name.endswith(".safetensors")), *names]
    file = hub_file(spec, settings.hf_hub_id, names, "the weights", instead)
    weights = {"state_dict": read_weights(file, spec), "custom_load": False}
    return _built(timm, model, 0, pretrained=True, pretrained_cfg_overlay=weights)


def _steps(timm: Any, data: dict[str, Any]) -> PreprocessSteps:
    """The preprocessing that timm's settings of data describe."""
    from onceover.extract.encoding.preprocessing import composed_steps

    height, width = data["input_size"][1:]
    resized = math.floor(max(height, width) / data["crop_pct"])
    cropped = height if height == width and data["crop_mode"] != "border" else 0
    return composed_steps(timm.data.create_transform(**data, is_training=False), resized, cropped)


def _output(spec: Spec, module: "nn.Module", batch: "Tensor") -> "Tensor":
    """The output of the layer before the classifier, (B, D)."""
    output = module(batch)
    if output.ndim != 2:
        raise EncoderError(f"{spec.text} gives {tuple(output.shape[1:])} numbers per image, not a vector; "
                           "use another model, or a folder with another global_pool")  # fmt: skip
    return output
