"""The settings in a folder of sentence-transformers: its modules and prompts. Read as JSON; nothing is imported."""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from onceover.base.files import MAX_TEXT, FileError, read_bytes
from onceover.extract.encoders import EncoderError, Spec

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
SMALL_FILES = (MODULES, SETTINGS, TRANSFORMER, "*/config.json")  # patterns: what tells how a model pools
_BEHIND = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")  # modules that may stand behind the transformer
_HIDDEN_STATES = {"method": "forward", "method_output_name": "last_hidden_state"}  # of a text, by its transformer
_NOISE = {"_name_or_path", "transformers_version"}  # settings that change no feature
_TYPE = re.compile(r"sentence_transformers\.(models|base\.modules|sentence_transformer\.modules)(\.\w+)?\.(\w+)")
_ACTIVATION = re.compile(r"torch\.nn\.modules\.(activation|linear)\.\w+")


@dataclass(frozen=True)
class Module:
    """A module of a model.

    Attributes:
        kind: the name of its class.
        folder: where its files lie.
        settings: what its ``config.json`` says.
    """

    kind: str
    folder: Path
    settings: dict[str, Any]


def is_sentence_folder(folder: Path) -> bool:
    """Whether a folder is one of sentence-transformers."""
    return (folder / MODULES).is_file()


def read_modules(folder: Path, spec: Spec) -> list[Module]:
    """The modules that ``modules.json`` names: a transformer, and those that make one vector of its tokens.

    Raises:
        EncoderError: it cannot be read, or names any other module, or code of its own.
    """
    modules = []
    entries = _read(folder / MODULES, spec, list)
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise EncoderError(f"{spec.text}: {folder / MODULES} lists no modules by their types")
        path = PurePosixPath(str(entry.get("path", "")))
        if path.is_absolute() or ".." in path.parts or "\\" in str(path):
            raise EncoderError(f"{spec.text}: {folder / MODULES} names {str(path)!r:.80}, outside of the folder")
        known = _TYPE.fullmatch(entry["type"])
        if known is None:
            raise EncoderError(
                f"{spec.text}: {MODULES} names {entry['type']!r:.80}, code of its own, which is never run; "
                "use a model whose modules are sentence-transformers' own"
            )
        modules.append(_module(known[3], folder / path, number, spec))
    if "Pooling" not in [module.kind for module in modules]:
        raise EncoderError(f"{spec.text}: {folder / MODULES} lists no pooling, so that there is no vector per text")
    return modules


def prompts(folder: Path, spec: Spec) -> tuple[dict[str, str], str | None]:
    """The prompts of a model by name, and the name of the one that it puts before a text unless told otherwise.

    Raises:
        EncoderError: the settings cannot be read.
    """
    if not (folder / SETTINGS).is_file():
        return {}, None
    settings = _read(folder / SETTINGS, spec, dict)
    named = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise EncoderError(f"{spec.text}: {folder / SETTINGS} has no prompts by name")
    if default is not None and default not in named:
        raise EncoderError(f"{spec.text}: {folder / SETTINGS} has no prompt {default!r:.80}, its default one")
    if settings.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise EncoderError(f"{spec.text} is a {settings['model_type']}, which gives no vector per text")
    return named, default


def check_mean_pooled(folder: Path, spec: Spec) -> None:
    """Refuses a folder whose model does more than the plain mean over tokens; the length of a vector does not count.

    Raises:
        EncoderError: it does.
    """
    if not is_sentence_folder(folder):
        return
    named, default = prompts(folder, spec)
    more = []
    if default is not None and named[default]:
        more.append(f"the prompt {named[default]!r:.40}")
    for module in read_modules(folder, spec)[1:]:
        if module.kind == "Pooling":
            modes = pooling_modes(module)
            if modes != ["mean"]:
                more.append(f"pooling by {' and '.join(modes)}")
        elif module.kind not in ("Normalize", "Dropout"):
            more.append(f"the module {module.kind}")
    if more:
        raise EncoderError(f"{spec.text}: the model has {', '.join(more)}, which hf: leaves out; write st:{spec.name}")


def pooling_modes(module: Module) -> list[str]:
    """The names of a pooling's modes, in either of the two ways in which they are written down."""
    stated = module.settings.get("pooling_mode")
    if stated is not None:
        return [stated] if isinstance(stated, str) else list(stated)
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key, is_on in module.settings.items() if key.startswith(prefix) and is_on]
    return [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes]


def _module(kind: str, folder: Path, number: int, spec: Spec) -> Module:
    """A module with its settings, if it is one of those that are read, in its place.

    Raises:
        EncoderError: it is not, or computes by code of its own.
    """
    if kind == "CLIPModel":
        raise EncoderError(f"{spec.text} is a CLIP in a folder of sentence-transformers; write hf:{folder}")
    if kind not in (("Transformer",) if number == 0 else _BEHIND):
        raise EncoderError(
            f"{spec.text}: its module {number + 1} is a {kind}; st: takes a Transformer and, behind it, "
            f"{', '.join(_BEHIND)}"
        )
    file = folder / "config.json"
    settings = {}
    if file.is_file() or kind in ("Transformer", "Pooling", "Dense"):
        settings = _read(file, spec, dict)
    settings = {key: value for key, value in settings.items() if key not in _NOISE}
    if kind == "Transformer":
        _check_transformer(folder, spec)
    if kind == "Dense":
        activation = settings.get("activation_function", "")
        if activation and not (isinstance(activation, str) and _ACTIVATION.fullmatch(activation)):
            raise EncoderError(
                f"{spec.text}: its module Dense names the activation {activation!r:.80}, code of its own, which is "
                "never run; use a model with one of torch's"
            )
    return Module(kind, folder, settings)


def _check_transformer(folder: Path, spec: Spec) -> None:
    """Refuses a transformer that is an adapter, or whose output are no hidden states.

    Raises:
        EncoderError: it is one.
    """
    if (folder / "adapter_config.json").is_file():
        raise EncoderError(f"{spec.text} is an adapter of another model; merge the two and save the whole model")
    if not (folder / TRANSFORMER).is_file():
        return
    modality = _read(folder / TRANSFORMER, spec, dict).get("modality_config") or {"text": _HIDDEN_STATES}
    if not isinstance(modality, dict) or modality.get("text") != _HIDDEN_STATES:
        raise EncoderError(f"{spec.text}: its transformer gives no hidden states of a text; write hf:{folder}")


def _read(path: Path, spec: Spec, kind: type) -> Any:
    """A file of JSON.

    Raises:
        EncoderError: it is missing or damaged, or holds something else than a ``kind``.
    """
    try:
        content = json.loads(read_bytes(path, MAX_TEXT))
    except (OSError, FileError, ValueError, RecursionError) as error:
        kind_of_error = type(error).__name__
        raise EncoderError(f"{spec.text}: {path} cannot be read ({kind_of_error}); save the model anew") from error
    if not isinstance(content, kind):
        raise EncoderError(f"{spec.text}: {path} is not what sentence-transformers writes; save the model anew")
    return content
