"""Both towers of open_clip's models: ``open_clip:NAME@WEIGHTS``, or a folder with ``open_clip_config.json``.

WEIGHTS: a tag of open_clip's, a file, or ``random``. The features are the towers' projections, which share a space
where both towers are of one specification.
"""

import contextlib
import difflib
import gzip
import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onceover.base.extras import Extra
from onceover.base.files import MAX_TEXT, read_bytes, write_json
from onceover.extract.encoder_files import known_tokenizer_files
from onceover.extract.encoders import EncoderError, ImageModel, PreprocessSteps, Spec, TextModel
from onceover.extract.encoders._local import local_stamps, spec_with_weights
from onceover.extract.encoders.huggingface import HuggingFaceTokenizer

if TYPE_CHECKING:
    from torch import Tensor

NAME = "open_clip"
FORM = "open_clip:NAME_OR_FOLDER[@WEIGHTS]"
_OPEN_CLIP = Extra("open_clip", "open_clip_torch", "open_clip")
_CONFIG = "open_clip_config.json"
_WEIGHTS = "open_clip_model.safetensors"
_HUB_WEIGHTS = (_WEIGHTS, "open_clip_pytorch_model.bin")
_FOLDER_WEIGHTS = (*_HUB_WEIGHTS, "model.safetensors", "pytorch_model.bin")
_MERGES = "merges.txt"  # the vocabulary of CLIP's own tokenizer, as a file of a tokenizer
_CLIP_MERGES = 49152 - 256 - 2  # lines of it that CLIP uses, after a first one


def parse(text: str) -> Spec:
    """Parses ``open_clip:NAME_OR_FOLDER[@WEIGHTS]``."""
    return spec_with_weights(text, NAME)


def knows(text: str) -> str | None:
    """A folder of open_clip's, or a model by its name; its weights have to be named too, which the library asks for."""
    if Path(text).is_dir():
        return f"{NAME}:{text}" if (Path(text) / _CONFIG).is_file() else None
    name, _, _ = text.partition("@")
    if name not in _model_names():
        return None
    return f"{NAME}:{text}"


def change_stamp(spec: Spec) -> dict[str, Any]:
    """The model, open_clip's version, and the files of its weights, where they lie on this machine."""
    return {"name": spec.name, "open_clip": _OPEN_CLIP.version(spec.text), "files": local_stamps(spec)}


def load_image(spec: Spec, seed: int) -> ImageModel:
    """The model, of which the image tower is used, and the preprocessing of its weights."""
    open_clip = _OPEN_CLIP.imported(spec.text)
    module, architecture = _load_model(open_clip, spec, seed)
    settings = dict(module.visual.preprocess_cfg)
    recipe = {"architecture": architecture, "preprocessing": settings, "pooling": "projection"}
    return ImageModel(module, _steps(open_clip, settings), _image_projection, recipe)


def load_text(
    spec: Spec, seed: int, captions: Sequence[str] | None, tokenizer_files: dict[str, bytes] | None
) -> TextModel:
    """The model, of which the text tower is used, and its tokenizer."""
    open_clip = _OPEN_CLIP.imported(spec.text)
    tokenizer = _load_tokenizer(open_clip, spec, tokenizer_files)
    module, architecture = _load_model(open_clip, spec, seed)
    length = tokenizer.wrapped.context_length
    return TextModel(
        module=module,
        tokenizer=tokenizer,
        states=partial(_text_projection, length, tokenizer.pad_id),
        recipe={"architecture": architecture},
        max_length=length,
        is_projection=True,
        takes_full_length=True,  # as it was trained
        vocabulary=_vocabulary(module),
    )


def save(spec: Spec, kind: str, module: Any, folder: Path) -> str:
    """Writes a folder as open_clip reads it: ``open_clip_config.json`` and the weights of both towers."""
    import safetensors.torch

    from onceover.extract.encoding.library_errors import system_errors

    open_clip = _OPEN_CLIP.imported(spec.text)
    folder.mkdir(parents=True, exist_ok=True)
    with system_errors(folder):
        weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        safetensors.torch.save_file(weights, folder / _WEIGHTS)
    preprocessing = dict(module.visual.preprocess_cfg)
    write_json(folder / _CONFIG, {"model_cfg": _config(open_clip, spec), "preprocess_cfg": preprocessing})
    return f"{NAME}:{folder}"


def write_example(folder: Path) -> dict[str, str]:
    """A model of one layer a tower with random weights, of which the folder holds the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tower = {"width": 32, "layers": 1}
    config = {
        "embed_dim": 24,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {**tower, "context_length": 40, "vocab_size": 49408, "heads": 2},
    }
    write_json(folder / _CONFIG, {"model_cfg": config, "preprocess_cfg": {}})
    return dict.fromkeys(("image", "text"), f"{NAME}:{folder}@random")


class OpenClipTokenizer:
    """A tokenizer of open_clip's, ``wrapped``, as ``encoders.Tokenizer`` wants it."""

    def __init__(self, wrapped: Any, files: dict[str, bytes]):
        self.wrapped = wrapped
        self.files = files
        within = getattr(wrapped, "tokenizer", None)  # transformers', where there is one
        if within is None:
            self.pad_id = 0
            self.frame_ids = [wrapped.sot_token_id, wrapped.eot_token_id]
            self.unknown_id = None  # CLIP's own vocabulary has all bytes
            self.size = wrapped.vocab_size
        else:
            inner = HuggingFaceTokenizer(within, files)
            self.pad_id = inner.pad_id
            self.frame_ids = inner.frame_ids
            self.unknown_id = inner.unknown_id
            self.size = inner.size

    def token_ids(self, captions: list[str], max_length: int | None) -> list[list[int]]:
        """The token ids of captions, cut at ``max_length`` tokens unless it is None."""
        if max_length is None:  # a token is a byte or more
            max_length = 16 + max((len(caption.encode()) for caption in captions), default=0)
        rows = []
        for row in self.wrapped(captions, context_length=max_length).tolist():
            while len(row) > 1 and row[-1] == self.pad_id:
                row.pop()
            rows.append(row)
        return rows


def _model_names() -> set[str]:
    """The models that open_clip has settings of, by the files in its package, which need not be imported for that."""
    module = find_spec(_OPEN_CLIP.module)
    if module is None or module.origin is None:
        return set()
    return {file.stem for file in Path(module.origin).parent.glob("model_configs/*.json")}


def _name_for_library(spec: Spec) -> str:
    """What open_clip calls the model.

    Raises:
        EncoderError: there is no such model, or the folder has no settings of one.
    """
    import open_clip

    if Path(spec.name).is_dir():
        if not (Path(spec.name) / _CONFIG).is_file():
            raise EncoderError(
                f"{spec.text}: the folder has no {_CONFIG}; a CLIP of Hugging Face's is hf:{spec.name}, and a "
                f"checkpoint of open_clip's is {NAME}:NAME@FILE"
            )
        return f"local-dir:{spec.name}"
    known = open_clip.list_models()
    if spec.name not in known:
        near = difflib.get_close_matches(spec.name, known, n=3, cutoff=0.0)
        raise EncoderError(
            f"{spec.text}: open_clip has no model {spec.name!r}, and there is no such folder; near are "
            f"{', '.join(near)}"
        )
    return spec.name


def _config(open_clip: Any, spec: Spec) -> dict[str, Any]:
    """The model's settings, which open_clip has or which lie in the folder.

    Raises:
        EncoderError: they are not to be had, or name code of its own.
    """
    name = _name_for_library(spec)
    try:
        config = dict(open_clip.get_model_config(name))
        text = dict(config["text_cfg"])
        dict(config["vision_cfg"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{spec.text}: {_CONFIG} does not describe a model of open_clip") from error
    if "trust_remote_code" in (text.get("tokenizer_kwargs") or {}):
        raise EncoderError(f"{spec.text}: its tokenizer wants code of its own, which is never run; use another model")
    return config


def _load_model(open_clip: Any, spec: Spec, seed: int) -> tuple[Any, str]:
    """The model in float32, and a digest of its architecture."""
    from onceover.base.files import digest
    from onceover.extract.encoding.hub import offline
    from onceover.extract.encoding.weights import seeded

    config = _config(open_clip, spec)
    _check_text_tower(spec, config["text_cfg"])
    file = _weights_file(open_clip, spec, config)
    with seeded(seed), offline(), _quiet():
        module = open_clip.create_model(
            _name_for_library(spec),
            load_weights=False,
            pretrained_hf=False,
            force_preprocess_cfg=_tag_preprocessing(open_clip, spec),
        )
    if file is not None:
        _load_weights(open_clip, module, file, spec)
    return module, f"open_clip:{type(module).__name__} {digest(config)[:16]}"


def _check_text_tower(spec: Spec, text: dict[str, Any]) -> None:
    """Sees that the settings of a text tower of Hugging Face's are on this machine, and name no code of its own.

    Raises:
        EncoderError: they are not to be had, or name some.
    """
    from onceover.extract.encoding.hub import hub_file

    name = text.get("hf_model_name")
    if not name:
        return
    file = Path(name) / "config.json"
    if not file.is_file():
        instead = "use a model whose text tower is open_clip's own"
        file = hub_file(spec, name, ["config.json"], "the settings of its text tower", instead)
    if "auto_map" in json.loads(read_bytes(file, MAX_TEXT)):
        raise EncoderError(f"{spec.text}: its text tower {name} is code of its own, which is never run")


def _weights_file(open_clip: Any, spec: Spec, config: dict[str, Any]) -> Path | None:
    """The file of the weights, downloaded where it is not here; None for random ones.

    Raises:
        EncoderError: there are no such weights, or they are not to be had.
    """
    from onceover.extract.encoding.hub import hub_file

    if spec.random:
        return None
    if Path(spec.name).is_dir():
        for name in _FOLDER_WEIGHTS:
            if (Path(spec.name) / name).is_file():
                return Path(spec.name) / name
        raise EncoderError(
            f"{spec.text}: the folder holds none of {', '.join(_FOLDER_WEIGHTS)}; write {spec.text}@random"
        )
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    if spec.weights not in tags:
        if Path(spec.weights).is_file():
            return Path(spec.weights)
        fault = "it does not say which weights"
        if spec.weights:
            fault = f"{spec.weights!r} is neither a file nor one of its weights"
        raise EncoderError(f"{spec.text}: {fault}; write {NAME}:{spec.name}@ and one of {', '.join([*tags, 'random'])}")
    settings = open_clip.get_pretrained_cfg(spec.name, spec.weights)
    _check_activation(open_clip, spec, settings, config)
    repository, _, name = settings["hf_hub"].rpartition("/")
    names = [f"{name.rpartition('.')[0]}.safetensors", name] if name else list(_HUB_WEIGHTS)
    instead = f"name a local copy ({NAME}:{spec.name}@FILE) or use {NAME}:{spec.name}@random, untrained"
    return hub_file(spec, repository, names, "the weights", instead)


def _check_activation(open_clip: Any, spec: Spec, settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuses weights that were trained with another activation than the model has, which open_clip warns of alone."""
    if settings.get("quick_gelu", False) == config.get("quick_gelu", False):
        return
    other = spec.name.removesuffix("-quickgelu") if config.get("quick_gelu", False) else f"{spec.name}-quickgelu"
    raise EncoderError(
        f"{spec.text}: these weights were trained with another activation than {spec.name} has, and would give other "
        f"features; write {NAME}:{other}@{spec.weights}"
    )


def _tag_preprocessing(open_clip: Any, spec: Spec) -> dict[str, Any] | None:
    """The preprocessing of a tag's weights; of a file's or random ones that on which all tags of the model agree.

    None where they do not agree, or a folder says it: then it is open_clip's default, or the folder's.
    """
    if Path(spec.name).is_dir():
        return None
    keys = ("mean", "std", "interpolation", "resize_mode")
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    found: list[dict[str, Any]] = []
    for tag in [spec.weights] if spec.weights in tags else tags:
        settings = open_clip.get_pretrained_cfg(spec.name, tag)
        stated = {key: settings[key] for key in keys if settings.get(key) is not None}
        if stated not in found:
            found.append(stated)
    return found[0] if len(found) == 1 else None


def _load_weights(open_clip: Any, module: Any, file: Path, spec: Spec) -> None:
    """Loads a file's weights, which may lie in it as programs that train put them there.

    Raises:
        EncoderError: it holds those of another model, or none.
    """
    from onceover.extract.encoding.library_errors import reason
    from onceover.extract.encoding.weights import reading

    with reading(file, spec), _quiet():
        try:
            open_clip.load_checkpoint(module, str(file), strict=True, weights_only=True)
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            fault = lines[0] if lines else reason(error)
            raise EncoderError(
                f"{spec.text}: {file} holds the weights of another model ({fault:.200}); name the model that it is of"
            ) from error


def _load_tokenizer(open_clip: Any, spec: Spec, files: dict[str, bytes] | None) -> OpenClipTokenizer:
    """The tokenizer: of its files, or open_clip's for the model."""
    text = _config(open_clip, spec)["text_cfg"]
    settings = {"context_length": text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)}
    settings |= text.get("tokenizer_kwargs") or {}
    if text.get("hf_tokenizer_name"):
        settings["tokenizer_mode"] = text.get("tokenizer_mode")
        return _transformers_tokenizer(open_clip, spec, text["hf_tokenizer_name"], settings, files)
    if files is None:
        lines = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).split(b"\n")
        files = {_MERGES: b"\n".join(lines[: 1 + _CLIP_MERGES])}
    files = known_tokenizer_files(files)
    if _MERGES not in files:
        raise EncoderError(f"{spec.text}: the stored tokenizer is not that of the model ({_MERGES} is missing)")
    return OpenClipTokenizer(_clip_tokenizer(open_clip, files[_MERGES], settings), files)


def _clip_tokenizer(open_clip: Any, merges: bytes, settings: dict[str, Any]) -> Any:
    """CLIP's own tokenizer of a vocabulary."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{_MERGES}.gz"
        file.write_bytes(gzip.compress(merges, 1))
        return open_clip.SimpleTokenizer(str(file), **settings)


def _transformers_tokenizer(
    open_clip: Any, spec: Spec, name: str, settings: dict[str, Any], files: dict[str, bytes] | None
) -> OpenClipTokenizer:
    """A tokenizer of transformers as open_clip uses it: of its files, of the folder, or by its name."""
    from onceover.extract.encoding.hub import hub_file
    from onceover.extract.encoding.tokenizer_files import folder_of, saved_files

    make = partial(open_clip.tokenizer.HFTokenizer, trust_remote_code=False, **settings)
    if files is not None:
        with folder_of(files) as folder:
            return OpenClipTokenizer(make(str(folder), local_files_only=True), files)
    if Path(spec.name).is_dir():
        wrapped = make(spec.name, local_files_only=True)
    else:
        instead = "use a model with CLIP's own tokenizer, such as ViT-B-32"
        names = ["tokenizer.json", "tokenizer_config.json", "config.json"]
        hub_file(spec, name, names, "its tokenizer's files", instead)
        try:
            wrapped = make(name, local_files_only=True)
        except (OSError, ValueError):  # transformers' for what is not in the cache; the network has just answered
            wrapped = make(name)
    return OpenClipTokenizer(wrapped, saved_files(wrapped.tokenizer))


def _steps(open_clip: Any, settings: dict[str, Any]) -> PreprocessSteps:
    """The preprocessing that open_clip's settings of it describe."""
    from onceover.extract.encoding.preprocessing import composed_steps

    config = open_clip.transform.PreprocessCfg(**settings)
    height, width = config.input_size[1:]
    cropped = height if height == width and config.resize_mode == "shortest" else 0
    return composed_steps(open_clip.transform.image_transform_v2(config, is_train=False), max(height, width), cropped)


def _vocabulary(module: Any) -> int | None:
    """How many ids the text tower knows; None where it does not say."""
    tower = getattr(module, "text", module)
    return getattr(tower, "vocab_size", None)


def _image_projection(module: Any, batch: "Tensor") -> "Tensor":
    """The image tower's projection, not normalised."""
    return module.encode_image(batch, normalize=False)


def _text_projection(length: int, pad_id: int, module: Any, inputs: dict[str, "Tensor"]) -> dict[str | int, "Tensor"]:
    """The text tower's projection, not normalised; captions are filled up to the length that it was trained with."""
    from torch.nn.functional import pad

    ids = inputs["input_ids"]
    return {"last": module.encode_text(pad(ids, (0, length - ids.shape[1]), value=pad_id), normalize=False)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what open_clip logs at the root from the terminal, and Python from setting up a log of its own for it."""
    nothing = logging.NullHandler()
    logging.root.addHandler(nothing)
    try:
        yield
    finally:
        logging.root.removeHandler(nothing)
