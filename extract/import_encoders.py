"""The encoder behind imported features, where it is named: checked by a sample, or used to encode the captions."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onceover.base.files import digest
from onceover.base.progress import say
from onceover.configs.schema import ExtractConfig
from onceover.extract.comparison import relative_error
from onceover.extract.dataset import Dataset
from onceover.extract.encoders import located
from onceover.extract.import_sources import ImportingError
from onceover.extract.layouts import images_of
from onceover.extract.pipeline import extract
from onceover.extract.shards import RowSources
from onceover.extract.store import FeatureStore

MAX_ERROR = 0.1  # of the features' spread, by which another program's arithmetic and preprocessing may differ
_LAYOUT = "captions of an import"  # of the store that they are encoded into


@dataclass(frozen=True)
class StatedEncoder:
    """An encoder that gives the imported features of a sample.

    Attributes:
        spec: its specification, with absolute paths. recipe: its own.
        settings: those of an extraction that belong to its kind. tokenizer_files: of a text encoder.
        error: the difference of the sample, in units of the features' spread.
    """

    spec: str
    recipe: dict
    settings: dict[str, Any]
    tokenizer_files: dict[str, bytes]
    error: float


def stated_text_encoder(
    config: ExtractConfig, source: Path, stored: np.ndarray, captions: list[str], device: str | None
) -> StatedEncoder:
    """The encoder ``config.text_encoder``, with layers and pooling that give the features of some captions.

    Args:
        source: of the features, for messages. stored: those of the captions, (S, D).

    Raises:
        ImportingError: it gives others. EncoderError: it cannot be had.
    """
    from onceover.extract.encoding.text import TextEncoder

    choices = [(config.text_layers, config.text_pooling), ("last", "mean"), ("last", "cls")]
    tried = [{"text_layers": layers, "text_pooling": pooling} for layers, pooling in dict.fromkeys(choices)]

    def load(settings: dict[str, Any]) -> Any:
        return TextEncoder(
            config.text_encoder,
            layers=settings["text_layers"],
            pooling=settings["text_pooling"],
            max_length=config.max_length,
            caption_prefix=config.caption_prefix,
            query_prefix=config.query_prefix,
            store_dtype=stored.dtype.name,
            seed=config.seed,
            device=device,
        )

    return _matching(
        "text", config.text_encoder, source, stored, tried, load, lambda encoder: encoder.encode(captions)[0]
    )


def stated_image_encoder(
    config: ExtractConfig, source: Path, stored: np.ndarray, dataset: Dataset, rows: Sequence[int], device: str | None
) -> StatedEncoder:
    """The encoder ``config.image_encoder``, with layers that give the features of some images.

    Args:
        source: of the features, for messages. stored: those of the images, (S, V, D). rows: which images they are.

    Raises:
        ImportingError: it gives others, or the images are not at hand. EncoderError: it cannot be had.
        PictureError: an image cannot be read.
    """
    import torch

    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.pictures import named_errors

    keys = [dataset.paths[row] for row in rows]
    images = images_of(dataset.root, keys)
    missing = [key for key in keys if images.stat(key)[0] < 0]
    if missing:
        raise ImportingError(
            f"the images are needed to check that {config.image_encoder} made {source}, and {missing[0]} is not in "
            f"{dataset.root}; name their folder with --data, or leave --image-encoder out"
        )
    tried = [{"image_layers": layers} for layers in dict.fromkeys((config.image_layers, "auto", "last"))]

    def load(settings: dict[str, Any]) -> Any:
        return ImageEncoder(
            config.image_encoder,
            layers=settings["image_layers"],
            views=stored.shape[1],
            store_dtype=stored.dtype.name,
            seed=config.seed,
            device=device,
        )

    def encode(encoder: Any) -> np.ndarray:
        features = []
        for key in keys:
            with named_errors(images.describe(key)):
                pixels = encoder.read(images.open(key))
            features.append(encoder.encode(torch.stack([pixels]))[0])
        return np.stack(features)

    return _matching("image", config.image_encoder, source, stored, tried, load, encode)


def _matching(
    kind: str,
    spec: str,
    source: Path,
    stored: np.ndarray,
    tried: list[dict[str, Any]],
    load: Callable[[dict[str, Any]], Any],
    encode: Callable[[Any], np.ndarray],
) -> StatedEncoder:
    """The encoder in the first of some settings with which it gives the stored features.

    Raises:
        ImportingError: it gives them in none; the error says how far the nearest are off.
    """
    noun = "image" if kind == "image" else "caption"
    nearest: np.ndarray | None = None
    widths = []
    for settings in tried:
        encoder = load(settings)
        features = encode(encoder)
        widths.append(f"{features.shape[-1]:,}")
        if features.shape != stored.shape:
            continue
        error = _error(stored, features)
        if error <= MAX_ERROR:
            say(
                f"{kind}: {spec} gives the features of {len(stored)} {noun}s but for {error:.2%} of their spread "
                f"({', '.join(map(str, settings.values()))})"
            )
            tokenizer_files = encoder.tokenizer_files if kind == "text" else {}
            return StatedEncoder(located(spec), encoder.recipe, settings, tokenizer_files, error)
        if nearest is None or error < _error(stored, nearest):
            nearest = features
    remedy = f"name the encoder that made them, or leave --{kind}-encoder out"
    if nearest is None:
        raise ImportingError(
            f"{spec} did not make {source}: it gives {' or '.join(dict.fromkeys(widths))} numbers, and a row has "
            f"{stored.shape[-1]:,}; {remedy}"
        )
    cosine = float((_unit(stored) * _unit(nearest)).sum(-1).mean())
    reason = (
        f"{spec} did not make {source}: {len(stored)} {noun}s differ by {_error(stored, nearest):.2f} of the features' "
        f"spread (at most {MAX_ERROR} is rounding), their mean cosine is {cosine:.4f}"
    )
    if _error(_unit(stored), _unit(nearest)) <= MAX_ERROR:
        lengths = [float(np.linalg.norm(features, axis=-1).mean()) for features in (stored, nearest)]
        raise ImportingError(
            f"{reason}: they agree in direction, and not in length ({lengths[0]:.3g} instead of {lengths[1]:.3g}), as "
            f"normalised ones do; import them unnormalised, or leave --{kind}-encoder out"
        )
    raise ImportingError(f"{reason}; {remedy}")


def _error(stored: np.ndarray, features: np.ndarray) -> float:
    """The difference in units of the spread over the rows; of rows that do not differ, in units of their size."""
    features = features.astype(np.float32)
    if (features == features[0]).all():
        return relative_error(stored, features, spread=np.stack([features[0], -features[0]]))
    return relative_error(stored, features)


def _unit(features: np.ndarray) -> np.ndarray:
    """Features divided by their lengths."""
    features = features.astype(np.float32)
    return features / np.linalg.norm(features, axis=-1, keepdims=True).clip(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class EncodedCaptions:
    """Features of captions that an import encoded, in a store of their own beside the one to be written."""

    path: Path
    store: FeatureStore

    def rows(self) -> RowSources:
        """The features, to be copied by caption."""
        sources = RowSources("text", digest(self.store.recipes["text"]), ("truncated",))
        sources.add(self.path)
        return sources

    def remove(self) -> None:
        """Removes the store, once its features have been copied."""
        self.store.close()
        self.path.unlink()
        self.path.with_name(f".{self.path.name}.lock").unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    """Whether a file is a store that an interrupted import has left."""
    if path.is_symlink():
        return False
    with FeatureStore(path) as store:
        return store.provenance["layout"] == _LAYOUT


def encode_captions(
    dataset: Dataset, path: Path, config: ExtractConfig, before: FeatureStore | None, device: str | None
) -> EncodedCaptions:
    """Encodes the captions of a dataset into a store beside ``path``; an interrupted encoding is gone on with.

    Args:
        before: an earlier store, whose features are taken where they are of the same encoder.

    Raises:
        ImportingError: a file of somebody else's has its name. EncoderError: the encoder cannot be had.
    """
    beside = path.with_name(f"{path.name}.captions.h5")
    if os.path.lexists(beside) and not _is_own(beside):
        raise ImportingError(f"{beside} is where an import keeps the features of captions; move it elsewhere")
    alone = replace(
        dataset,
        layout=_LAYOUT,
        ids=[],
        paths=[],
        splits=[],
        image_index=np.full(len(dataset.captions), -1, np.int64),
        failures=[],
        notes=[],
    )
    extract(alone, beside, replace(config, thumbnails=False), device=device, reuse=before, force=True)
    return EncodedCaptions(beside, FeatureStore(beside))
