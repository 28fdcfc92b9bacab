"""Encodes a sample of a store's records again in float32 and compares the features with the stored ones."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from onceover.base.addresses import path_of
from onceover.base.files import digest
from onceover.base.hdf5 import RowsOnDisk
from onceover.base.progress import say, tracked
from onceover.extract.address_images import may_be_folder
from onceover.extract.comparison import neighbour_overlap, relative_error
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.stored import moved_parts, part_encoder
from onceover.extract.encoding.text import TextEncoder
from onceover.extract.image_source import ImageSource
from onceover.extract.joined import Part, parts_of
from onceover.extract.layouts import stored_images
from onceover.extract.pictures import decode_named
from onceover.extract.store import KINDS, FeatureStore, StoreError

#: root-mean-square error in units of the features' spread that the arithmetic explains; strangers' is 1.4
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
STORAGE_TOLERANCE = {"float32": 0.0, "float16": 0.1}
IMPORTED_TOLERANCE = 0.2  # of features that another program has computed, by a preprocessing of its own
NEIGHBOURS = 10
SPREAD = 4096  # stored rows that the spread is taken over
_NOUNS = {"image": "image", "text": "caption"}


def verify_sample(
    store: FeatureStore,
    sample: int,
    *,
    data: Path | None = None,
    device: str | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
) -> tuple[list[str], list[str]]:
    """Encodes ``sample`` images and captions again, in float32 with the plain models, whatever made the store.

    The error is relative to the spread of the features over the records, since features of different images can
    agree to a cosine of 0.998; where records do not differ, or there is only one, it is relative to their norm. A kind
    of features that the store does not have is left out. ``data``, ``image_encoder`` and ``text_encoder`` say where
    these are now, if they have moved.

    Returns:
        Lines that report errors and how many of the nearest neighbours within the sample are the same; and what is
        wrong.

    Raises:
        StoreError: there are no features, or the images or the encoders are not those of the store.
        EncoderError: an encoder cannot be had. PictureError: an image cannot be read.
    """
    kinds = [kind for kind in KINDS if store.recipes[kind]]
    if not kinds:
        raise StoreError(f"{store.path} holds no features that could be encoded again")
    root = path_of(data or store.provenance["data"])
    if "image" in kinds and not may_be_folder(root) and not root.exists():
        raise StoreError(f"the images are not at {root}; name their folder with --data")
    specs = {"image": image_encoder, "text": text_encoder}
    generator = np.random.default_rng(0)
    encoders = {kind: _encoders(store, kind, device, specs[kind]) for kind in kinds}
    images = stored_images(store, data) if "image" in kinds else None
    comparisons = []
    for kind, parts in encoders.items():
        count = len(store.image_ids if kind == "image" else store.captions)
        rows = np.sort(generator.permutation(count)[:sample])
        start = 0
        for part, encoder in parts:
            say(f"encoding {len(rows):,} {_NOUNS[kind]}s again on {encoder.device}")
            if isinstance(encoder, ImageEncoder):
                assert images is not None, "a store with image features has images"
                again = _encoded_images(store, images, encoder, rows)
                again = again[:, : store.image_features.shape[1]]
            else:
                again = encoder.encode([store.captions[row] for row in rows])[0]
            columns = slice(start, start + again.shape[-1])
            name = f"{_NOUNS[kind]} features"
            if len(parts) > 1:
                name += f" of {part.provenance['encoder']}"
            comparisons.append(_compare(name, _NOUNS[kind], part, store.features(kind), columns, rows, again))
            start = columns.stop
    return [line for line, _ in comparisons], [problem for _, problem in comparisons if problem]


def _encoders(
    store: FeatureStore, kind: str, device: str | None, spec: str | None
) -> list[tuple[Part, ImageEncoder | TextEncoder]]:
    """The encoders that made a kind of features, in float32 and with nothing of them optimised."""
    provenance = store.provenance
    parts = parts_of(store.recipes[kind], provenance[kind], provenance["settings"], store.tokenizer_files)
    encoders = []
    for part, own_spec in zip(parts, moved_parts(parts, spec, kind), strict=True):
        exact = replace(part, recipe=_in_float32(part.recipe))
        encoder = part_encoder(kind, exact, device, own_spec, plain=True)
        if digest(encoder.recipe) != digest(exact.recipe):
            raise StoreError(
                f"the {kind} encoder is not the one that {store.path} was made with; "
                f"restore it, or say where it is with --{kind}-encoder"
            )
        encoders.append((part, encoder))
    return encoders


def _in_float32(recipe: dict) -> dict:
    """A recipe, and that of the encoder behind imported features, computed and stored in float32."""
    exact = recipe | {"dtype": "float32", "store_dtype": "float32"}
    return exact | {"encoder": _in_float32(recipe["encoder"])} if "encoder" in recipe else exact


def _encoded_images(store: FeatureStore, images: ImageSource, encoder: ImageEncoder, rows: np.ndarray) -> np.ndarray:
    features = []
    for row in tracked(rows.tolist(), "image", "images"):
        key = store.image_paths[row]
        image = decode_named(partial(images.open, key), images.describe(key), encoder.short_side)
        features.append(encoder.encode(encoder.pixels(image)[None])[0])
    return np.stack(features)


def _compare(
    name: str, noun: str, part: Part, features: RowsOnDisk, columns: slice, rows: np.ndarray, again: np.ndarray
) -> tuple[str, str | None]:
    """Compares the columns of one encoder in some rows with a new encoding: a line that reports, and what is wrong."""
    recipe = part.recipe
    stored = features[rows][..., columns]
    known = features[:SPREAD][..., columns]
    unit = f"spread over {noun}s"
    if (known == known[0]).all():  # no spread: around zero, it is the norm
        unit = "norm"
        known = np.stack([again[0], -again[0]])
    error = relative_error(stored, again, spread=known)
    backend = part.provenance.get("backend")
    computed = f"{recipe['dtype']} by {backend}" if backend else recipe["dtype"]
    line = (
        f"{name} ({computed}, stored as {recipe['store_dtype']}): {len(rows):,} encoded again in "
        f"float32; root-mean-square error {error:.1e} of their {unit}"
    )
    if len(rows) > NEIGHBOURS:
        overlap = neighbour_overlap(stored.reshape(len(rows), -1), again.reshape(len(rows), -1), NEIGHBOURS)
        line += f"; {overlap:.1%} of the {NEIGHBOURS} nearest neighbours are the same"
    allowed = TOLERANCE[recipe["dtype"]] + STORAGE_TOLERANCE[recipe["store_dtype"]]
    if "encoder" in recipe:
        allowed += IMPORTED_TOLERANCE
    if error <= allowed:
        return line, None
    return line, (
        f"the {name} differ from a new encoding by {error:.1e} of their {unit}; "
        f"at most {allowed:.0e} is rounding in {recipe['dtype']}"
    )
