"""Settings as frozen dataclasses, and the strict loader that fills them.

A setting comes from the defaults below, then from a YAML file, then from ``key=value`` overrides, in this order.
An unknown key, a value of the wrong type and a value out of range are errors; for an unknown key the error suggests
the nearest match.
"""

import difflib
import math
import os
import stat
import types
import typing
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from onceover.base.errors import OnceoverError

DEFAULT_CONFIG = Path(__file__).parent / "config.yaml"
TEXT_POOLINGS = ("mean", "cls", "last")  # over the tokens of a caption
MAX_CONFIG = 2**16  # bytes of a settings file, twenty times what one with every setting and its comment takes
MAX_SEED = 2**63 - 1  # what a signed 64-bit number holds
MAX_COUNT = 1_000_000  # epochs, or looks
MAX_BATCH = 2**20  # images per step
MAX_DIMENSION = 65_536  # of embeddings
MAX_MEMBERS = 1000  # of an ensemble
_SHOWN = 80  # characters of a value that a message repeats


class ConfigError(OnceoverError):
    """A setting that does not exist, has the wrong type or is out of range."""

    exit_code = 2


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    _check(value in choices, f"{key} is {value!r:.80}; choose one of {', '.join(choices)}")


def _check_most(settings: object, section: str, bounds: dict[str, int]) -> None:
    """Refuses settings above a bound, by name; None is a setting that is not set."""
    for name, most in bounds.items():
        value = getattr(settings, name)
        _check(value is None or value <= most, f"{section}.{name} is {value}; it can be at most {most:,}")


def _check_finite(settings: object, section: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(settings, name)
        _check(math.isfinite(value), f"{section}.{name} is {value}; it must be a finite number")


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of stage 1, extraction: the encoders, and the features that are cached of each image and caption."""

    image_encoder: str = "torchvision:resnet50@IMAGENET1K_V1"
    text_encoder: str = "hf:distilbert-base-uncased"
    image_layers: str = "auto"  # last and names of modules, concatenated; auto: those known to pay; more: further ones
    text_layers: str = "auto"  # last, middle, numbers of hidden states, words; auto: last,middle,words
    text_pooling: str = "auto"  # over a caption's tokens: mean, cls (first), last; auto: as the encoder was trained
    max_length: int = 128  # tokens per caption; longer ones are cut, counted and reported
    caption_prefix: str = ""  # put before each caption, as E5's "passage: "
    query_prefix: str | None = None  # put before each query, as E5's "query: "; null: as before captions
    views: int = 4  # 1: the plain image; 2: and its mirror image; 3, 4: both uncropped; 5 to 12: corners
    dtype: str = "float32"  # compute dtype; auto: half precision where native, if a sample's features hardly change
    store_dtype: str = "float32"  # storage dtype
    batch_size: int | None = None  # images per forward pass; null: chosen for the device
    thumbnails: bool = True
    seed: int = 0  # of @random encoders, and of the split where none is published

    def __post_init__(self) -> None:
        for key in ("image_layers", "text_layers"):
            names = [name.strip() for name in getattr(self, key).split(",")]
            _check(
                all(names),
                f"extract.{key} is {getattr(self, key)!r:.80}; write auto, more, or names with commas between them",
            )
            _check(len(set(names)) == len(names), f"extract.{key} names a layer twice")
        _check_choice("extract.text_pooling", self.text_pooling, ("auto", *TEXT_POOLINGS))
        _check_choice("extract.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _check_choice("extract.store_dtype", self.store_dtype, ("float32", "float16"))
        _check(1 <= self.views <= 12, f"extract.views is {self.views}; it must lie between 1 and 12")
        _check(self.seed >= 0, f"extract.seed is {self.seed}; it cannot be negative")
        _check(self.max_length >= 3, f"extract.max_length is {self.max_length}; a caption needs at least 3 tokens")
        _check(
            self.batch_size is None or self.batch_size >= 1,
            f"extract.batch_size is {self.batch_size}; it must be at least 1, or null to have it chosen",
        )
        _check_most(self, "extract", {"seed": MAX_SEED, "max_length": 65_536, "batch_size": 65_536})


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the projection heads."""

    head: str = "linear"  # linear; mlp: a residual block with GELU and LayerNorm behind the projection
    embedding_dim: int = 512
    dropout: float = 0.3  # of the standardised features, in steps of 1/256
    block_dropout: float = 0.0  # the part of an image's features that a block of neighbours takes, which is left out
    variation: float = 1.5  # strength of feature transfer: differences between views, or captions, of other images
    temperature: float = 0.07
    learn_temperature: bool = True  # temperature is then where it starts, kept within [0.01, 1]
    rerank: str = "qbnorm"  # correct searches for hubs with a bank of training queries; none: do not

    def __post_init__(self) -> None:
        _check_choice("model.head", self.head, ("linear", "mlp"))
        _check_choice("model.rerank", self.rerank, ("none", "qbnorm"))
        _check(self.embedding_dim >= 2, f"model.embedding_dim is {self.embedding_dim}; it must be at least 2")
        _check_most(self, "model", {"embedding_dim": MAX_DIMENSION})
        _check(
            0 <= self.block_dropout <= 0.9,
            f"model.block_dropout is {self.block_dropout}; it must lie between 0 and 0.9",
        )
        _check(0 <= self.dropout <= 0.99, f"model.dropout is {self.dropout}; it must lie between 0 and 0.99")
        _check(0 <= self.variation <= 10, f"model.variation is {self.variation}; it must lie between 0 and 10")
        _check(0.001 <= self.temperature <= 10, f"model.temperature is {self.temperature}; use 0.001 to 10")
        if self.learn_temperature:
            _check(
                0.01 <= self.temperature <= 1,
                f"model.temperature is {self.temperature}; a learned temperature starts within [0.01, 1]",
            )


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of stage 2, fitting the heads."""

    loss: str = "contrastive"  # CLIP's; sigmoid: SigLIP's; or one that another package adds (heads/losses)
    # ensemble members, trained together; their scores are averaged. Member k has the start and the noise of
    # ``seed`` + k, so the seeds of several ensembles must be at least as far apart as an ensemble has members
    members: int = 1
    cca: bool = True  # beside the trained heads a CCA in closed form, or the features' own space; its weight is chosen
    num_epochs: int | None = None  # one epoch passes every caption once; null: 15 to 30, more with more train images
    batch_size: int | None = None  # images per step; null: an eighth of the train images, from 64 to 256
    captions_per_image: int = 5  # captions drawn per image of a batch, at most
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.05  # fraction of all steps; the cosine decay to zero fills the rest
    check_every: int = 3  # epochs between evaluations on the validation split; the last epoch is always evaluated
    patience: int = 10  # stop after this many epochs without a better rsum; 0: never
    refit: bool = True  # once everything is chosen, fit again on train and validation images together
    shuffle_pairs: bool = False  # a sanity check: train images swap captions, so that nothing can be learned
    dtype: str = "float32"  # dtype of matrix products in training; auto: bfloat16, or a GPU's TF32, where native
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("members", "captions_per_image", "check_every"):
            _check(getattr(self, key) >= 1, f"training.{key} is {getattr(self, key)}; it must be at least 1")
        _check(
            self.num_epochs is None or self.num_epochs >= 1,
            f"training.num_epochs is {self.num_epochs}; it must be at least 1, or null to have it chosen",
        )
        _check(
            self.batch_size is None or self.batch_size >= 2,
            f"training.batch_size is {self.batch_size}; a contrast needs at least 2 images (null has it chosen)",
        )
        _check(self.learning_rate > 0, f"training.learning_rate is {self.learning_rate}; it must be above 0")
        _check(self.weight_decay >= 0, f"training.weight_decay is {self.weight_decay}; it cannot be negative")
        _check(0 <= self.warmup <= 1, f"training.warmup is {self.warmup}; it is a share, 0 to 1")
        _check(self.seed >= 0, f"training.seed is {self.seed}; it cannot be negative")
        _check(self.patience >= 0, f"training.patience is {self.patience}; use 0 to switch early stopping off")
        _check_choice("training.dtype", self.dtype, ("float32", "auto"))
        _check_most(self, "training", {"members": MAX_MEMBERS, "batch_size": MAX_BATCH, "captions_per_image": 1000})
        _check_most(self, "training", {"num_epochs": MAX_COUNT, "check_every": MAX_COUNT, "patience": MAX_COUNT})
        _check_most(self, "training", {"seed": MAX_SEED})
        _check_finite(self, "training", ("learning_rate", "weight_decay"))

    @property
    def epochs(self) -> int:
        """``num_epochs``, which ``heads.schedule`` has completed."""
        assert self.num_epochs is not None, "heads.schedule.scheduled sets it"
        return self.num_epochs

    @property
    def images_per_step(self) -> int:
        """``batch_size``, which ``heads.schedule`` has completed."""
        assert self.batch_size is not None, "heads.schedule.scheduled sets it"
        return self.batch_size


@dataclass(frozen=True)
class FinetuneConfig:
    """The optional third stage: how unfrozen layers of the encoders are fine-tuned together with the heads."""

    num_epochs: int = 8  # one epoch passes every caption once
    batch_size: int = 256  # images per step
    captions_per_image: int = 5  # captions drawn per image of a batch, at most
    micro_batch: int = 256  # images whose activations must fit the memory; below batch_size: gradient caching
    learning_rate: float = 3e-4  # of the encoders' top layers
    layer_decay: float = 0.8  # factor on the learning rate per layer, from the top down
    heads_factor: float = 3.0  # factor on the learning rate, for the heads
    weight_decay: float = 0.05
    warmup: float = 0.1  # fraction of all steps; the cosine decay to zero fills the rest
    patience: int = 5  # stop after this many epochs without a better rsum; 0: never; needs validation images
    word_dropout: float = 0.1  # fraction of a caption's tokens left out, drawn in each step
    augment: bool = True  # without cached activations: random crops and mirror images instead of the stored views
    checkpoint: bool = False  # gradient checkpointing: a third more time, less memory
    dtype: str = "auto"  # dtype of the unfrozen layers' products; auto: bfloat16 where native, else float32
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("num_epochs", "captions_per_image", "micro_batch"):
            _check(getattr(self, key) >= 1, f"finetune.{key} is {getattr(self, key)}; it must be at least 1")
        _check(self.batch_size >= 2, f"finetune.batch_size is {self.batch_size}; a contrast needs at least 2 images")
        for key in ("learning_rate", "heads_factor"):
            _check(getattr(self, key) > 0, f"finetune.{key} is {getattr(self, key)}; it must be above 0")
        _check(0 < self.layer_decay <= 1, f"finetune.layer_decay is {self.layer_decay}; it must lie above 0, up to 1")
        _check(self.weight_decay >= 0, f"finetune.weight_decay is {self.weight_decay}; it cannot be negative")
        for key in ("warmup", "word_dropout"):
            _check(0 <= getattr(self, key) <= 1, f"finetune.{key} is {getattr(self, key)}; it is a share, 0 to 1")
        _check(self.patience >= 0, f"finetune.patience is {self.patience}; use 0 to switch early stopping off")
        _check_choice("finetune.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _check(self.seed >= 0, f"finetune.seed is {self.seed}; it cannot be negative")
        _check_most(self, "finetune", {"batch_size": MAX_BATCH, "micro_batch": MAX_BATCH, "captions_per_image": 1000})
        _check_most(self, "finetune", {"num_epochs": MAX_COUNT, "patience": MAX_COUNT, "seed": MAX_SEED})
        _check_finite(self, "finetune", ("learning_rate", "heads_factor", "weight_decay"))


@dataclass(frozen=True)
class Config:
    """All settings; the groups are the sections of the YAML file."""

    extract: ExtractConfig = field(default_factory=ExtractConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested plain values, ready for YAML or JSON."""
        return asdict(self)


def load_config(path: str | Path | None = None, overrides: typing.Iterable[str] = ()) -> Config:
    """Settings from the defaults, then the YAML file at ``path``, then ``section.key=value`` overrides.

    Raises:
        ConfigError: an unreadable file, an unknown key, a wrong type, a value out of range.

    Example:
        >>> config = onceover.load_config(None, ["training.num_epochs=5", "model.temperature=0.05"])
        >>> config.training.num_epochs, config.model.temperature
        (5, 0.05)
        >>> onceover.load_config(None, ["training.num_epoch=5"])
        Traceback (most recent call last):
        onceover.configs.schema.ConfigError: ...; did you mean training.num_epochs?
    """
    tree = {} if path is None else _read_tree(path)
    for override in overrides:
        section, name, value = _parse_override(override)
        source = f"the override {override!r:.80}"
        settings = _section_type(_field_of(Config, section, "", source))
        _field_of(settings, name, f"{section}.", source)
        values = tree.setdefault(section, {}) if isinstance(tree, dict) else None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: the section {section!r:.80} must hold key: value lines")
        values[name] = value
    return config_from_dict(tree, str(path) if path is not None else "the settings")


def read_config_text(path: str | Path) -> str:
    """The text of a settings file: a regular one, of at most ``MAX_CONFIG`` bytes.

    Raises:
        ConfigError: not there, no regular file, too large, or not UTF-8.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            _check(
                stat.S_ISREG(os.fstat(file.fileno()).st_mode), f"the config {path} is no regular file; name a YAML file"
            )
            data = file.read(MAX_CONFIG + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"the config {path} cannot be read: {error}") from error
    _check(len(data) <= MAX_CONFIG, f"the config {path} is larger than {MAX_CONFIG:,} bytes; name a file of settings")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the config {path} cannot be read: {error.reason} at byte {error.start:,}") from error


def _open_at_once(path: str, flags: int) -> int:
    """Opens a FIFO without waiting for its writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read_tree(path: str | Path) -> Any:
    """Reads the value of a settings file, whatever it is; an empty file is an empty mapping."""
    from onceover.configs.plain_yaml import parse_yaml

    text = read_config_text(path)
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return {} if tree is None else tree


def _parse_override(override: str) -> tuple[str, str, object]:
    """Section, name and value of ``section.key=value``."""
    from onceover.configs.plain_yaml import parse_yaml

    key, separator, text = override.partition("=")
    _check(bool(separator) and bool(key.strip()), f"{override!r:.80} is not an override; write section.key=value")
    section, dot, name = key.strip().partition(".")
    _check(bool(dot), f"{key!r:.80} names no section; write section.key=value, for example {_example(section)}")
    _check(len(text) <= MAX_CONFIG, f"the value of {key!r:.80} is longer than {MAX_CONFIG:,} characters; shorten it")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{override!r:.80} has no readable value: {error}") from error
    if isinstance(value, dict) or value == text.strip():
        value = text  # as typed: the blank of a prefix counts, and "query: " is no mapping
    return section, name, value


def config_from_dict(tree: object, source: str) -> Config:
    """Settings from nested plain values; ``source`` is named in errors."""
    config = _build(Config, tree, "", source)
    assert isinstance(config, Config)
    return config


def _example(key: str) -> str:
    """An override that sets the setting whose name is nearest to ``key``."""
    names: dict[str, str] = {}  # the whole key by the setting's name
    for section in fields(Config):
        for setting in fields(_section_type(section)):
            names.setdefault(setting.name, f"{section.name}.{setting.name}")
    near = difflib.get_close_matches(key[:_SHOWN], names, n=1)
    if near:
        return f"{names[near[0]]}=…"
    return "training.num_epochs=5"


def _section_type(section: Field[Any]) -> type[Any]:
    """The class of a section of the settings."""
    assert isinstance(section.type, type)
    return section.type


def _build(cls: type[Any], tree: object, prefix: str, source: str) -> object:
    """An instance of a dataclass of settings, from a mapping of them.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or out of range.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: {prefix.rstrip('.') or 'the file'} must hold key: value lines")
    values = {}
    for key, value in tree.items():
        kind: Any = _field_of(cls, key, prefix, source).type
        if is_dataclass(kind):
            assert isinstance(kind, type)
            values[key] = _build(kind, value, f"{prefix}{key}.", source)
        else:
            values[key] = _coerce(value, kind, f"{prefix}{key}")
    return cls(**values)


def _field_of(cls: type[Any], key: object, prefix: str, source: str) -> Field[Any]:
    """The field of a dataclass of settings that a key names.

    Raises:
        ConfigError: there is none; ``source`` is where the key stands.
    """
    known = {setting.name: setting for setting in fields(cls)}
    if key not in known:
        raise ConfigError(_unknown_key(_shown(key), list(known), prefix, source))
    return known[key]


def _unknown_key(key: str, known: list[str], prefix: str, source: str) -> str:
    """The message for an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"known keys: {', '.join(known)}"
    if near:
        hint = f"did you mean {prefix}{near[0]}?"
    return f"{source} has an unknown key {prefix}{key}; {hint}"


def _shown(key: object) -> str:
    """A key for a message: on one line, and cut where it is long."""
    text = str(key)[:_SHOWN]
    if text.isprintable():
        return text
    return f"{text!r:.80}"


def _coerce(value: Any, kind: Any, key: str) -> object:
    """``value`` as ``kind``, widening only where the meaning is clear: 1 as a float, and '1e-3', YAML 1.1's text.

    Raises:
        ConfigError: it is of another type.
    """
    optional = isinstance(kind, types.UnionType)
    if optional:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        if value is None:
            return None
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        _check(kind is not str or _is_text(value), f"{key} is {value!r:.80}; it holds a character that is no text")
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    if optional:
        wanted += " or null"
    raise ConfigError(f"{key} is {value!r:.80}; it must be {wanted}")


def _is_text(value: str) -> bool:
    """Whether text can be written down and name a file: YAML's escapes can make a NUL and halves of characters."""
    return "\0" not in value and value.encode("utf-8", "ignore").decode() == value
