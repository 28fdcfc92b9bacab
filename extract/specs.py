"""Encoder specifications: what a user may ask for, parsed and told apart without importing torch.

``torchvision:NAME[@WEIGHTS]``  WEIGHTS: a name of torchvision's (IMAGENET1K_V1 if left out), a file, or ``random``
``hf:NAME_OR_FOLDER[#REVISION][@random]``  a Hugging Face model by name or in a local folder
``import:NAME`` stands in a store for the unknown encoder of imported features; none can be had by it
"""

import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from onceover.base.errors import OnceoverError

DEFAULT_WEIGHTS = "IMAGENET1K_V1"
_MAX_NAME = 255  # bytes of a file's or folder's name
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
_FORMS = "torchvision:NAME[@WEIGHTS], hf:NAME_OR_FOLDER[#REVISION][@random]"
_JSON_FILES = "model.safetensors.index|config|generation_config|preprocessor_config|processor_config"
#: names of the files that a saved encoder consists of
ENCODER_FILES = re.compile(
    rf"(weights|model(-\d{{5}}-of-\d{{5}})?)\.safetensors|({_JSON_FILES})\.json|"
    + "|".join(map(re.escape, sorted(TOKENIZER_FILES)))
)


class EncoderError(OnceoverError):
    """An encoder that cannot be had, or that is not what it should be."""


@dataclass(frozen=True)
class Spec:
    """A parsed specification. ``weights`` is ``random``, a name or a file (torchvision), or "" (Hugging Face)."""

    text: str
    library: str
    name: str
    weights: str
    revision: str | None = None

    def located(self) -> str:
        """The specification with a local folder or file as an absolute path, good from anywhere."""
        for place in (self.name, self.weights):
            if place and Path(place).exists():
                return self.text.replace(place, str(Path(place).resolve()), 1)
        return self.text

    @property
    def random(self) -> bool:
        """Whether the weights are a seeded initialisation."""
        return self.weights == "random"


def parse_spec(text: str) -> Spec:
    """Parses an encoder specification.

    Raises:
        EncoderError: not of a known form, or of features that were imported.
    """
    library, colon, rest = text.partition(":")
    if library == "import" and rest:
        raise EncoderError(
            f"{text}: these features were imported, and there is no encoder to embed a query or to extend the store "
            "with; onceover extract makes a store that has one"
        )
    if not colon or not rest or library not in ("torchvision", "hf") or not _can_be_path(rest):
        raise EncoderError(f"{text!r:.80} is no encoder specification; write {_FORMS}")
    if library == "torchvision":
        name, _, weights = rest.partition("@")
        return Spec(text, library, name, weights or DEFAULT_WEIGHTS)
    name, weights = (rest.removesuffix("@random"), "random") if rest.endswith("@random") else (rest, "")
    revision = None
    if "#" in name and not Path(name).exists():
        name, _, revision = name.partition("#")
    return Spec(text, library, name, weights, revision)


def _can_be_path(name: str) -> bool:
    """Whether a file system could have that name; to ask it for any other is an error."""
    if "\0" in name:
        return False
    return max(len(part) for part in os.fsencode(name).split(b"/")) <= _MAX_NAME


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


_TOKENIZER_SETTINGS = "tokenizer_config.json"


def _tokenizer_settings(files: dict[str, bytes]) -> dict:
    """The settings of a tokenizer; none where they cannot be read, which its library then says."""
    try:
        settings = json.loads(files.get(_TOKENIZER_SETTINGS, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def identity(spec: Spec, seed: int) -> dict:
    """What tells whether the encoder behind ``spec`` may have changed, had without loading it.

    File names, sizes and modification times of local weights; a cached model's commit; library versions where those
    decide. Equal identities mean the same features; different ones, that the encoder has to be loaded and hashed.
    """
    marks: dict = {"library": spec.library, "weights": spec.weights}
    if spec.random:
        marks |= {"seed": seed, "torch": version("torch"), "transformers": version("transformers")}
    if spec.library == "torchvision":
        marks |= {"name": spec.name, "torchvision": version("torchvision")}
        files = [Path(spec.weights)] if Path(spec.weights).is_file() else []
    elif Path(spec.name).is_dir():
        files = sorted(path for path in Path(spec.name).iterdir() if path.is_file())
    else:
        marks |= {"name": spec.name, "revision": spec.revision, "commit": _cached_commit(spec)}
        files = []
    marks["files"] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return marks


def _cached_commit(spec: Spec) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(spec.name, "config.json", revision=spec.revision)
    except HFValidationError as error:
        raise EncoderError(f"{spec.text}: there is no such folder, and no model can have that name") from error
    return Path(path).parent.name if isinstance(path, str) else None
