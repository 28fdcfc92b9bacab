"""Frozen encoders: what turns images and captions into features. The only importer of torchvision and transformers.

An encoder is always in eval mode: BatchNorm uses its stored statistics and dropout is inert, so a feature does not
depend on what else is in its batch beyond the last bits of the arithmetic. Gradients are off, and modules are fused to
be faster; one made with ``plain`` keeps its modules as they were saved, in float32, so that ``heads.finetune`` can
train them and ``save`` can write them.
"""

import contextlib
import copy
import difflib
import hashlib
import itertools
import json
import os
import pickle
import re
import socket
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from onceover.base.errors import OnceoverError, first_line
from onceover.base.files import check_regular, digest
from onceover.extract import pictures
from onceover.extract.inference import fold_batch_norms, optimise, use_onednn
from onceover.extract.specs import EncoderError, Spec, known_tokenizer_files, parse_spec, without_code

STREAMS = 2  # batches on a GPU at a time: one is copied while the other is computed
NETWORK_TIMEOUT = 5  # seconds without an answer before a download is given up
_DISTILBERT = "distilbert-base-uncased"
_SPECIAL_TOKENS = {
    name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
}
_IMAGE_LAYERS = {  # the start of an architecture's name -> layers that pay together
    "MobileNetV2Model": ["last", "layer.15.conv_3x3", "layer.12.expand_1x1"],
    "torchvision:resnet": ["last", "layer3"],  # not measured: pretrained weights could not be had
}
_WEIGHT_KEYS = ("state_dict", "model_state_dict", "model")  # under which programs that train keep weights
_WEIGHT_PREFIXES = ("module.", "_orig_mod.", "model.")  # of torch's wrappers and of training frameworks
_SYSTEM_ERROR = re.compile(r"\(os error (\d{1,4})\)")
_CONFIG_NOISE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "id2label",
    "label2id",
}


def pick_device(name: str | None = None) -> torch.device:
    """The device called ``name``, or the best one at hand: CUDA, Apple's, the processor.

    On CUDA convolutions in float32 are then computed in float32; torch would round what they take to 10 bits (TF32).

    Raises:
        EncoderError: no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()
    except Exception as error:  # each backend raises its own
        raise EncoderError(f"the device {name!r:.80} cannot be used ({_reason(error)}); try --device cpu") from error
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return device


def joined(blocks: list[Tensor], device: torch.device) -> Tensor:
    """Blocks of rows, one after the other, where ``device`` copies from the fastest: (n, …) each -> (N, …)."""
    shape = (sum(map(len, blocks)), *blocks[0].shape[1:])
    return torch.cat(blocks, out=torch.empty(shape, dtype=blocks[0].dtype, pin_memory=device.type == "cuda"))


class _Lanes:
    """A device. On CUDA, calls alternate between streams, so that one batch is copied while another is computed."""

    def __init__(self, device: torch.device):
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(STREAMS)] if device.type == "cuda" else []
        self._turns = itertools.cycle(self._streams)

    def begin(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], np.ndarray]:
        """Begins ``compute`` of ``inputs``, which lie on the processor; the call that is returned waits for the result.

        Elsewhere than on CUDA it is there already.
        """
        if not self._streams:
            return compute(*(each.to(self._device) for each in inputs)).cpu().numpy
        with torch.cuda.stream(next(self._turns)):
            found = compute(*(each.pin_memory().to(self._device, non_blocking=True) for each in inputs))
            output = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
            done = torch.cuda.current_stream(self._device).record_event()

        def finish() -> np.ndarray:
            done.synchronize()
            return output.numpy()

        return finish


class Preprocessing:
    """What comes before an image encoder's network and belongs to its weights, in two steps.

    ``pixels`` are of 8 bits, and are made on a processor: a GPU would round in another way. ``scaled`` gives each level
    its number, on any device.

    Attributes:
        views: what they show (``pictures.VIEWS``).
        short_side: pixels that an image's shorter side must have for nothing to be lost (``pictures.decode``), or
            None where the preprocessing does not say.
        preprocess: an RGB image -> uint8 (3, H, W); where the two steps cannot be told apart, float32 and scaled.
    """

    def __init__(self, steps: "_Steps", views: int):
        self._resized, self._cropped, self.preprocess, self._levels = steps.resized, steps.cropped, steps.pixels, None
        self.views = _views(views, self._resized >= self._cropped > 0)
        self.short_side = pictures.needed(self._resized, self.views) if self._resized else None
        self._parts = list(dict.fromkeys(part for part, _ in self.views))
        gradient = Image.linear_gradient("L")
        sample = Image.merge("RGB", [gradient.rotate(angle) for angle in (0, 90, 180)])
        whole = steps.whole(sample)
        with contextlib.suppress(Exception):  # processors differ in which of their steps can be left out
            self._levels = steps.levels(torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)).flatten(1)
            if torch.equal(self.scaled(self.preprocess(sample)[None])[0], whole):
                return
        self.preprocess, self._levels = steps.whole, None

    def pixels(self, picture: Image.Image) -> Tensor:
        """The P different parts of an RGB image that its views show: (P, 3, H, W) of ``preprocess``."""
        return torch.stack([self.preprocess(self._part(picture, part)) for part in self._parts])

    def _part(self, picture: Image.Image, part: str | tuple | None) -> Image.Image:
        """What of an image goes into the preprocessing for a view to show ``part`` (``pictures.VIEWS``)."""
        if part == pictures.WHOLE:
            return pictures.inset(picture, self._resized, self._cropped)
        return pictures.crop(picture, part)

    def view(self, pixels: Tensor, number: int) -> Tensor:
        """One view: (…, P, 3, H, W) of ``pixels`` -> (…, 3, H, W)."""
        part, mirrored = self.views[number]
        shown = pixels.select(-4, self._parts.index(part))
        return shown.flip(-1) if mirrored else shown

    def scaled(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) of pixels as the network takes them, channels last; what is no longer of 8 bits stays."""
        if pixels.dtype != torch.uint8:
            return pixels
        rows = zip(self._levels, pixels.unbind(1), strict=True)
        channels = [levels.index_select(0, each.flatten().int()).view(each.shape) for levels, each in rows]
        return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)

    def on(self, device: torch.device, dtype: torch.dtype) -> "Preprocessing":
        """The same, scaling on ``device`` to ``dtype``."""
        there = copy.copy(self)
        there._levels = None if self._levels is None else self._levels.to(device, dtype)
        return there


class ImageEncoder:
    """A frozen image encoder with the preprocessing that belongs to its weights.

    Attributes:
        recipe: all that changes a feature, as plain values; its digest is the features' fingerprint.
        preprocessing: what comes before the network.
        model: the network.
    """

    def __init__(
        self,
        spec: str,
        *,
        layers: str = "last",
        views: int = 1,
        dtype: str = "float32",
        store_dtype: str = "float32",
        seed: int = 0,
        device: str | None = None,
        plain: bool = False,
    ):
        """``layers``: what is laid side by side (``_image_layers``), as ``extract.image_layers`` in the settings."""
        parsed = parse_spec(spec)
        self._spec, self.device = parsed, pick_device(device)
        self._dtype = torch.float32 if plain else getattr(torch, dtype)
        self._stored = getattr(torch, store_dtype)
        load = _torchvision_image_model if parsed.library == "torchvision" else _hf_image_model
        with _quiet_transformers(), _loading(parsed):
            model, steps, self._pool, recipe = load(parsed, seed)
            self.preprocessing = Preprocessing(steps, views)
        model = model.eval().requires_grad_(False)
        names = _image_layers(layers, recipe)
        self.recipe = _plain(
            recipe
            | {
                "weights": _hash_weights(model),
                "layers": names,
                "views": self.preprocessing.views,
                "short_side": self.preprocessing.short_side,
                "dtype": dtype,
                "store_dtype": store_dtype,
            }
        )
        sample = self.preprocessing.scaled(self.pixels(Image.linear_gradient("L").convert("RGB"))[:1])
        if not plain:
            fold_batch_norms(model, lambda: self._pool(model, sample), names)
        self._layers = _Layers(model, names, spec)
        with torch.no_grad(), _loading(parsed):
            self._layers.joined(lambda: self._pool(model, sample))
        self.model = model.to(self.device, self._dtype, memory_format=torch.channels_last)
        if self.device.type == "cpu" and self._dtype == torch.float32 and not plain:
            optimise(self.model, lambda: self._pool(self.model, sample), names)
        self._scaled = self.preprocessing.on(self.device, self._dtype).scaled
        self._lanes = _Lanes(self.device)

    @property
    def short_side(self) -> int | None:
        """As ``Preprocessing.short_side``."""
        return self.preprocessing.short_side

    def pixels(self, picture: Image.Image) -> Tensor:
        """As ``Preprocessing.pixels``."""
        return self.preprocessing.pixels(picture)

    def encode(self, pixels: Tensor) -> np.ndarray:
        """Features of B pictures: (B, P, 3, H, W) of ``pixels`` -> (B, V, D) as stored, one forward pass a view.

        May be called from several threads.
        """
        return self.begin(pixels)()

    @torch.inference_mode()
    def begin(self, pixels: Tensor) -> Callable[[], np.ndarray]:
        """Begins to encode; the call that is returned waits for what ``encode`` gives."""
        return self._lanes.begin(self._features, pixels)

    def _features(self, pixels: Tensor) -> Tensor:
        views = []
        for number in range(len(self.preprocessing.views)):
            batch = self._scaled(self.preprocessing.view(pixels, number)).to(self._dtype)
            batch = batch.contiguous(memory_format=torch.channels_last)
            views.append(self._layers.joined(partial(self._pool, self.model, batch)))
        return torch.stack(views, dim=1).float().to(self._stored)

    def outputs(self, pixels: Tensor) -> list[Tensor | None]:
        """A pass over images (B, 3, H, W) on the device: (B, D) of each of the recipe's layers; gradients flow.

        ``pixels``: a view of 8-bit pixels, or scaled already. None in the place of a layer without a part in the pass.
        """
        batch = self._scaled(pixels)
        return self._layers.outputs(partial(self._pool, self.model, batch))

    def save(self, folder: Path) -> str:
        """Writes the weights as safetensors, with the preprocessing that belongs to them; returns their spec."""
        if self._spec.library == "torchvision":
            return _save_torchvision(self._spec, self.model, folder / "weights.safetensors")
        with _quiet_transformers(), _system_errors(folder):
            _image_processor(self._spec).save_pretrained(folder)
            self.model.save_pretrained(folder)
        return f"hf:{folder}"


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    Attributes:
        recipe: all that changes a feature, as plain values; its digest is the features' fingerprint.
        tokenizer_files: the tokenizer's files by name, enough to encode a query later without the dataset.
        model: the network.
    """

    def __init__(
        self,
        spec: str,
        *,
        layers: str = "last",
        pooling: str = "mean",
        max_length: int = 128,
        dtype: str = "float32",
        store_dtype: str = "float32",
        seed: int = 0,
        device: str | None = None,
        captions: list[str] | None = None,
        tokenizer_files: dict[str, bytes] | None = None,
        plain: bool = False,
    ):
        """``captions`` give a ``@random`` encoder its vocabulary, unless ``tokenizer_files`` bring one.

        ``layers``: what is laid side by side (``_text_layers``), as ``extract.text_layers`` in the settings.
        """
        parsed = parse_spec(spec)
        if parsed.library != "hf":
            raise EncoderError(f"{spec!r} is no text encoder; use hf:NAME_OR_FOLDER")
        self.device = pick_device(device)
        with _quiet_transformers(), _loading(parsed):
            self._tokenizer, self.tokenizer_files = _tokenizer(parsed, captions, tokenizer_files)
            model, architecture = _hf_text_model(parsed, seed, len(self._tokenizer))
        self._tokenizer_free = threading.Lock()  # it changes while it works
        self._dual = hasattr(model, "get_text_features")
        # SigLIP takes the last position of captions padded to their full length, unmasked, as it was trained
        self._full_length = model.config.model_type.startswith("siglip")
        positions = getattr(getattr(model.config, "text_config", model.config), "max_position_embeddings", max_length)
        self._max_length = min(max_length, self._tokenizer.model_max_length, positions)
        self._pooling = "projection" if self._dual else pooling
        self._layers = _text_layers(layers, model, self._dual)
        model = model.eval().requires_grad_(False)
        self.recipe = _plain(
            {
                "architecture": architecture,
                "weights": _hash_weights(model),
                "tokenizer": _hash_tokenizer(self.tokenizer_files),
                "layers": self._layers,
                "pooling": self._pooling,
                "max_length": self._max_length,
                "dtype": dtype,
                "store_dtype": store_dtype,
            }
        )
        self._stored = getattr(torch, store_dtype)
        self.model = model.to(self.device, torch.float32 if plain else getattr(torch, dtype))
        if self.device.type == "cpu" and not plain:
            use_onednn(self.model)
        self._lanes = _Lanes(self.device)

    def encode(self, captions: list[str], batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Features of M captions, (M, D) as stored, in their order, and which were cut, bool (M,)."""
        token_ids, truncated = self.tokenize(captions)
        batches = list(by_length(token_ids, batch_size))
        features = np.concatenate([self.encode_tokens(ids) for _, ids in batches])
        back = np.argsort(np.concatenate([rows for rows, _ in batches]))
        return features[back], truncated

    def tokenize(self, captions: list[str]) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of M captions, and which were cut at the maximum length, bool (M,). Called from any thread.

        Raises:
            EncoderError: a caption that is no text.
        """
        for number, caption in enumerate(captions, 1):
            if caption.encode("utf-8", "ignore").decode() != caption:
                raise EncoderError(f"text {number:,} of {len(captions):,} holds half a character; write it as UTF-8")
        with self._tokenizer_free:
            return self._tokenized(captions)

    def _tokenized(self, captions: list[str]) -> tuple[list[list[int]], np.ndarray]:
        ids_alone = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        token_ids = self._tokenizer(captions, truncation=True, max_length=self._max_length, **ids_alone)["input_ids"]
        truncated = np.array([len(ids) == self._max_length for ids in token_ids], dtype=bool)
        full = np.flatnonzero(truncated)
        if len(full):
            whole = self._tokenizer([captions[row] for row in full], **ids_alone)["input_ids"]
            truncated[full] = [len(ids) > self._max_length for ids in whole]
        return token_ids, truncated

    def encode_tokens(self, token_ids: list[list[int]]) -> np.ndarray:
        """Features of a batch of B captions, padded to the longest: (B, D) as stored. From several threads at will."""
        return self.begin(token_ids)()

    @torch.inference_mode()
    def begin(self, token_ids: list[list[int]]) -> Callable[[], np.ndarray]:
        """Begins to encode; the call that is returned waits for what ``encode_tokens`` gives."""
        names, inputs = zip(*self._padded(token_ids).items(), strict=True)

        def features(*there: Tensor) -> Tensor:
            return torch.cat(self.outputs(dict(zip(names, there, strict=True))), dim=1).to(self._stored)

        return self._lanes.begin(features, *inputs)

    def padded(self, token_ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """A batch on the device as the model takes it: ``input_ids`` (B, L) and, but for SigLIP, ``attention_mask``."""
        return {name: each.to(self.device) for name, each in self._padded(token_ids).items()}

    def _padded(self, token_ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        lengths = np.array([len(row) for row in token_ids])
        width = self._max_length if self._full_length else lengths.max()
        mask = np.arange(width) < lengths[:, None]
        ids = np.full(mask.shape, self._tokenizer.pad_token_id or 0, dtype=np.int64)
        ids[mask] = np.concatenate(token_ids)
        inputs = {"input_ids": torch.from_numpy(ids)}
        return inputs if self._full_length else inputs | {"attention_mask": torch.from_numpy(mask).long()}

    def outputs(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """A pass over a padded batch: float32 (B, D) of each of the recipe's layers; gradients flow."""
        if self._dual:
            return [_tensor(self.model.get_text_features(**inputs)).float()]
        output = self.model(**inputs, output_hidden_states=True)
        states = {"last": output.last_hidden_state, **dict(enumerate(output.hidden_states))}
        pooled = []
        for layer in self._layers:
            if layer == "words":
                ids = inputs["input_ids"]
                tokens = (self._tokenizer.cls_token_id, self._tokenizer.sep_token_id)
                frame = torch.tensor([token for token in tokens if token is not None], device=ids.device)
                words = inputs["attention_mask"] * ~torch.isin(ids, frame)
                pooled.append(_masked_mean(self.model.get_input_embeddings()(ids), words))
            elif self._pooling == "cls":
                pooled.append(states[layer][:, 0].float())
            else:
                pooled.append(_masked_mean(states[layer], inputs["attention_mask"]))
        return pooled

    def save(self, folder: Path) -> str:
        """Writes the weights as safetensors, and the tokenizer; returns their spec."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.tokenizer_files.items():
            (folder / name).write_bytes(data)
        with _quiet_transformers(), _system_errors(folder):
            self.model.save_pretrained(folder)
        return f"hf:{folder}"


class _Steps(NamedTuple):
    """The preprocessing of weights as their library has it.

    ``whole``: an RGB image -> float32 (3, H, W). ``pixels``: its steps up to uint8 (3, H, W). ``levels``: the steps
    after, for uint8 (3, 1, L). ``resized`` and ``cropped``: pixels of the shorter side, 0 where that is not done.
    """

    whole: Callable[[Image.Image], Tensor]
    pixels: Callable[[Image.Image], Tensor]
    levels: Callable[[Tensor], Tensor]
    resized: int
    cropped: int


class _Layers:
    """What modules within an image encoder put out, averaged over space or tokens, beside its own feature.

    A pass may be under way in several threads.
    """

    def __init__(self, model: nn.Module, names: list[str], spec: str):
        self._names, self._spec, self._seen = names, spec, threading.local()
        modules = dict(model.named_modules())
        for name in names:
            if name != "last":
                if name not in modules:
                    near = difflib.get_close_matches(name, [each for each in modules if each], n=3, cutoff=0.0)
                    raise EncoderError(f"{spec} has no module {name!r}; near are {', '.join(near)}")
                modules[name].register_forward_hook(partial(self._see, name))

    def outputs(self, forward: Callable[[], Tensor]) -> list[Tensor | None]:
        """One pass: (B, D) of each layer, None in the place of one that played no part in it."""
        self._seen.outputs = {}
        self._seen.outputs["last"] = forward()
        return [self._seen.outputs.get(name) for name in self._names]

    def joined(self, forward: Callable[[], Tensor]) -> Tensor:
        """One pass, (B, sum of the layers' dimensions)."""
        outputs = self.outputs(forward)
        missing = [name for name, output in zip(self._names, outputs, strict=True) if output is None]
        if missing:
            raise EncoderError(f"{self._spec}: the module {missing[0]!r} plays no part in a pass; name another layer")
        return torch.cat(outputs, dim=1)

    def _see(self, name: str, _module, _inputs, output) -> None:
        seen = getattr(self._seen, "outputs", {})  # none where autograd's own thread passes a checkpointed block again
        output = output if isinstance(output, Tensor) else output[0]
        if output.ndim == 4:
            last = output.shape[1] == output.shape[2] != output.shape[3]  # some put their channels last
            seen[name] = output.mean((1, 2) if last else (2, 3))
        elif output.ndim == 3:
            seen[name] = output.mean(1)
        else:
            raise EncoderError(f"{self._spec}: the module {name!r} puts out no map and no tokens; name another layer")


def _masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that ``mask``, (B, L), leaves: (B, L, D) -> float32 (B, D); 0 where it leaves none."""
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1).clamp_min(1)


def _views(count: int, cropped: bool) -> list[tuple]:
    """The first views, without those of the whole image where the preprocessing crops nothing."""
    return [view for view in pictures.VIEWS[:count] if cropped or view[0] != pictures.WHOLE]


def _image_layers(layers: str, recipe: dict) -> list[str]:
    """The names of the layers: ``last`` is the encoder's own feature, others are modules within it.

    ``auto``: the layers that are known to pay for an architecture (``_IMAGE_LAYERS``); else ``last``.
    """
    dual = recipe["pooling"] == "projection"
    names = [name.strip() for name in layers.split(",")]
    if names == ["auto"]:
        found = (known for start, known in _IMAGE_LAYERS.items() if recipe["architecture"].startswith(start))
        return ["last"] if dual else next(found, ["last"])
    if dual and names != ["last"]:
        raise EncoderError("a dual encoder's own projection is its feature; leave extract.image_layers at last")
    return names


def _text_layers(layers: str, model: nn.Module, dual: bool) -> list[str | int]:
    """The layers: ``last``, hidden states by number (0: what enters the first layer), and ``words``.

    ``words`` is the mean of the word embeddings, before positions and without the first and last special token;
    ``middle`` the hidden state half-way; ``auto`` is ``last,middle,words``, but for dual encoders.
    """
    names = [name.strip() for name in layers.split(",")]
    if names == ["auto"]:
        names = ["last"] if dual else ["last", "middle", "words"]
    if dual and names != ["last"]:
        raise EncoderError("a dual encoder's own projection is its feature; leave extract.text_layers at last")
    depth = 0 if names == ["last"] else model.config.num_hidden_layers
    chosen: list[str | int] = []
    for name in names:
        layer = depth // 2 if name == "middle" else int(name) if name.isdecimal() else name
        if layer not in ("last", "words", *range(depth + 1)):
            raise EncoderError(f"{name!r} is no layer of the text encoder; use last, middle, words, or 0 to {depth}")
        if layer not in chosen:
            chosen.append(layer)
    return chosen


def by_length(token_ids: list[list[int]], size: int) -> Iterator[tuple[np.ndarray, list[list[int]]]]:
    """Batches of captions of similar length, so that little is padded: their rows, int64 (B,), and their token ids."""
    order = np.argsort([len(ids) for ids in token_ids], kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, [token_ids[row] for row in rows]


def image_encoder_of(
    provenance: dict,
    recipe: dict,
    settings: dict,
    device: str | None = None,
    spec: str | None = None,
    plain: bool = False,
) -> ImageEncoder:
    """The image encoder of a store's or run's provenance and extraction settings; ``spec``: where it is now."""
    return ImageEncoder(
        spec or provenance["encoder"],
        layers=settings["image_layers"],
        views=settings["views"],
        dtype=recipe["dtype"],
        store_dtype=recipe["store_dtype"],
        seed=provenance["seed"],
        device=device,
        plain=plain,
    )


def text_encoder_of(
    provenance: dict,
    recipe: dict,
    settings: dict,
    tokenizer_files: dict,
    device: str | None = None,
    spec: str | None = None,
    plain: bool = False,
) -> TextEncoder:
    """The text encoder of a store's or run's provenance and extraction settings; ``spec``: where it is now."""
    return TextEncoder(
        spec or provenance["encoder"],
        layers=settings["text_layers"],
        pooling=settings["text_pooling"],
        max_length=settings["max_length"],
        dtype=recipe["dtype"],
        store_dtype=recipe["store_dtype"],
        seed=provenance["seed"],
        device=device,
        tokenizer_files=tokenizer_files,
        plain=plain,
    )


def _plain(recipe: dict) -> dict:
    """``recipe`` as it will be read back from JSON: lists in the place of tuples."""
    return json.loads(json.dumps(recipe))


def _torchvision_image_model(spec: Spec, seed: int):
    from torchvision import models
    from torchvision.transforms.functional import convert_image_dtype, normalize

    try:
        weights_enum = models.get_model_weights(spec.name)
        if not hasattr(models, spec.name):
            raise ValueError("not a classifier")
    except ValueError as error:
        raise EncoderError(
            f"{spec.text}: torchvision has no classifier {spec.name!r} (resnet50 and vit_b_16 are two)"
        ) from error
    names = list(weights_enum.__members__)
    file = Path(spec.weights)
    entry = weights_enum[_base_weights(spec, names)]
    if spec.weights not in names and not spec.random and not file.is_file():
        raise EncoderError(
            f"{spec.text}: {spec.weights!r} is neither a file nor one of {spec.name}'s weights: "
            f"{', '.join(names)}, random"
        )
    if spec.weights in names:
        model = _torchvision_pretrained(spec, entry)
        _drop_classifier(model)
    else:
        with _seeded(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GoogLeNet and Inception announce their slow initialisation
            model = models.get_model(spec.name, weights=None)
        classifier = _drop_classifier(model)
        if not spec.random:
            _load_weights(model, file, spec, classifier)
    transforms = entry.transforms()
    recipe = {
        "architecture": f"torchvision:{spec.name}",
        "preprocessing": str(transforms),
        "pooling": "before the classifier",
    }
    steps = _Steps(
        whole=transforms,
        pixels=partial(_torchvision_pixels, transforms),
        levels=lambda levels: normalize(convert_image_dtype(levels), transforms.mean, transforms.std),
        resized=transforms.resize_size[0],
        cropped=transforms.crop_size[0],
    )
    return model, steps, lambda module, batch: module(batch), recipe


def _torchvision_pixels(transforms, picture: Image.Image) -> Tensor:
    """The first steps of torchvision's ImageClassification, up to pixels of 8 bits."""
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    size, how = transforms.resize_size, transforms.interpolation
    return pil_to_tensor(center_crop(resize(picture, size, how, antialias=transforms.antialias), transforms.crop_size))


def _base_weights(spec: Spec, names: list[str]) -> str:
    """The name of the weights whose preprocessing belongs to ``spec``: a file that ``save`` wrote says it itself."""
    file = Path(spec.weights)
    if spec.weights not in names and file.suffix == ".safetensors" and file.is_file():
        with contextlib.suppress(safetensors.SafetensorError), safetensors.safe_open(file, "pt") as opened:
            stated = (opened.metadata() or {}).get("base")
            return stated if stated in names else names[0]
    return spec.weights if spec.weights in names else names[0]


def _save_torchvision(spec: Spec, model: nn.Module, file: Path) -> str:
    """Writes a complete state dict, which a classifier that was never used makes whole."""
    from torchvision import models

    with _seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = models.get_model(spec.name, weights=None)
    whole.load_state_dict(model.state_dict(), strict=False)
    base = _base_weights(spec, list(models.get_model_weights(spec.name).__members__))
    file.parent.mkdir(parents=True, exist_ok=True)
    with _system_errors(file.parent):
        safetensors.torch.save_model(whole, file, {"base": base})
    return f"torchvision:{spec.name}@{file}"


def _drop_classifier(model: nn.Module) -> str:
    """Puts an identity in the place of the last layer with weights, the classifier of every torchvision model.

    Returns:
        The classifier's name.
    """
    name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return name


def _torchvision_pretrained(spec: Spec, entry) -> nn.Module:
    from torchvision import models

    cached = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    check_regular(cached)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        # the builders read their checkpoint as a pickle that may run code, unless torch is told otherwise
        with patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            return models.get_model(spec.name, weights=entry)
    except OSError as error:
        raise EncoderError(
            f"{spec.text}: the weights are not at {cached} and {entry.url} could not be downloaded ({error}); "
            f"put the file there, name a local one (torchvision:{spec.name}@FILE), or use "
            f"torchvision:{spec.name}@random, untrained"
        ) from error
    except Exception as error:  # torch raises many kinds on a damaged archive
        raise EncoderError(f"{spec.text}: {cached} is damaged ({_reason(error)}); remove it and try again") from error
    finally:
        socket.setdefaulttimeout(before)


def _load_weights(model: nn.Module, file: Path, spec: Spec, classifier: str) -> None:
    """Loads a file's weights into ``model``, whose ``classifier`` was dropped; the file may have any other, or none.

    Raises:
        EncoderError: weights of the backbone are missing, of another shape, or too many.
    """
    weights = {}
    for name, tensor in _read_weights(file, spec).items():
        if not _is_beside(name, classifier):
            weights[name] = tensor
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in weights and not _is_beside(name, classifier)]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # old checkpoints have none
    others = sorted(weights.keys() - wanted.keys())
    start = f"{spec.text}: {file}"
    if missing:
        raise EncoderError(
            f"{start} lacks {len(missing)} weights of {spec.name} (the first: {missing[0]}); "
            "name the model that it is of"
        )
    if others:
        raise EncoderError(
            f"{start} holds {len(others)} weights that {spec.name} has not (the first: {others[0]:.80}); "
            "name the model that it is of"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise EncoderError(
                f"{start}: {name} has the shape {tuple(tensor.shape)}, and that of {spec.name} is "
                f"{tuple(wanted[name].shape)}; name the model that it is of"
            )
    model.load_state_dict(weights, strict=False)


def _is_beside(name: str, classifier: str) -> bool:
    """Whether a weight plays no part in the features: the classifier's, and those of classifiers for training alone."""
    return name.startswith((f"{classifier}.", "aux", "AuxLogits."))


def _read_weights(file: Path, spec: Spec) -> dict[str, Tensor]:
    """The weights in a file by their names, which lie in it bare, or as programs that train put them there.

    Pickles are read with ``weights_only``, which runs no code.
    """
    try:
        check_regular(file)
        if file.suffix == ".safetensors":
            content = safetensors.torch.load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's advice on other programs' pickles
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{spec.text}: {file} is damaged, or holds Python objects other than tensors, which are not run; "
            "convert it to safetensors"
        ) from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # torch and safetensors raise many kinds; the user needs the file and the reason
        raise EncoderError(f"{spec.text}: {file} holds no weights ({_reason(error)}); name another file") from error
    for key in _WEIGHT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    weights = content.items() if isinstance(content, dict) else ()
    named = {name: tensor for name, tensor in weights if isinstance(name, str) and isinstance(tensor, Tensor)}
    for prefix in _WEIGHT_PREFIXES:
        if named and all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    if not named:
        raise EncoderError(f"{spec.text}: {file} holds no weights by their names; save a model's state_dict()")
    return named


def _image_processor(spec: Spec):
    from transformers import AutoImageProcessor

    return _from_pretrained(AutoImageProcessor, spec)


def _hf_image_model(spec: Spec, seed: int):
    model, architecture = _hf_model(spec, seed)
    processor = _image_processor(spec)
    if not hasattr(model, "get_image_features") and model.main_input_name != "pixel_values":
        raise EncoderError(f"{spec.text} is no image encoder ({type(model).__name__} takes {model.main_input_name})")

    settings, _ = processor.get_image_processor_dict(spec.name, revision=spec.revision, local_files_only=True)
    pooling, pool = _image_pooling(model)
    size = dict(processor.size or {}) if getattr(processor, "do_resize", True) else {}
    resized = max((size.get(side) or 0 for side in ("shortest_edge", "height", "width")), default=0)
    cropped = dict(processor.crop_size or {}) if getattr(processor, "do_center_crop", False) else {}
    steps = _Steps(
        whole=partial(_processed, processor),
        pixels=partial(_processed, processor, do_rescale=False, do_normalize=False),
        levels=partial(_processed, processor, do_resize=False, do_center_crop=False),
        resized=resized,
        cropped=cropped.get("height") or 0,
    )
    return model, steps, pool, {"architecture": architecture, "preprocessing": settings, "pooling": pooling}


def _processed(processor, picture: Image.Image | Tensor, **steps: bool) -> Tensor:
    return processor(images=picture, return_tensors="pt", **steps)["pixel_values"][0]


def _image_pooling(model: nn.Module):
    """How a Hugging Face image model's output becomes one vector: its name for the recipe, and the function.

    A checkpoint's own pooler is not used, since many models carry one that was never trained.
    """
    if hasattr(model, "get_image_features"):
        return "projection", lambda module, batch: _tensor(module.get_image_features(pixel_values=batch))
    tokens = any(name.endswith("cls_token") for name, _ in model.named_parameters())

    def pool(module: nn.Module, batch: Tensor) -> Tensor:
        hidden = module(pixel_values=batch).last_hidden_state
        if hidden.ndim == 4:
            return hidden.mean((2, 3))
        return hidden[:, 0] if tokens else hidden.mean(1)

    return "cls token" if tokens else "spatial mean", pool


def _hf_text_model(spec: Spec, seed: int, vocabulary: int):
    from transformers import DistilBertConfig

    builtin = DistilBertConfig(vocab_size=vocabulary) if spec.random and spec.name == _DISTILBERT else None
    model, architecture = _hf_model(spec, seed, builtin)
    if hasattr(model, "get_text_features"):
        return model, architecture
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if model.main_input_name != "input_ids":
        raise EncoderError(f"{spec.text} is no text encoder ({type(model).__name__} takes {model.main_input_name})")
    return model, architecture


def _hf_model(spec: Spec, seed: int, config=None):
    """The model in float32, from safetensors and without remote code, and a digest of its architecture."""
    from transformers import AutoConfig, AutoModel

    if config is None:
        config = _from_pretrained(AutoConfig, spec)
        described, _ = type(config).get_config_dict(spec.name, revision=spec.revision, local_files_only=True)
    else:
        described = config.to_diff_dict()
    if spec.random:
        with _seeded(seed):
            model = AutoModel.from_config(config)
    else:
        model, report = _from_pretrained(
            AutoModel, spec, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if missing:
            raise EncoderError(
                f"{spec.text}: the checkpoint lacks {len(missing)} weights of {type(model).__name__} "
                f"(the first: {missing[0]}), which would be random; use a complete one"
            )
    settings = {key: value for key, value in described.items() if key not in _CONFIG_NOISE}
    return model, f"{type(model).__name__} {digest(settings)[:16]}"


def _from_pretrained(loader, spec: Spec, **options):
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
            f"name a local copy (hf:FOLDER) or, untrained, torchvision:resnet50@random and hf:{_DISTILBERT}@random"
        ) from error


def _load_local(loader, place: str | Path, revision: str | None = None, **options):
    """``loader.from_pretrained`` of what is on this machine. Code of its own is never run, and never asked for."""
    return loader.from_pretrained(place, revision=revision, trust_remote_code=False, local_files_only=True, **options)


def _check_files(folder: Path) -> None:
    """Refuses a model's folder with a FIFO or a device in it, for which its library would wait."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if not entry.is_dir():
            check_regular(entry)


def _tokenizer(spec: Spec, captions: list[str] | None, files: dict[str, bytes] | None):
    """The tokenizer, and its files by name."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if files is not None:
            files = known_tokenizer_files(files)
            for file, data in files.items():
                (folder / file).write_bytes(data)
            return _load_local(AutoTokenizer, folder), files
        if spec.random and spec.name == _DISTILBERT:
            if captions is None:
                raise EncoderError(f"{spec.text} takes its vocabulary from a dataset; encode one first")
            tokenizer = _dataset_tokenizer(captions)
        else:
            tokenizer = _from_pretrained(AutoTokenizer, spec)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        saved = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        return tokenizer, known_tokenizer_files(without_code(saved))


def _dataset_tokenizer(captions: list[str]):
    """A WordPiece tokenizer whose vocabulary is the captions' characters and words, most frequent words first.

    Every word of the captions is one token; an unseen word falls apart into characters.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word for caption in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
    )
    characters = sorted({character for word in counts for character in word})
    words = sorted(counts, key=lambda word: (-counts[word], word))
    entries = [*_SPECIAL_TOKENS.values(), *characters, *(f"##{character}" for character in characters), *words]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=200))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **_SPECIAL_TOKENS)


def _hash_tokenizer(files: dict[str, bytes]) -> str:
    # tokenizer_config.json repeats library versions and paths; where tokenizer.json is there, it holds all that counts
    names = ["tokenizer.json"] if "tokenizer.json" in files else sorted(files)
    return digest({name: hashlib.sha256(files[name]).hexdigest() for name in names})


def _hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def _tensor(output) -> Tensor:
    """A dual encoder's projected features, which some versions return bare and some within an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _reason(error: BaseException) -> str:
    """An error of another library for a message: on one line, and cut."""
    line = " ".join(first_line(error).split()) or type(error).__name__
    return f"{line:.200}"


@contextlib.contextmanager
def _loading(spec: Spec) -> Iterator[None]:
    """Turns whatever libraries raise on a damaged model or tokenizer into an error of one line.

    A want of room or memory is none of the model's faults, and stays what it is.
    """
    try:
        with _system_errors(tempfile.gettempdir()):
            yield
    except (OnceoverError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit):
        raise
    except OSError as error:
        if error.errno is not None:  # the system's own; transformers raises others, without a number
            raise
        raise EncoderError(f"{spec.text}: {_unusable(spec)} ({_reason(error)})") from error
    except BaseException as error:  # tokenizers' panics are no Exception
        raise EncoderError(f"{spec.text}: {_unusable(spec)} ({_reason(error)})") from error


def _unusable(spec: Spec) -> str:
    if spec.library == "hf" and Path(spec.name).exists():
        return "the folder holds no usable model"
    return "the model or its tokenizer cannot be loaded"


@contextlib.contextmanager
def _system_errors(folder: str | Path) -> Iterator[None]:
    """Turns the system's errors, which libraries in Rust hand on as text, into those that they were."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = _SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(folder)) from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars and advice from the terminal while a model loads; failures are raised anyway."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
