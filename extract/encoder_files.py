"""Names of the files that a saved encoder and its tokenizer consist of; no other file is written, read or removed."""

import json
import re
from collections.abc import Sequence

from onceover.extract.encoders import EncoderError

#: the files of Hugging Face's tokenizers, none of which holds code
TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "bpe.codes",
        "byte_maps.json",
        "chat_template.jinja",
        "chat_template.json",
        "dict.txt",
        "emoji.json",
        "entity_vocab.json",
        "merges.txt",
        "normalizer.json",
        "prophetnet.tokenizer",
        "sentencepiece.bpe.model",
        "sentencepiece.model",
        "source.spm",
        "special_tokens_map.json",
        "spiece.model",
        "spm.model",
        "spm_char.model",
        "target.spm",
        "target_vocab.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab-src.json",
        "vocab-tgt.json",
        "vocab.bpe",
        "vocab.json",
        "vocab.txt",
        "word_pronunciation.json",
        "word_shape.json",
    }
)
_JSON_FILES = "model.safetensors.index|(open_clip_)?config|generation_config|preprocessor_config|processor_config"
#: names of the files that a saved encoder consists of, those in folders within as ``folder/name``
ENCODER_FILES = re.compile(
    rf"(weights|open_clip_model|model(-\d{{5}}-of-\d{{5}})?)\.safetensors|({_JSON_FILES})\.json|"
    + r"(modules|config_sentence_transformers|sentence_bert_config)\.json|\d+_\w+/(config\.json|model\.safetensors)|"
    + "|".join(map(re.escape, sorted(TOKENIZER_FILES)))
)
_TOKENIZER_SETTINGS = "tokenizer_config.json"
_OF_A_PART = re.compile(r"(\d{1,4})\.(.+)")  # a file of one of several tokenizers: 0.vocab.txt


def known_tokenizer_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """Those of a tokenizer's files that a library knows by their names; no other leaves a store or a run.

    The files of several tokenizers have a number each in front of their names (``numbered_files``).

    Raises:
        EncoderError: they name code that is to be run.
    """
    known = {name: data for name, data in files.items() if _own_name(name) in TOKENIZER_FILES}
    for name, data in known.items():
        if _own_name(name) == _TOKENIZER_SETTINGS and "auto_map" in _tokenizer_settings({_TOKENIZER_SETTINGS: data}):
            raise EncoderError(
                "the tokenizer's tokenizer_config.json names Python code of its own (auto_map), which is never run; "
                "use a store or run whose tokenizer needs none"
            )
    return known


def numbered_files(tokenizers: Sequence[dict[str, bytes]]) -> dict[str, bytes]:
    """The files of several tokenizers together, each with its tokenizer's number in its name: ``0.vocab.txt``."""
    numbered: dict[str, bytes] = {}
    for number, files in enumerate(tokenizers):
        numbered |= {f"{number}.{name}": data for name, data in files.items()}
    return numbered


def files_of_part(files: dict[str, bytes], number: int) -> dict[str, bytes]:
    """The files of one of several tokenizers, by their own names."""
    of_part = {}
    for name, data in files.items():
        match = _OF_A_PART.fullmatch(name)
        if match and int(match[1]) == number:
            of_part[match[2]] = data
    return of_part


def _own_name(name: str) -> str:
    """A file's name without the number of its tokenizer."""
    match = _OF_A_PART.fullmatch(name)
    return match[2] if match else name


def without_code(files: dict[str, bytes]) -> dict[str, bytes]:
    """A tokenizer's files with no mention of code of its own, which was not needed to load it."""
    settings = _tokenizer_settings(files)
    if "auto_map" not in settings:
        return files
    del settings["auto_map"]
    return files | {_TOKENIZER_SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False).encode()}


def _tokenizer_settings(files: dict[str, bytes]) -> dict:
    """The settings of a tokenizer; none where they cannot be read, which its library then says."""
    try:
        settings = json.loads(files.get(_TOKENIZER_SETTINGS, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}
