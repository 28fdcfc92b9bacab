"""Text models of sentence-transformers: ``st:NAME_OR_FOLDER[#REVISION][@PROMPT]``.

A feature is the vector that the model's own modules make: its pooling, dense layers and normalisation. PROMPT names the
one of the model's prompts that is put before each caption and each query alike; its default one if left out.
"""

import contextlib
import json
import logging
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onceover.base.extras import Extra
from onceover.base.files import check_regular, digest, write_json
from onceover.extract.encoders import EncoderError, ImageModel, Spec, TextModel, file_stamps
from onceover.extract.encoders import _sentence_folder as sentence_folder
from onceover.extract.encoders.huggingface import HuggingFaceTokenizer, most_tokens
from onceover.extract.encoding.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor

NAME = "st"
FORM = "st:NAME_OR_FOLDER[#REVISION][@PROMPT]"
_LIBRARY = Extra("sentence-transformers", "sentence-transformers", "sentence_transformers")
_OWNER = "sentence-transformers"  # of models that are named without one
_HUB = "https://huggingface.co/"
_NAMES_WITHOUT_OWNER = re.compile(  # how names of that owner's models begin
    r"(all|average_word_embeddings|distiluse|gtr|msmarco|multi-qa|nli|paraphrase|quora|sentence-t5|stsb)-[\w.-]+([#@].*)?"
)
_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*/pytorch_model.bin")  # the last for dense layers
_NO_FILES = ("onnx/*", "openvino/*")


def parse(text: str) -> Spec:
    """Parses ``st:NAME_OR_FOLDER[#REVISION][@PROMPT]``.

    Raises:
        EncoderError: ``@random``, which it has not.
    """
    name = text.removeprefix(f"{NAME}:")
    prompt = ""
    revision = None
    if not Path(name).exists():
        start, at, end = name.rpartition("@")
        if at:
            name, prompt = start, end
    if prompt == "random":
        raise EncoderError(f"{text}: a model of sentence-transformers has no random weights; use hf:{name}@random")
    if "#" in name and not Path(name).exists():
        name, _, revision = name.partition("#")
    return Spec(text, NAME, name, "", revision, prompt)


def knows(text: str) -> str | None:
    """A folder of the library's, or a model of its owner's, by its name or by the beginnings that those have."""
    if Path(text).is_dir():
        return f"{NAME}:{text}" if sentence_folder.is_sentence_folder(Path(text)) else None
    name = text.removeprefix(_HUB)
    if name.startswith(f"{_OWNER}/") or _NAMES_WITHOUT_OWNER.fullmatch(name):
        return f"{NAME}:{name}"
    return None


def change_stamp(spec: Spec) -> dict[str, Any]:
    """The files of a local folder; of another model its name and the commit that lies in the cache."""
    stamp = {"prompt": spec.prompt, "sentence_transformers": _LIBRARY.version(spec.text)}
    folder = Path(spec.name)
    if folder.is_dir():
        return stamp | {"files": file_stamps(sorted(path for path in folder.rglob("*") if path.is_file()))}
    cached = _cached_folder(spec)
    commit = cached.name if cached else None
    return stamp | {"name": spec.name, "revision": spec.revision, "commit": commit, "files": []}


def load_image(spec: Spec, seed: int) -> ImageModel:
    """Refuses: the models are those of texts.

    Raises:
        EncoderError: always.
    """
    raise EncoderError(f"{spec.text!r} is no image encoder; use hf:NAME_OR_FOLDER, timm:NAME or open_clip:NAME")


def load_text(
    spec: Spec, seed: int, captions: Sequence[str] | None, tokenizer_files: dict[str, bytes] | None
) -> TextModel:
    """The model with its own pooling, and its tokenizer, which puts the prompt before each text."""
    from torch import nn

    folder = _folder(spec)
    prompt = _prompt(folder, spec)
    modules = sentence_folder.read_modules(folder, spec)
    with _quiet():
        transformer, *others = _loaded(folder, spec)
        tokenizer = _tokenizer(transformer, prompt, tokenizer_files)
    network = transformer.auto_model
    parts: OrderedDict[str, nn.Module] = OrderedDict(transformer=network)
    for number, module in enumerate(others, 1):
        parts[f"{type(module).__name__.lower()}{number}"] = module
    settings: list[Any] = [[module.kind, module.settings] for module in modules]
    settings.append(bool(transformer.do_lower_case))
    return TextModel(
        module=nn.Sequential(parts),
        tokenizer=tokenizer,
        states=_hidden_states,
        recipe={"architecture": f"{type(network).__name__} {digest(settings)[:16]}", "prompt": prompt},
        max_length=most_tokens(network, transformer.max_seq_length),
        depth=getattr(network.config, "num_hidden_layers", 0),
        words=_word_embeddings,
        pool=partial(_own_feature, tokenizer.prompt_length()),
        vocabulary=getattr(network.config, "vocab_size", None),
    )


def save(spec: Spec, kind: str, module: Any, folder: Path) -> str:
    """Writes a folder of sentence-transformers, whose default prompt is the one that was used."""
    from onceover.extract.encoding.library_errors import system_errors

    source = _folder(spec)
    modules = sentence_folder.read_modules(source, spec)
    entries = json.loads((source / sentence_folder.MODULES).read_bytes())
    with _quiet(), system_errors(folder):
        for number, part in enumerate(module):
            path = f"{number}_{modules[number].kind}" if number else ""
            (folder / path).mkdir(parents=True, exist_ok=True)
            if number:
                part.save(str(folder / path))
            else:
                part.save_pretrained(folder)
            entries[number] |= {"path": path}
    write_json(folder / sentence_folder.MODULES, entries)
    named, default = sentence_folder.prompts(source, spec)
    write_json(folder / sentence_folder.SETTINGS, {"prompts": named, "default_prompt_name": spec.prompt or default})
    settings = modules[0].folder / sentence_folder.TRANSFORMER
    if settings.is_file():
        shutil.copyfile(settings, folder / sentence_folder.TRANSFORMER)
    return f"{NAME}:{folder}"


def write_example(folder: Path) -> dict[str, str]:
    """A BERT of one layer with random weights, whose tokens are averaged and the average normalised."""
    from transformers import BertConfig, BertModel

    from onceover.extract.encoding.vocabulary import dataset_tokenizer
    from onceover.extract.encoding.weights import seeded

    tokenizer = dataset_tokenizer(["A red circle .", "On the left there is a blue star ."])
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    with seeded(0), _quiet():
        BertModel(BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    entries = []
    for number, kind in enumerate(("Transformer", "Pooling", "Normalize")):
        path = f"{number}_{kind}" if number else ""
        (folder / path).mkdir(exist_ok=True)
        class_name = f"sentence_transformers.models.{kind}"
        entries.append({"idx": number, "name": str(number), "path": path, "type": class_name})
    write_json(folder / sentence_folder.MODULES, entries)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    return {"text": f"{NAME}:{folder}"}


class SentenceTokenizer(HuggingFaceTokenizer):
    """A tokenizer that puts a prompt before each text, and takes the text in lower case where its model wants that."""

    def __init__(self, wrapped: Any, files: dict[str, bytes], prompt: str, is_lower: bool):
        super().__init__(wrapped, files)
        self._prompt = prompt
        self._is_lower = is_lower

    def token_ids(self, captions: list[str], max_length: int | None) -> list[list[int]]:
        """The token ids of captions behind the prompt, cut at ``max_length`` tokens unless it is None."""
        texts = [self._prompt + caption for caption in captions]
        if self._is_lower:
            texts = [text.lower() for text in texts]
        return super().token_ids(texts, max_length)

    def prompt_length(self) -> int:
        """The number of tokens of the prompt, with those that stand before every text; 0 without a prompt."""
        if not self._prompt:
            return 0
        [ids] = self.token_ids([""], None)
        return len(ids) - (ids[-1] in self.wrapped.all_special_ids)


def _prompt(folder: Path, spec: Spec) -> str:
    """The prompt that is put before each text.

    Raises:
        EncoderError: the model has none of that name.
    """
    named, default = sentence_folder.prompts(folder, spec)
    name = spec.prompt or default
    if name is None:
        return ""
    if name not in named:
        known = f"its prompts are {', '.join(named)}" if named else f"it has none; write {NAME}:{spec.name}"
        raise EncoderError(f"{spec.text}: the model has no prompt {name!r:.80}; {known}")
    return named[name]


def _folder(spec: Spec) -> Path:
    """The folder of a model: on this machine, in Hugging Face's cache, or downloaded into that.

    Raises:
        EncoderError: it is not to be had, or is none of sentence-transformers.
    """
    folder = Path(spec.name)
    if not folder.is_dir():
        folder = _cached_folder(spec) or _downloaded(spec)
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_regular(path)
    if not sentence_folder.is_sentence_folder(folder):
        raise EncoderError(
            f"{spec.text} is no model of sentence-transformers ({sentence_folder.MODULES} is missing); "
            f"write hf:{spec.name}, whose feature is the mean over tokens"
        )
    return folder


def _cached_folder(spec: Spec) -> Path | None:
    """The folder of a model with its weights in Hugging Face's cache.

    Raises:
        EncoderError: no model can have that name.
    """
    from onceover.extract.encoding.hub import cached_file

    file = cached_file(spec, _repository(spec), sentence_folder.MODULES)
    if file is None or not any(file.parent.rglob("*.safetensors")):
        return None
    return file.parent


def _downloaded(spec: Spec) -> Path:
    """The folder of a model that the network has.

    Raises:
        EncoderError: it is not to be had.
    """
    from huggingface_hub import snapshot_download

    from onceover.extract.encoding.hub import downloading

    repository = _repository(spec)
    with downloading(spec, repository, "no such folder,", "name a local copy (st:FOLDER)"):
        folder = snapshot_download(
            repository, revision=spec.revision, allow_patterns=list(_FILES), ignore_patterns=list(_NO_FILES)
        )
    return Path(folder)


def _repository(spec: Spec) -> str:
    """The model's name on Hugging Face's hub."""
    return spec.name if "/" in spec.name else f"{_OWNER}/{spec.name}"


def _loaded(folder: Path, spec: Spec) -> Any:
    """The modules of the model, in float32 on the processor; the transformer from safetensors, and no code of its own.

    Dense layers that lie in a pickle are read with ``weights_only``, as the library does by itself.
    """
    from onceover.extract.encoding.hub import offline

    library = _LIBRARY.imported(spec.text)
    with offline():
        loaded = library.SentenceTransformer(
            str(folder),
            device="cpu",
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    return loaded.float()


def _tokenizer(transformer: Any, prompt: str, files: dict[str, bytes] | None) -> SentenceTokenizer:
    """The tokenizer: of its files, or the model's."""
    from onceover.extract.encoding.tokenizer_files import load_tokenizer, saved_files

    wrapped = transformer.tokenizer
    if files is not None:
        wrapped = load_tokenizer(files)
    else:
        files = saved_files(wrapped)
    return SentenceTokenizer(wrapped, files, prompt, bool(transformer.do_lower_case))


def _hidden_states(module: Any, inputs: dict[str, "Tensor"]) -> dict[str | int, "Tensor"]:
    """The hidden states of the transformer by layer."""
    output = module.transformer(**inputs, output_hidden_states=True)
    return {"last": output.last_hidden_state, **dict(enumerate(output.hidden_states))}


def _word_embeddings(module: Any, ids: "Tensor") -> "Tensor":
    """The embeddings of tokens, before positions are added."""
    return module.transformer.get_input_embeddings()(ids)


def _own_feature(prompt_length: int, module: Any, last: "Tensor", inputs: dict[str, "Tensor"]) -> "Tensor":
    """The vector that the modules behind the transformer make of its last hidden states."""
    features: dict[str, Any] = {"token_embeddings": last, "attention_mask": inputs["attention_mask"]}
    if prompt_length:
        features["prompt_length"] = prompt_length
    for part in list(module)[1:]:
        features = part(features)
    return features["sentence_embedding"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' own bars and advice from the terminal."""
    logger = logging.getLogger("sentence_transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
