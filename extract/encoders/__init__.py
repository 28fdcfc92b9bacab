"""Encoder libraries, found by the prefix of a specification: each is one file here, or a module of another package.

``torchvision:resnet50@IMAGENET1K_V1`` names a model of the library whose ``NAME`` is ``torchvision``. Another package
adds a library by an entry point of the group ``onceover.encoders``. A library is a module, or an object, with what
``Library`` lists; it imports torch only within the functions that load and save, so that specifications are parsed, and
a store that is up to date is recognised, at once. ``extract.encoding`` turns a loaded model into an encoder.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from onceover.base.errors import OnceoverError
from onceover.base.registry import Registry

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

ENCODERS = Registry("onceover.extract.encoders", "onceover.encoders", "encoder library")
IMPORTED = "import"  # the prefix that stands in a store for the unknown encoder of imported features
NETWORK_TIMEOUT = 5  # seconds without an answer before a download is given up
SEPARATOR = " + "  # between the specifications of encoders whose features lie side by side
_NEXT_SPEC = re.compile(re.escape(SEPARATOR) + r"(?=[A-Za-z_]\w*:)")
_MAX_NAME = 255  # bytes of a file's or folder's name


class EncoderError(OnceoverError):
    """An encoder that cannot be had, or that is not what it should be."""


@dataclass(frozen=True)
class Spec:
    """A parsed specification of an encoder.

    Attributes:
        text: the specification as it was written.
        library: the ``NAME`` of its library.
        name: the model, or the folder that it lies in.
        weights: a name or a file, ``random``, or "" where a library has one set of weights per model.
        revision: a version of the model, where a library has several.
        prompt: the name of a text that is put before each caption and query, where a model has some.
    """

    text: str
    library: str
    name: str
    weights: str
    revision: str | None = None
    prompt: str = ""

    def located(self) -> str:
        """The specification with a local folder or file as an absolute path, good from anywhere."""
        for path in (self.name, self.weights):
            if path and Path(path).exists():
                return self.text.replace(path, str(Path(path).resolve()), 1)
        return self.text

    def missing(self) -> Path | None:
        """The absolute path of the model or its weights, if nothing is there."""
        for path in (self.name, self.weights):
            if Path(path).is_absolute() and not Path(path).exists():
                return Path(path)
        return None

    @property
    def random(self) -> bool:
        """Whether the weights are a seeded initialisation."""
        return self.weights == "random"


class PreprocessSteps(NamedTuple):
    """The preprocessing that belongs to an image model's weights, as its library has it.

    Attributes:
        whole: all steps, an RGB image -> float32 (3, H, W).
        pixels: the steps up to pixels of 8 bits, an RGB image -> uint8 (3, H, W).
        levels: the steps after that, uint8 (3, 1, L) -> float32 (3, 1, L).
        resized: pixels of the shorter side after resizing; 0 where nothing is resized.
        cropped: pixels of a side after the centre is cut out; 0 where nothing is.
    """

    whole: Callable[["Image.Image"], "Tensor"]
    pixels: Callable[["Image.Image"], "Tensor"]
    levels: Callable[["Tensor"], "Tensor"]
    resized: int
    cropped: int


class ImageModel(NamedTuple):
    """A loaded image model.

    Attributes:
        module: the network, float32 on the processor.
        steps: its preprocessing.
        pool: (module, float32 (B, 3, H, W)) -> its own feature (B, D).
        recipe: ``architecture``, ``preprocessing`` and ``pooling`` as plain values. The pooling ``projection`` marks a
            dual encoder's image tower, whose feature is its own projection alone.
    """

    module: "nn.Module"
    steps: PreprocessSteps
    pool: Callable[["nn.Module", "Tensor"], "Tensor"]
    recipe: dict[str, Any]


class Tokenizer(Protocol):
    """A tokenizer; one call of it is under way at a time.

    It may have two more attributes, and without them nothing is counted or compared: ``unknown_id``, the id that stands
    for what the vocabulary lacks (None where there is none), and ``size``, how many ids there are.

    Attributes:
        files: its files by name, enough to make it again without the dataset; names as in
            ``encoder_files.TOKENIZER_FILES``.
    """

    files: dict[str, bytes]

    @property
    def pad_id(self) -> int:
        """The id that fills up a batch."""

    @property
    def frame_ids(self) -> list[int]:
        """The ids that stand around each caption and are no words."""

    def token_ids(self, captions: list[str], max_length: int | None) -> list[list[int]]:
        """The token ids of captions, cut at ``max_length`` tokens unless it is None."""


class TextModel(NamedTuple):
    """A loaded text model.

    Attributes:
        module: the network, float32 on the processor.
        tokenizer: its tokenizer.
        states: (module, ``input_ids`` and ``attention_mask``, int64 (B, L)) -> hidden states (B, L, D) by layer:
            ``last``, and numbers from 0, what enters the first layer, to ``depth``. Of a projection: (B, D), ``last``.
        recipe: ``architecture`` as a plain value.
        max_length: the most tokens that it takes.
        depth: how many layers it has.
        words: (module, ``input_ids``) -> the embeddings of its tokens, (B, L, D). None for a projection, which has no
            other layers.
        pool: (module, the layer ``last``, inputs) -> its own feature (B, E), for a model that comes with a pooling;
            None where tokens are pooled as the settings say.
        is_projection: whether it is a dual encoder's text tower, whose feature is its own projection alone.
        takes_full_length: whether captions are padded to the maximum length, with no mask.
        pooling: over its tokens, unless the user says otherwise: ``mean``, ``cls`` (the first token) or ``last``.
        is_causal: whether a token sees only itself and those before it.
        vocabulary: how many ids the network knows; None where it cannot be said.
    """

    module: "nn.Module"
    tokenizer: Tokenizer
    states: Callable[["nn.Module", dict[str, "Tensor"]], dict[str | int, "Tensor"]]
    recipe: dict[str, Any]
    max_length: int
    depth: int = 0
    words: Callable[["nn.Module", "Tensor"], "Tensor"] | None = None
    pool: Callable[["nn.Module", "Tensor", dict[str, "Tensor"]], "Tensor"] | None = None
    is_projection: bool = False
    takes_full_length: bool = False
    pooling: str = "mean"
    is_causal: bool = False
    vocabulary: int | None = None


class Library(Protocol):
    """A library that models come from.

    A library may have ``knows(text) -> str | None`` as well: the specification of the model that somebody means who
    writes ``text`` without the prefix, if it has one; where only the case or a hyphen differs, as it should be written.
    It is asked only about a text that is no specification, so it may take the time to import its library.

    Attributes:
        NAME: the prefix of its specifications.
        FORM: how its specifications are written, for messages.
    """

    NAME: str
    FORM: str

    def parse(self, text: str) -> Spec:
        """Parses a specification, ``NAME:`` and at least one more character."""

    def change_stamp(self, spec: Spec) -> dict[str, Any]:
        """Plain values that differ when the model behind ``spec`` may have changed, had without loading it."""

    def load_image(self, spec: Spec, seed: int) -> ImageModel:
        """Loads an image model; ``seed`` is for random weights. Code that lies beside weights is never run.

        Raises:
            EncoderError: it cannot be had, or is no image model.
        """

    def load_text(
        self, spec: Spec, seed: int, captions: Sequence[str] | None, tokenizer_files: dict[str, bytes] | None
    ) -> TextModel:
        """Loads a text model, its tokenizer from ``tokenizer_files`` where they are given.

        ``captions`` are there for a tokenizer whose vocabulary is the dataset's.

        Raises:
            EncoderError: it cannot be had, or is no text model.
        """

    def save(self, spec: Spec, kind: str, module: "nn.Module", folder: Path) -> str:
        """Writes the weights of the ``image`` or ``text`` model of ``spec``, and what it needs beside them.

        A tokenizer's files are there already. Files are named as in ``encoder_files.ENCODER_FILES``.

        Returns:
            The specification of what was written.
        """

    def write_example(self, folder: Path) -> dict[str, str]:
        """Writes small untrained models, where any file is needed; returns their specifications by kind."""


def parse_spec(text: str) -> Spec:
    """Parses an encoder specification. A folder that only one library can read may stand there without a prefix.

    Raises:
        EncoderError: not of a known form, or of features that were imported.
        RegistryError: a library of another package cannot be imported.
    """
    prefix, colon, rest = text.partition(":")
    if prefix == IMPORTED and rest:
        raise EncoderError(
            f"{text}: these features were imported, and there is no encoder to embed a query or to extend the store "
            "with; onceover extract makes a store that has one"
        )
    libraries = _libraries()
    if colon and rest and prefix in libraries and _can_be_path(rest):
        return libraries[prefix].parse(text)
    meant = _meant(text, libraries)
    if len(meant) == 1 and Path(text).is_dir():
        return parse_spec(meant[0])
    forms = ", ".join(library.FORM for library in libraries.values())
    if meant:
        raise EncoderError(f"{text!r:.80} is no encoder specification; write {' or '.join(meant)} (the forms: {forms})")
    raise EncoderError(f"{text!r:.80} is no encoder specification; write {forms}")


def _meant(text: str, libraries: dict[str, Library]) -> list[str]:
    """The specifications that somebody may mean who writes ``text``, which is none; the default library's first."""
    if not text or not _can_be_path(text):
        return []
    specs = [library.knows(text) for library in libraries.values() if hasattr(library, "knows")]
    meant = [spec for spec in specs if spec is not None]
    exact = [spec for spec in meant if spec.endswith(f":{text}")]
    if meant:
        return exact or meant
    prefix, _, rest = text.partition(":")
    names = {}  # what people write for a prefix: that in other case, or the library's whole name
    for name in ENCODERS.names():
        names[name] = ENCODERS.load(name).NAME
    names |= {name: name for name in libraries}
    near = difflib.get_close_matches(prefix.lower(), names, n=1)
    if near and rest:
        return [f"{names[near[0]]}:{rest}"]
    return []


def specs_of(text: str) -> list[str]:
    """The specifications of joined encoders, one by one.

    >>> specs_of("torchvision:resnet50 + hf:encoders/clip")
    ['torchvision:resnet50', 'hf:encoders/clip']
    """
    return _NEXT_SPEC.split(text)


def is_imported(text: str) -> bool:
    """Whether features were imported without their encoder, or one of several joined ones was."""
    return any(spec.partition(":")[0] == IMPORTED for spec in specs_of(text))


def located(text: str) -> str:
    """The specifications of one encoder or of several joined ones, as ``Spec.located``."""
    if is_imported(text):
        return text
    return SEPARATOR.join(parse_spec(spec).located() for spec in specs_of(text))


def library_of(spec: Spec) -> Library:
    """The library of a parsed specification."""
    return _libraries()[spec.library]


def change_stamp(spec: Spec, seed: int) -> dict[str, Any]:
    """Plain values that tell whether the encoder behind ``spec`` may have changed, had without loading it.

    File names, sizes and modification times of local weights; a cached model's commit; library versions where those
    decide. Equal stamps mean the same features; different ones, that the encoder has to be loaded and hashed.
    """
    stamp: dict[str, Any] = {"library": spec.library, "weights": spec.weights}
    if spec.random:
        stamp |= {"seed": seed, "torch": version("torch"), "transformers": version("transformers")}
    return stamp | library_of(spec).change_stamp(spec)


def file_stamps(paths: Iterable[Path]) -> list[list[Any]]:
    """Names, sizes and modification times of files, for a change stamp."""
    stamps = []
    for path in paths:
        stat = path.stat()
        stamps.append([path.name, stat.st_size, stat.st_mtime_ns])
    return stamps


def _libraries() -> dict[str, Library]:
    """All libraries by their prefixes, backwards: torchvision, whose models need no extra, before timm.

    Raises:
        EncoderError: two with one prefix. RegistryError: one cannot be imported.
    """
    libraries: dict[str, Library] = {}
    for name in ENCODERS.names():
        library = ENCODERS.load(name)
        if library.NAME in libraries:
            raise EncoderError(f"the prefix {library.NAME}: is claimed by several encoder libraries; keep one of them")
        libraries[library.NAME] = library
    return dict(sorted(libraries.items(), reverse=True))


def _can_be_path(name: str) -> bool:
    """Whether a file system could have that name; to ask it for any other is an error."""
    if "\0" in name:
        return False
    return max(len(part) for part in os.fsencode(name).split(b"/")) <= _MAX_NAME
