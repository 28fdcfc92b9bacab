"""Encoder specifications: what a user may ask for, parsed and told apart without importing torch.

``torchvision:NAME[@WEIGHTS]``  WEIGHTS: a name of torchvision's (IMAGENET1K_V1 if left out), a file, or ``random``
``hf:NAME_OR_FOLDER[#REVISION][@random]``  a Hugging Face model by name or in a local folder
``import:NAME`` stands in a store for the unknown encoder of imported features; none can be had by it
"""

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from configs import OnceoverError

DEFAULT_WEIGHTS = "IMAGENET1K_V1"
_FORMS = "torchvision:NAME[@WEIGHTS], hf:NAME_OR_FOLDER[#REVISION][@random]"


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
            "with; python cli.py extract makes a store that has one"
        )
    if not colon or not rest or library not in ("torchvision", "hf"):
        raise EncoderError(f"{text!r} is no encoder specification; write {_FORMS}")
    if library == "torchvision":
        name, _, weights = rest.partition("@")
        return Spec(text, library, name, weights or DEFAULT_WEIGHTS)
    name, weights = (rest.removesuffix("@random"), "random") if rest.endswith("@random") else (rest, "")
    revision = None
    if "#" in name and not Path(name).exists():
        name, _, revision = name.partition("#")
    return Spec(text, library, name, weights, revision)


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


#: STUB until merged
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json",
)  # fmt: skip
_JSON_FILES = "model.safetensors.index|config|generation_config|preprocessor_config|processor_config"
#: names of the files that a saved encoder consists of
ENCODER_FILES = re.compile(
    rf"(weights|model(-\d{{5}}-of-\d{{5}})?)\.safetensors|({_JSON_FILES})\.json|"
    + "|".join(map(re.escape, TOKENIZER_FILES))
)


def known_tokenizer_files(files):
    """Stub."""
    return {name: data for name, data in files.items() if name in TOKENIZER_FILES}
