"""Names of the files that a saved encoder and its tokenizer consist of; no other file is written, read or removed."""

import json
import re

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


def known_tokenizer_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """Those of a tokenizer's files that a library knows by their names; no other leaves a store or a run.

    Raises:
        EncoderError: they name code that is to be run.
    """
    known = {name: data for name, data in files.items() if name in TOKENIZER_FILES}
    if "auto_map" in _tokenizer_settings(known):
        raise EncoderError(
            "the tokenizer's tokenizer_config.json names Python code of its own (auto_map), which is never run; "
            "use a store or run whose tokenizer needs none"
        )
    return known


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
