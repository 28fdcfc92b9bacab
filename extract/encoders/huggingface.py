"""Models of Hugging Face, by name or in a local folder: ``hf:NAME_OR_FOLDER[#REVISION][@random]``.

They load from safetensors, never with code of their own; local copies come first, the network only where it answers.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onceover.base.files import check_regular, digest
from onceover.extract.encoder_files import known_tokenizer_files
from onceover.extract.encoders import EncoderError, ImageModel, PreprocessSteps, Spec, TextModel, file_stamps
from onceover.extract.encoders._local import folder_config
from onceover.extract.encoders._sentence_folder import MODULES, SMALL_FILES, check_mean_pooled, is_sentence_folder
from onceover.extract.encoding.quiet import quiet_transformers

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

NAME = "hf"
FORM = "hf:NAME_OR_FOLDER[#REVISION][@random]"
DISTILBERT = "distilbert-base-uncased"  # whose random weights need no file, and take their vocabulary from the dataset
#: ends of the names of classes that AutoModel does not know, or would load without their projection or with a decoder
_OWN_CLASSES = ("WithProjection", "EncoderModel", "TextModel", "VisionModel", "ImageModel")
_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")  # ends of the names of a class token's parameter
_TRAINED_POOLERS = ("vision_model", "timm_wrapper")  # ends of model types whose pooled output is their feature
_FIRST_TOKEN = ("flava",)  # dual encoders that project all tokens and are trained to compare the first ones
_FIRST_TOKEN_TEXTS = (  # text towers of dual encoders that are trained to compare the first tokens
    "align_text_model",
    "blip_text_model",
    "chinese_clip_text_model",
    "flava_text_model",
)
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")  # names of tables of positions
_HUB = "https://huggingface.co/"
_OF_SENTENCE_TRANSFORMERS = "sentence-transformers/"  # the owner of models with a pooling of their own, which st: keeps
_NAMES_WITHOUT_OWNER = re.compile(  # the models of the hub that have no owner
    r"(albert|bert|camembert|ctrl|distilbert|distilgpt2|distilroberta|gpt2|roberta|t5|xlm|xlnet)(-[a-z0-9-]+)?"
)
_SAMPLE_TOKENS = 8  # of the texts by which a causal model is known
_SAME = 1e-5  # of the largest number, by which hidden states may differ and be the same but for rounding
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


def knows(text: str) -> str | None:
    """A model's folder, ``OWNER/NAME``, the address of a model's page, or one of the old names without an owner."""
    if Path(text).is_dir():
        return f"{NAME}:{text}" if _is_model_folder(Path(text)) else None
    name = text.removeprefix(_HUB)
    bare = re.sub("[@#].*", "", name)
    if _NAMES_WITHOUT_OWNER.fullmatch(bare.lower()):
        return f"{NAME}:{bare.lower()}{name.removeprefix(bare)}"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", bare) and not bare.startswith(_OF_SENTENCE_TRANSFORMERS):
        return f"{NAME}:{name}"
    return None


def change_stamp(spec: Spec) -> dict:
    """The files of a local folder; of another model its name and the commit that lies in the cache."""
    folder = Path(spec.name)
    if folder.is_dir():
        return {"files": file_stamps(sorted(path for path in folder.iterdir() if path.is_file()))}
    return {"name": spec.name, "revision": spec.revision, "commit": _cached_commit(spec), "files": []}


def load_image(spec: Spec, seed: int) -> ImageModel:
    """An image model, or the image tower of a dual encoder, with the checkpoint's own image processor."""
    with quiet_transformers():
        module, architecture = _load_model(spec, seed)
        processor = _image_processor(spec)
        if not hasattr(module, "get_image_features") and module.main_input_name != "pixel_values":
            kind = type(module).__name__
            raise EncoderError(f"{spec.text} is no image encoder ({kind} takes {module.main_input_name})")
        settings = _preprocessing_settings(processor, spec)
    steps = _preprocess_steps(processor, spec)
    pooling, pool = _image_pooling(module.eval(), steps)
    recipe = {"architecture": architecture, "preprocessing": settings, "pooling": pooling}
    return ImageModel(module, steps, partial(_vectors, spec, "image", pool), recipe)


def load_text(
    spec: Spec, seed: int, captions: Sequence[str] | None, tokenizer_files: dict[str, bytes] | None
) -> TextModel:
    """A text model, the encoder of one with a decoder, or the text tower of a dual encoder, with its tokenizer."""
    is_new = tokenizer_files is None and not spec.random  # features that are stored already stay as they are
    if is_new:
        check_mean_pooled(Path(spec.name), spec)
    with quiet_transformers():
        tokenizer = _load_tokenizer(spec, captions, tokenizer_files)
        module, architecture = _load_text_model(spec, seed, len(tokenizer.wrapped))
    if is_new:
        check_mean_pooled(_cached_folder(spec), spec)
    project = _text_projection(module)
    is_causal = project is None and _is_causal(module.eval())
    pooling = "last" if is_causal else "mean"
    if module.config.model_type in _FIRST_TOKEN_TEXTS:
        pooling = "cls"
    return TextModel(
        module=module,
        tokenizer=tokenizer,
        states=_hidden_states if project is None else partial(_projection, partial(_vectors, spec, "caption", project)),
        words=_word_embeddings,
        recipe={"architecture": architecture},
        max_length=most_tokens(module, tokenizer.wrapped.model_max_length),
        depth=getattr(module.config, "num_hidden_layers", 0),
        is_projection=project is not None,
        # SigLIP takes the last position of captions padded to their full length, unmasked, as it was trained
        takes_full_length=module.config.model_type.startswith("siglip"),
        pooling=pooling,
        is_causal=is_causal,
        vocabulary=getattr(getattr(module.config, "text_config", module.config), "vocab_size", None),
    )


def save(spec: Spec, kind: str, module: Any, folder: Path) -> str:
    """Writes the weights as safetensors, and an image model's processor."""
    from onceover.extract.encoding.library_errors import system_errors

    with quiet_transformers(), system_errors(folder):
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
        # GPT-2's kind gives an empty caption no token
        return [ids or [self.pad_id] for ids in self.wrapped(captions, **options)["input_ids"]]


def _is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model of transformers' and none of another library, which may have such files too."""
    if is_sentence_folder(folder) or (folder / "open_clip_config.json").is_file():
        return False
    return "model_type" in folder_config(folder)


def _cached_commit(spec: Spec) -> str | None:
    """The commit of a model in Hugging Face's cache."""
    from onceover.extract.encoding.hub import cached_file

    path = cached_file(spec, spec.name, "config.json")
    return path.parent.name if path is not None else None


def _cached_folder(spec: Spec) -> Path:
    """The folder of a model in Hugging Face's cache, as far as sentence-transformers' files lie there."""
    from onceover.extract.encoding.hub import cached_file

    if Path(spec.name).exists():
        return Path(spec.name)
    modules = cached_file(spec, spec.name, MODULES)
    return modules.parent if modules is not None else Path(spec.name)


def _image_processor(spec: Spec) -> Any:
    """The image processor that was saved with a model."""
    from transformers import AutoImageProcessor

    return _from_pretrained(AutoImageProcessor, spec)


def _preprocessing_settings(processor: Any, spec: Spec) -> dict[str, Any]:
    """The settings of an image processor; timm's stand among others in the model's own file."""
    if hasattr(processor, "data_config"):
        return dict(processor.data_config)
    settings, _ = processor.get_image_processor_dict(spec.name, revision=spec.revision, local_files_only=True)
    return settings


def _preprocess_steps(processor: Any, spec: Spec) -> PreprocessSteps:
    """The steps of an image processor that makes images of one size.

    Raises:
        EncoderError: it makes anything else.
    """
    from onceover.extract.encoding.shown import resized_and_cropped

    _check_sizes(processor, spec)
    whole = partial(_processed, processor)
    resized, cropped = resized_and_cropped(whole)
    return PreprocessSteps(
        whole=whole,
        pixels=partial(_processed, processor, do_rescale=False, do_normalize=False),
        levels=partial(_processed, processor, do_resize=False, do_center_crop=False),
        resized=resized,
        cropped=cropped,
    )


def _check_sizes(processor: Any, spec: Spec) -> None:
    """Refuses an image processor that does not make images of one size of a wide and of a tall image.

    Raises:
        EncoderError: it makes patches, or images of several sizes, or fills them up.
    """
    from PIL import Image

    sizes = []
    is_filled = False
    for size in ((90, 60), (40, 80)):
        inputs = processor(images=Image.new("RGB", size), return_tensors="pt")
        pixels = inputs.get("pixel_values")
        if pixels is None or pixels.ndim != 4 or len(pixels) != 1:
            raise EncoderError(
                f"{spec.text}: its image processor makes {', '.join(inputs)}, patches or tiles of an image and not one "
                "image of a fixed size; use a model of a fixed size (of SigLIP 2 one without naflex in its name)"
            )
        sizes.append(tuple(pixels.shape[2:]))
        is_filled |= "pixel_mask" in inputs and not inputs["pixel_mask"].all()
    if sizes[0] != sizes[1] or is_filled:
        raise EncoderError(
            f"{spec.text}: its image processor keeps the aspect, so that images differ in size; use a model whose "
            "processor makes all images one size, or the same backbone by timm:NAME or torchvision:NAME"
        )


def _processed(processor: Any, image: "Image.Image | Tensor", **steps: bool) -> "Tensor":
    """An image after a processor's steps, but for those that are turned off."""
    return processor(images=image, return_tensors="pt", **steps)["pixel_values"][0]


def _image_pooling(module: Any, steps: PreprocessSteps) -> tuple[str, Callable[[Any, "Tensor"], "Tensor"]]:
    """How an image model's output becomes one vector: its name for the recipe, and the function.

    ============================================  =============  =======================================
    model                                         name           feature
    ============================================  =============  =======================================
    a dual encoder                                projection     ``get_image_features``
    its vision tower, saved with the projection   projection     ``image_embeds``
    its vision tower alone; timm's models         pooled output  ``pooler_output``
    another model with a class token              cls token      that token of the last hidden state
    any other                                     spatial mean   mean of the last hidden state
    ============================================  =============  =======================================

    The poolers of other models are not used, since many checkpoints carry one that was never trained.
    """
    if hasattr(module, "get_image_features"):
        return "projection", _image_projection
    if type(module).__name__.endswith("WithProjection"):
        return "projection", partial(_output, name="image_embeds")
    if module.config.model_type.endswith(_TRAINED_POOLERS) and _has_pooled_output(module, steps):
        return "pooled output", partial(_output, name="pooler_output")
    if any(name.endswith(_CLASS_TOKENS) for name, _ in module.named_parameters()):
        return "cls token", partial(_mean_or_first, has_first_token=True)
    return "spatial mean", partial(_mean_or_first, has_first_token=False)


def _image_projection(module: Any, batch: "Tensor") -> "Tensor":
    """A dual encoder's image features."""
    return _bare(module, module.get_image_features(pixel_values=batch))


def _output(module: Any, batch: "Tensor", name: str) -> "Tensor":
    """An output of an image model by its name."""
    return getattr(module(pixel_values=batch), name)


def _has_pooled_output(module: Any, steps: PreprocessSteps) -> bool:
    """Whether an image model has a pooled output, which some configurations switch off."""
    import torch
    from PIL import Image

    with torch.no_grad():
        output = module(pixel_values=steps.whole(Image.new("RGB", (64, 64)))[None])
    return getattr(output, "pooler_output", None) is not None


def _mean_or_first(module: "nn.Module", batch: "Tensor", has_first_token: bool) -> "Tensor":
    """The first token where a model has one for the whole image, else the mean over space or tokens."""
    hidden = module(pixel_values=batch).last_hidden_state
    if hidden.ndim == 4:
        return hidden.mean((2, 3))
    if has_first_token:
        return hidden[:, 0]
    return hidden.mean(1)


def _vectors(spec: Spec, kind: str, compute: Callable[..., Any], *inputs: Any) -> "Tensor":
    """What ``compute`` gives of inputs, if that is one vector per image or caption, (B, D).

    Raises:
        EncoderError: it is anything else.
    """
    from torch import Tensor

    features = compute(*inputs)
    if isinstance(features, Tensor) and features.ndim == 2:
        return features
    shape = tuple(features.shape[1:]) if isinstance(features, Tensor) else type(features).__name__
    raise EncoderError(
        f"{spec.text} gives no single vector for each {kind} but {shape}; use a dual encoder that does, such as CLIP "
        "or SigLIP, or an encoder of one kind alone"
    )


def _text_projection(module: Any) -> Callable[[Any, dict[str, "Tensor"]], Any] | None:
    """How a text model with a projection of its own gives its feature, or None for any other.

    =======================================  =====================
    model                                    feature
    =======================================  =====================
    a dual encoder                           ``get_text_features``
    its text tower, with the projection      ``text_embeds``
    SigLIP's text tower                      ``pooler_output``
    =======================================  =====================
    """
    if hasattr(module, "get_text_features"):
        return _text_features
    if type(module).__name__.endswith("WithProjection"):
        return partial(_text_output, name="text_embeds")
    if module.config.model_type.startswith("siglip"):
        return partial(_text_output, name="pooler_output")
    return None


def _text_features(module: Any, inputs: dict[str, "Tensor"]) -> Any:
    """A dual encoder's text features."""
    return _bare(module, module.get_text_features(**inputs))


def _text_output(module: Any, inputs: dict[str, "Tensor"], name: str) -> Any:
    """An output of a text model by its name."""
    return getattr(module(**inputs), name)


def _projection(
    project: Callable[[Any, dict[str, "Tensor"]], "Tensor"], module: Any, inputs: dict[str, "Tensor"]
) -> dict[str | int, "Tensor"]:
    """The features of a text model with a projection of its own."""
    return {"last": project(module, inputs)}


def _is_causal(module: Any) -> bool:
    """Whether a token's hidden state depends on no later token, seen in a pass of two texts that end differently."""
    import torch

    inputs = torch.arange(_SAMPLE_TOKENS).repeat(2, 1)  # any ids will do
    inputs[1, -1] += 1
    with torch.no_grad():
        states = module(input_ids=inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state[:, :-1]
    return torch.allclose(states[0], states[1], rtol=0, atol=_SAME * states.abs().max().item())


def most_tokens(module: Any, stated: int | None) -> int:
    """The most tokens that a text model takes: the least of its own limits and of the one that is stated beside it.

    A limit below 1 is none. A table of positions says more than the settings: RoBERTa's kind begins to count behind the
    padding's row.
    """
    from torch import nn

    config = getattr(module.config, "text_config", module.config)
    limits = [stated, getattr(config, "max_position_embeddings", None)]
    for name, table in getattr(module, "text_model", module).named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            skipped = getattr(table, "offset", 0)
            if table.padding_idx is not None:
                skipped = table.padding_idx + 1
            limits.append(table.num_embeddings - skipped)
    return min(int(limit) for limit in limits if limit is not None and limit >= 1)


def _hidden_states(module: "nn.Module", inputs: dict[str, "Tensor"]) -> dict[str | int, "Tensor"]:
    """The hidden states of a text model by layer."""
    output = module(**inputs, output_hidden_states=True)
    return {"last": output.last_hidden_state, **dict(enumerate(output.hidden_states))}


def _word_embeddings(module: Any, ids: "Tensor") -> "Tensor":
    """The embeddings of tokens, before positions are added."""
    return module.get_input_embeddings()(ids)


def _bare(module: Any, output: Any) -> Any:
    """A dual encoder's features, which some versions return bare and some within an output object."""
    features = getattr(output, "pooler_output", output)
    if module.config.model_type in _FIRST_TOKEN:
        return features[:, 0]
    return features


def _load_text_model(spec: Spec, seed: int, vocabulary: int) -> tuple[Any, str]:
    """A text model for a vocabulary of that many tokens, and a digest of its architecture."""
    from transformers import DistilBertConfig

    config = None
    if _is_untrained_distilbert(spec):
        config = DistilBertConfig(vocab_size=vocabulary)
    module, architecture = _load_model(spec, seed, config)
    if hasattr(module, "get_text_features"):
        return module, architecture
    if module.config.is_encoder_decoder and hasattr(module, "decoder"):
        module = module.get_encoder()
    if module.main_input_name != "input_ids":
        kind = type(module).__name__
        raise EncoderError(f"{spec.text} is no text encoder ({kind} takes {module.main_input_name})")
    return module, architecture


def _is_untrained_distilbert(spec: Spec) -> bool:
    """Whether the encoder is the default one with random weights."""
    return spec.random and spec.name == DISTILBERT


@cache
def _dtype_option() -> str:
    """The name of the option for the dtype to load a model in, which transformers 4.56 renamed."""
    release = tuple(int(part) for part in version("transformers").split(".")[:2])
    if release >= (4, 56):
        return "dtype"
    return "torch_dtype"


def _load_model(spec: Spec, seed: int, config: Any = None) -> tuple[Any, str]:
    """The model in float32, from safetensors and without remote code, and a digest of its architecture."""
    import torch
    from transformers import AutoConfig, AutoModel, PretrainedConfig

    from onceover.extract.encoding.weights import seeded

    loader: Any = AutoModel
    if config is None:
        loader = _model_class(_from_pretrained(PretrainedConfig, spec))
        config = _from_pretrained(AutoConfig if loader is AutoModel else loader.config_class, spec)
        described, _ = type(config).get_config_dict(spec.name, revision=spec.revision, local_files_only=True)
    else:
        described = config.to_diff_dict()
    if spec.random:
        make = AutoModel.from_config if loader is AutoModel else loader._from_config
        with seeded(seed):
            module = make(config)
    else:
        module, report = _from_pretrained(
            loader, spec, use_safetensors=True, output_loading_info=True, **{_dtype_option(): torch.float32}
        )
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if missing:
            raise EncoderError(
                f"{spec.text}: the checkpoint lacks {len(missing)} weights of {type(module).__name__} "
                f"(the first: {missing[0]}), which would be random; use a complete one"
            )
    settings = {key: value for key, value in described.items() if key not in _CONFIG_NOISE}
    return module, f"{type(module).__name__} {digest(settings)[:16]}"


def _model_class(config: Any) -> Any:
    """The class to load a model by: AutoModel, or the one that it was saved from, where AutoModel would not do."""
    import transformers

    [name, *_] = config.architectures or [""]
    if not str(name).endswith(_OWN_CLASSES):
        return transformers.AutoModel
    saved_from = getattr(transformers, name, None)
    if isinstance(saved_from, type) and issubclass(saved_from, transformers.PreTrainedModel):
        return saved_from
    return transformers.AutoModel


def _load_tokenizer(spec: Spec, captions: Sequence[str] | None, files: dict[str, bytes] | None) -> HuggingFaceTokenizer:
    """The tokenizer: of its files, of the dataset's captions, or of the model's own folder or name."""
    from transformers import AutoTokenizer

    from onceover.extract.encoding.tokenizer_files import load_tokenizer, saved_files
    from onceover.extract.encoding.vocabulary import dataset_tokenizer

    if files is not None:
        return HuggingFaceTokenizer(load_tokenizer(files), known_tokenizer_files(files))
    if _is_untrained_distilbert(spec):
        if captions is None:
            raise EncoderError(f"{spec.text} takes its vocabulary from a dataset; encode one first")
        tokenizer = dataset_tokenizer(captions)
    else:
        tokenizer = _from_pretrained(AutoTokenizer, spec)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return HuggingFaceTokenizer(tokenizer, saved_files(tokenizer))


def _from_pretrained(loader: Any, spec: Spec, **options: Any) -> Any:
    """``loader.from_pretrained``: the local folder or cache first, the network only where it answers."""
    from huggingface_hub import snapshot_download

    from onceover.extract.encoding.hub import downloading

    if Path(spec.name).exists():
        _check_files(Path(spec.name))
        return _load_local(loader, spec.name, spec.revision, **options)
    try:
        return _load_local(loader, spec.name, spec.revision, **options)
    except (OSError, ValueError):  # transformers' for what is not in the cache
        pass
    instead = (
        f"{_near_folder(spec)}name a local copy (hf:FOLDER) or, untrained, torchvision:resnet50@random and "
        f"hf:{DISTILBERT}@random"
    )
    with downloading(spec, spec.name, "no such folder,", instead):
        snapshot_download(spec.name, revision=spec.revision, allow_patterns=list(SMALL_FILES))
        return loader.from_pretrained(spec.name, revision=spec.revision, trust_remote_code=False, **options)


def _near_folder(spec: Spec) -> str:
    """A question that names the folder that may be meant, where one beside it has nearly that name; else nothing."""
    path = Path(spec.name)
    folders: dict[str, str] = {}
    with contextlib.suppress(OSError):
        folders = {sibling.name.lower(): sibling.name for sibling in path.parent.iterdir() if sibling.is_dir()}
    near = difflib.get_close_matches(path.name.lower(), folders, n=1, cutoff=0.8)
    if not near:
        return ""
    return f"did you mean {NAME}:{path.with_name(folders[near[0]])}? Or "


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
