"""Models of Hugging Face, by name or in a local folder: ``hf:NAME_OR_FOLDER[#REVISION][@random]``.

They load from safetensors, never with code of their own; local copies come first, the network only where it answers.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onceover.base.errors import first_line
from onceover.base.files import check_regular, digest
from onceover.extract.encoder_files import known_tokenizer_files, without_code
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

NAME = "hf"
FORM = "hf:NAME_OR_FOLDER[#REVISION][@random]"
DISTILBERT = "distilbert-base-uncased"  # whose random weights need no file, and take their vocabulary from the dataset
_CONFIG_NOISE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "id2label",
    "label2id",
}


def parse(text: str) -> Spec:
    """Parses ``hf:NAME_OR_FOLDER[#REVISION][@random]``."""
    name = text.removeprefix(f"{NAME}:")
    weights = ""
    if name.endswith("@random"):
        name = name.removesuffix("@random")
        weights = "random"
    revision = None
    if "#" in name and not Path(name).exists():
        name, _, revision = name.partition("#")
    return Spec(text, NAME, name, weights, revision)


def change_stamp(spec: Spec) -> dict:
    """The files of a local folder; of another model its name and the commit that lies in the cache."""
    folder = Path(spec.name)
    if folder.is_dir():
        return {"files": file_stamps(sorted(path for path in folder.iterdir() if path.is_file()))}
    return {"name": spec.name, "revision": spec.revision, "commit": _cached_commit(spec), "files": []}


def load_image(spec: Spec, seed: int) -> ImageModel:
    """An image model, or the image tower of a dual encoder, with the checkpoint's own image processor."""
    with _quiet_transformers():
        module, architecture = _load_model(spec, seed)
        processor = _image_processor(spec)
        if not hasattr(module, "get_image_features") and module.main_input_name != "pixel_values":
            kind = type(module).__name__
            raise EncoderError(f"{spec.text} is no image encoder ({kind} takes {module.main_input_name})")
        settings, _ = processor.get_image_processor_dict(spec.name, revision=spec.revision, local_files_only=True)
    pooling, pool = _image_pooling(module)
    recipe = {"architecture": architecture, "preprocessing": settings, "pooling": pooling}
    return ImageModel(module, _preprocess_steps(processor), pool, recipe)


def load_text(spec: Spec, seed: int, captions: list[str] | None, tokenizer_files: dict[str, bytes] | None) -> TextModel:
    """A text model, the encoder of one with a decoder, or the text tower of a dual encoder, with its tokenizer."""
    with _quiet_transformers():
        tokenizer = _load_tokenizer(spec, captions, tokenizer_files)
        module, architecture = _load_text_model(spec, seed, len(tokenizer.wrapped))
    config = getattr(module.config, "text_config", module.config)
    limit = tokenizer.wrapped.model_max_length
    is_projection = hasattr(module, "get_text_features")
    return TextModel(
        module=module,
        tokenizer=tokenizer,
        states=_projection if is_projection else _hidden_states,
        words=_word_embeddings,
        recipe={"architecture": architecture},
        max_length=min(limit, getattr(config, "max_position_embeddings", limit)),
        depth=getattr(module.config, "num_hidden_layers", 0),
        is_projection=is_projection,
        # SigLIP takes the last position of captions padded to their full length, unmasked, as it was trained
        takes_full_length=module.config.model_type.startswith("siglip"),
        vocabulary=getattr(config, "vocab_size", None),
    )


def save(spec: Spec, kind: str, module: Any, folder: Path) -> str:
    """Writes the weights as safetensors, and an image model's processor."""
    from onceover.extract.encoding.library_errors import system_errors

    with _quiet_transformers(), system_errors(folder):
        if kind == "image":
            _image_processor(spec).save_pretrained(folder)
        module.save_pretrained(folder)
    return f"{NAME}:{folder}"


def write_example(folder: Path) -> dict[str, str]:
    """A ViT and a BERT of one layer with random weights, of which the folder holds the settings."""
    from transformers import BertConfig, ViTConfig, ViTImageProcessor

    from onceover.extract.encoding.vocabulary import dataset_tokenizer

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    ViTConfig(**sizes, image_size=32, patch_size=16).save_pretrained(folder / "image")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "image")
    tokenizer = dataset_tokenizer(["A red circle .", "On the left there is a blue star ."])
    BertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return {kind: f"{NAME}:{folder / kind}@random" for kind in ("image", "text")}


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer, ``wrapped``, as ``encoders.Tokenizer`` wants it."""

    def __init__(self, wrapped: Any, files: dict[str, bytes]):
        self.wrapped = wrapped
        self.files = files

    @property
    def pad_id(self) -> int:
        """The id that fills up a batch."""
        return self.wrapped.pad_token_id or 0

    @property
    def frame_ids(self) -> list[int]:
        """The ids that stand around each caption and are no words."""
        return [token for token in (self.wrapped.cls_token_id, self.wrapped.sep_token_id) if token is not None]

    @property
    def unknown_id(self) -> int | None:
        """The id of what the vocabulary lacks; None where it has another meaning too, as with CLIP's end of text."""
        tokenizer = self.wrapped
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *self.frame_ids)
        return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id

    @property
    def size(self) -> int:
        """How many ids there are."""
        return len(self.wrapped)

    def token_ids(self, captions: list[str], max_length: int | None) -> list[list[int]]:
        """The token ids of captions, cut at ``max_length`` tokens unless it is None."""
        options: dict = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        if max_length is not None:
            options |= {"truncation": True, "max_length": max_length}
        return self.wrapped(captions, **options)["input_ids"]


def _cached_commit(spec: Spec) -> str | None:
    """The commit of a model in Hugging Face's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(spec.name, "config.json", revision=spec.revision)
    except HFValidationError as error:
        raise EncoderError(f"{spec.text}: there is no such folder, and no model can have that name") from error
    if not isinstance(path, str):
        return None
    return Path(path).parent.name


def _image_processor(spec: Spec) -> Any:
    """The image processor that was saved with a model."""
    from transformers import AutoImageProcessor

    return _from_pretrained(AutoImageProcessor, spec)


def _preprocess_steps(processor: Any) -> PreprocessSteps:
    """The steps of an image processor."""
    resized = 0
    if getattr(processor, "do_resize", True):
        size = dict(processor.size or {})
        resized = max(size.get(name) or 0 for name in ("shortest_edge", "height", "width"))
    cropped = 0
    if getattr(processor, "do_center_crop", False):
        cropped = dict(processor.crop_size or {}).get("height") or 0
    return PreprocessSteps(
        whole=partial(_processed, processor),
        pixels=partial(_processed, processor, do_rescale=False, do_normalize=False),
        levels=partial(_processed, processor, do_resize=False, do_center_crop=False),
        resized=resized,
        cropped=cropped,
    )


def _processed(processor: Any, image: "Image.Image | Tensor", **steps: bool) -> "Tensor":
    """An image after a processor's steps, but for those that are turned off."""
    return processor(images=image, return_tensors="pt", **steps)["pixel_values"][0]


def _image_pooling(module: "nn.Module") -> tuple[str, Callable[[Any, "Tensor"], "Tensor"]]:
    """How an image model's output becomes one vector: its name for the recipe, and the function.

    A checkpoint's own pooler is not used, since many models carry one that was never trained.
    """
    if hasattr(module, "get_image_features"):
        return "projection", _image_projection
    if any(name.endswith("cls_token") for name, _ in module.named_parameters()):
        return "cls token", partial(_mean_or_first, has_first_token=True)
    return "spatial mean", partial(_mean_or_first, has_first_token=False)


def _image_projection(module: Any, batch: "Tensor") -> "Tensor":
    """A dual encoder's image features."""
    return _bare(module.get_image_features(pixel_values=batch))


def _mean_or_first(module: "nn.Module", batch: "Tensor", has_first_token: bool) -> "Tensor":
    """The first token where a model has one for the whole image, else the mean over space or tokens."""
    hidden = module(pixel_values=batch).last_hidden_state
    if hidden.ndim == 4:
        return hidden.mean((2, 3))
    if has_first_token:
        return hidden[:, 0]
    return hidden.mean(1)


def _projection(module: Any, inputs: dict[str, "Tensor"]) -> dict[str | int, "Tensor"]:
    """A dual encoder's text features."""
    return {"last": _bare(module.get_text_features(**inputs))}


def _hidden_states(module: "nn.Module", inputs: dict[str, "Tensor"]) -> dict[str | int, "Tensor"]:
    """The hidden states of a text model by layer."""
    output = module(**inputs, output_hidden_states=True)
    return {"last": output.last_hidden_state, **dict(enumerate(output.hidden_states))}


def _word_embeddings(module: Any, ids: "Tensor") -> "Tensor":
    """The embeddings of tokens, before positions are added."""
    return module.get_input_embeddings()(ids)


def _bare(output: Any) -> "Tensor":
    """A dual encoder's features, which some versions return bare and some within an output object."""
    from torch import Tensor

    if isinstance(output, Tensor):
        return output
    return output.pooler_output


def _load_text_model(spec: Spec, seed: int, vocabulary: int) -> tuple[Any, str]:
    """A text model for a vocabulary of that many tokens, and a digest of its architecture."""
    from transformers import DistilBertConfig

    config = None
    if _is_untrained_distilbert(spec):
        config = DistilBertConfig(vocab_size=vocabulary)
    module, architecture = _load_model(spec, seed, config)
    if hasattr(module, "get_text_features"):
        return module, architecture
    if module.config.is_encoder_decoder:
        module = module.get_encoder()
    if module.main_input_name != "input_ids":
        kind = type(module).__name__
        raise EncoderError(f"{spec.text} is no text encoder ({kind} takes {module.main_input_name})")
    return module, architecture


def _is_untrained_distilbert(spec: Spec) -> bool:
    """Whether the encoder is the default one with random weights."""
    return spec.random and spec.name == DISTILBERT


def _dtype_option() -> str:
    """The name of the option for the dtype to load a model in, which transformers 4.56 renamed."""
    release = tuple(int(part) for part in version("transformers").split(".")[:2])
    if release >= (4, 56):
        return "dtype"
    return "torch_dtype"


def _load_model(spec: Spec, seed: int, config: Any = None) -> tuple[Any, str]:
    """The model in float32, from safetensors and without remote code, and a digest of its architecture."""
    import torch
    from transformers import AutoConfig, AutoModel

    from onceover.extract.encoding.weights import seeded

    if config is None:
        config = _from_pretrained(AutoConfig, spec)
        described, _ = type(config).get_config_dict(spec.name, revision=spec.revision, local_files_only=True)
    else:
        described = config.to_diff_dict()
    if spec.random:
        with seeded(seed):
            module = AutoModel.from_config(config)
    else:
        module, report = _from_pretrained(
            AutoModel, spec, use_safetensors=True, output_loading_info=True, **{_dtype_option(): torch.float32}
        )
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if missing:
            raise EncoderError(
                f"{spec.text}: the checkpoint lacks {len(missing)} weights of {type(module).__name__} "
                f"(the first: {missing[0]}), which would be random; use a complete one"
            )
    settings = {key: value for key, value in described.items() if key not in _CONFIG_NOISE}
    return module, f"{type(module).__name__} {digest(settings)[:16]}"


def _load_tokenizer(spec: Spec, captions: list[str] | None, files: dict[str, bytes] | None) -> HuggingFaceTokenizer:
    """The tokenizer: of its files, of the dataset's captions, or of the model's own folder or name."""
    from transformers import AutoTokenizer

    from onceover.extract.encoding.vocabulary import dataset_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if files is not None:
            files = known_tokenizer_files(files)
            for file, data in files.items():
                (folder / file).write_bytes(data)
            return HuggingFaceTokenizer(_load_local(AutoTokenizer, folder), files)
        if _is_untrained_distilbert(spec):
            if captions is None:
                raise EncoderError(f"{spec.text} takes its vocabulary from a dataset; encode one first")
            tokenizer = dataset_tokenizer(captions)
        else:
            tokenizer = _from_pretrained(AutoTokenizer, spec)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        saved = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        return HuggingFaceTokenizer(tokenizer, known_tokenizer_files(without_code(saved)))


def _from_pretrained(loader: Any, spec: Spec, **options: Any) -> Any:
    """``loader.from_pretrained``: the local folder or cache first, the network only where it answers."""
    if Path(spec.name).exists():
        _check_files(Path(spec.name))
        return _load_local(loader, spec.name, spec.revision, **options)
    try:
        return _load_local(loader, spec.name, spec.revision, **options)
    except (OSError, ValueError):  # transformers' for what is not in the cache
        pass
    try:
        from huggingface_hub import model_info

        model_info(spec.name, revision=spec.revision, timeout=NETWORK_TIMEOUT)
        return loader.from_pretrained(spec.name, revision=spec.revision, trust_remote_code=False, **options)
    except Exception as error:  # whatever the network stack raises, the user needs the same three ways out
        raise EncoderError(
            f"{spec.text}: no such folder, not in the Hugging Face cache, and not to be downloaded "
            f"({type(error).__name__}: {first_line(error)}); "
            f"name a local copy (hf:FOLDER) or, untrained, torchvision:resnet50@random and hf:{DISTILBERT}@random"
        ) from error


def _load_local(loader: Any, path: str | Path, revision: str | None = None, **options: Any) -> Any:
    """``loader.from_pretrained`` of what is on this machine. Code of its own is never run, and never asked for."""
    return loader.from_pretrained(path, revision=revision, trust_remote_code=False, local_files_only=True, **options)


def _check_files(folder: Path) -> None:
    """Refuses a model's folder with a FIFO or a device in it, for which transformers would wait."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if not entry.is_dir():
            check_regular(entry)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars and advice from the terminal while a model loads; failures are raised anyway."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
