"""Checks an encoder with a few records of a dataset, once, when a store is made; never at a query.

Four forward passes find the models whose features would be of no use, or that would fail hours later: those that mask
or drop parts at random, whose features depend on what else is in a batch, that give tokens and not one vector, that
take images of one shape only, or that fail at long captions. Findings are plain values, which stand in the store's
provenance and which ``onceover info`` shows.
"""

import contextlib
import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from onceover.base.errors import OnceoverError
from onceover.base.progress import LOGGER, warn
from onceover.extract.begin import readable_images
from onceover.extract.encoders import EncoderError
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.library_errors import reason
from onceover.extract.encoding.text import TextEncoder
from onceover.extract.image_source import ImageSource
from onceover.extract.key_index import different_texts
from onceover.extract.pictures import decode
from onceover.extract.unknown import count_unknown

TRIED = 16  # images that are looked at until one can be decoded
SHAPES = ((512, 256), (256, 512))  # width and height of the drawn images that are in a batch with that one
CAPTIONS = 256  # of which the unknown tokens are counted before anything is encoded
LONG = 32  # captions of the most bytes, among which the one of the most tokens is looked for
SHORT = "a dog"  # stands in each batch, so that the others' length is padding for it
LEAST_VOCABULARY = 0.5  # of the ids that a network knows, what a tokenizer must have; padding adds a few per cent
#: of the features' spread, what rounding may change between a record alone and in a batch: in half precision twenty
#: times its last bit. Measured with ResNet50, MobileNet, DistilBERT and MiniLM, at most: 1.4e-6, 0.002 and 0.013
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.16}
LEAST_SPREAD = 0.01  # of the features' size, what is taken for their spread where records are more alike than that
_CAUSES = {"image": "BatchNorm that takes a batch's own statistics", "caption": "padding that is not masked"}


def check_images(encoder: ImageEncoder, spec: str, images: ImageSource, keys: Sequence[str]) -> dict[str, Any]:
    """Findings about an image encoder, by the first image that can be decoded and two drawn ones of other shapes.

    Args:
        spec: of the encoder, for messages.
        images: where the dataset's images come from. keys: of all of them.

    Raises:
        EncoderError: it is of no use.
    """
    start = time.perf_counter()
    read = partial(decode, short_side=encoder.short_side)
    sample = list(islice(readable_images(images, keys[:TRIED], read), 1))
    pixels = _pixels(encoder, spec, sample + [_drawn(shape) for shape in SHAPES])

    def encode(rows: list[int]) -> np.ndarray:
        with _refusing(f"{spec} cannot encode {len(rows)} of the images", "name another image encoder"):
            return encoder.computed(pixels[rows])

    findings = _agreement(spec, "image", encoder.recipe["dtype"], encode, len(pixels))
    return _timed(findings, start, spec)


def check_captions(encoder: TextEncoder, spec: str, captions: Sequence[str], earlier: dict[str, Any]) -> dict[str, Any]:
    """Findings about a text encoder, by the longest caption, the first one, and a short one.

    Warns of unknown tokens, by a sample of captions.

    Args:
        spec: of the encoder, for messages.
        captions: of the dataset.
        earlier: findings about this encoder that stand in a store; they are given back unless a caption is longer.

    Raises:
        EncoderError: it is of no use.
    """
    start = time.perf_counter()
    check_vocabulary(encoder, spec)
    different = different_texts(captions)
    looked_at = different[:: -(-len(different) // CAPTIONS)]
    with _refusing(f"{spec} cannot tokenise the captions", "name another text encoder"):
        others = encoder.tokenize(looked_at)[0]
        longest = max(encoder.tokenize(heapq.nlargest(LONG, different, key=_bytes))[0], key=len)
        short = encoder.tokenize([SHORT])[0][0]
    warning = count_unknown(looked_at, *encoder.unknown_tokens(others)).warning()
    if warning:
        warn(warning)
    if earlier and len(longest) <= earlier["longest"]:
        return earlier
    batch = [short, others[0], longest]

    def encode(rows: list[int]) -> np.ndarray:
        problem = f"{spec} cannot encode {len(rows)} of the captions"
        mend = "name another text encoder"
        if rows == [len(batch) - 1]:  # the short one alone went through before
            problem = f"{spec} cannot encode the longest caption, of {len(longest)} tokens"
            mend = "set extract.max_length to fewer"
        with _refusing(problem, mend):
            return encoder.computed([batch[row] for row in rows])

    findings = _agreement(spec, "caption", encoder.recipe["dtype"], encode, len(batch))
    return _timed(findings | {"longest": len(longest)}, start, spec)


def check_vocabulary(encoder: TextEncoder, spec: str) -> None:
    """Refuses a tokenizer whose vocabulary is far smaller than the network's, to which most words are unknown.

    transformers makes one of five entries where the tokenizer's files are missing.

    Raises:
        EncoderError: it is.
    """
    size = getattr(encoder.tokenizer, "size", None)
    known = encoder.vocabulary
    if size is not None and known is not None and size < LEAST_VOCABULARY * known:
        raise EncoderError(
            f"{spec}: its tokenizer has {size:,} entries, and its model knows {known:,}: almost every word would be "
            "unknown; save the model's own tokenizer beside it (tokenizer.save_pretrained)"
        )


def _bytes(caption: str) -> int:
    """How many bytes a caption has, about as many as it has tokens where a vocabulary lacks its characters."""
    return len(caption.encode("utf-8", "replace"))


def _drawn(shape: tuple[int, int]) -> Image.Image:
    """An image of a width and height, with three gradients."""
    gradient = Image.linear_gradient("L")
    return Image.merge("RGB", [gradient.rotate(angle) for angle in (0, 90, 180)]).resize(shape)


def _pixels(encoder: ImageEncoder, spec: str, images: list[Image.Image]) -> Tensor:
    """Images as the encoder takes them, the first view alone: (B, 1, 3, H, W).

    Raises:
        EncoderError: their shapes differ, or depend on the image's.
    """
    pixels = []
    for image in images:
        size = f"{image.width} x {image.height}"
        with _refusing(f"{spec} cannot take an image of {size} pixels", "name another image encoder"):
            pixels.append(encoder.preprocessing.preprocess(image))
    shapes = list(dict.fromkeys(tuple(tensor.shape) for tensor in pixels))
    if len(shapes) > 1:
        first, second = (_numbers(shape) for shape in shapes[:2])
        raise EncoderError(
            f"{spec}: its preprocessing gives images of different shapes ({first} and {second}), which cannot be "
            "encoded together; let it resize to a height and a width, or crop (preprocessor_config.json)"
        )
    return torch.stack(pixels).unsqueeze(1)


def _agreement(
    spec: str, noun: str, dtype: str, encode: Callable[[list[int]], np.ndarray], count: int
) -> dict[str, Any]:
    """Findings of four passes: the first record and the last one alone, and twice all together.

    Args:
        noun: ``image`` or ``caption``. dtype: of the arithmetic.
        encode: gives the features of some of the records, as one batch.
        count: how many records there are.

    Raises:
        EncoderError: features that are no vectors, or differ between passes or batches.
    """
    ends = [0, count - 1]
    singles = [_vectors(encode([row]), 1, spec, noun) for row in ends]
    together = _vectors(encode(list(range(count))), count, spec, noun)
    again = encode(list(range(count)))
    sizes = {features.shape[1] for features in (*singles, together)}
    if len(sizes) > 1:
        raise EncoderError(
            f"{spec} gives vectors of {min(sizes):,} and of {max(sizes):,} numbers, depending on the {noun}; "
            "name another encoder"
        )
    if not np.isfinite(together).any():
        raise EncoderError(
            f"{spec} gives no number that is finite, in {dtype}; try --dtype float32, or another encoder"
        )
    if not np.array_equal(together, again, equal_nan=True):
        most = np.nanmax(np.abs(together - again))
        raise EncoderError(
            f"{spec}: two passes over the same {noun}s differ by {most:.1g}: the model masks or drops parts at random, "
            "as ViTMAE's kind does in pre-training; name another encoder"
        )
    difference = _difference(np.concatenate(singles), together[ends], together)
    if difference > TOLERANCE[dtype]:
        raise EncoderError(
            f"{spec}: {noun} features depend on what else is in the batch: alone they differ by {difference:.1g} of "
            f"their spread, where rounding in {dtype} explains {TOLERANCE[dtype]:g} ({_CAUSES[noun]}?); "
            "name another encoder"
        )
    return {"passes": len(ends) + 2, "records": count, "difference": difference, "dtype": dtype}


def _vectors(features: np.ndarray, count: int, spec: str, noun: str) -> np.ndarray:
    """Features, which have to be one vector for each of ``count`` records."""
    if features.ndim == 2 and len(features) == count and features.shape[1]:
        return features
    raise EncoderError(
        f"{spec} gives {_numbers(features.shape)} numbers for {count} {noun}{'s' if count > 1 else ''}, and not one "
        "vector each: its tokens are not pooled; name another encoder"
    )


def _difference(alone: np.ndarray, in_batch: np.ndarray, together: np.ndarray) -> float:
    """The root-mean-square difference between features alone and in a batch, in units of the spread of all (B, D).

    Rows that are not finite are left out; one that is finite only alone, or only in a batch, is an infinite difference.
    """
    is_sound = np.isfinite(in_batch).all(axis=1)
    if (np.isfinite(alone).all(axis=1) != is_sound).any():
        return float("inf")
    if not is_sound.any():
        return 0.0
    records = together[np.isfinite(together).all(axis=1)].astype(np.float64)
    size = np.sqrt(np.square(records).mean())
    spread = max(records.std(axis=0).mean(), LEAST_SPREAD * size, np.finfo(np.float32).tiny)
    error = np.sqrt(np.square(alone[is_sound].astype(np.float64) - in_batch[is_sound]).mean())
    return float(error / spread)


def _numbers(shape: Sequence[int]) -> str:
    """A shape for messages: ``17 x 16``."""
    return " x ".join(map(str, shape))


def _timed(findings: dict[str, Any], start: float, spec: str) -> dict[str, Any]:
    """Findings with the seconds since ``start``."""
    seconds = time.perf_counter() - start
    LOGGER.debug("checking %s took %.1f s", spec, seconds)
    return findings | {"seconds": round(seconds, 2)}


@contextlib.contextmanager
def _refusing(problem: str, mend: str) -> Iterator[None]:
    """Turns what a library raises into an error of one line; a lack of memory passes as it is."""
    try:
        yield
    except (OnceoverError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise EncoderError(f"{problem} ({reason(error)}); {mend}") from error
