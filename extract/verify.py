"""Encodes a sample of a store's records again in float32 and compares the features with the stored ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from extract.encoders import image_encoder_of, text_encoder_of
from extract.files import digest
from extract.inference import neighbour_overlap, relative_error
from extract.pictures import read_picture
from extract.store import FeatureStore, StoreError

#: root-mean-square error in units of the features' spread that the arithmetic explains; strangers' is 1.4
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
STORAGE_TOLERANCE = {"float32": 0.0, "float16": 0.1}
NEIGHBOURS = 10
SPREAD = 4096  # stored rows that the spread is taken over


def verify_sample(
    store: FeatureStore,
    sample: int,
    *,
    data: Path | None = None,
    device: str | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[str], list[str]]:
    """Encodes ``sample`` pictures and captions again, in float32, whatever arithmetic made the store.

    The error is relative to the spread of the features over the records, since features of different pictures can
    agree to a cosine of 0.998. ``data``, ``image_encoder`` and ``text_encoder`` say where these are now, if they have
    moved.

    Returns:
        Lines that report errors and how many of the nearest neighbours within the sample are the same; and what is
        wrong.

    Raises:
        StoreError: the pictures or the encoders are not those of the store. EncoderError: an encoder cannot be had.
        PictureError: a picture cannot be read.
    """
    root = data or Path(store.provenance["data"])
    if not root.is_dir():
        raise StoreError(f"the pictures are not at {root}; name their folder with --data")
    settings, generator = store.provenance["settings"], np.random.default_rng(0)
    exact = {kind: recipe | {"dtype": "float32", "store_dtype": "float32"} for kind, recipe in store.recipes.items()}
    made = store.provenance["image"], exact["image"], settings
    images = image_encoder_of(*made, device, image_encoder)
    made = store.provenance["text"], exact["text"], settings
    texts = text_encoder_of(*made, store.tokenizer_files, device, text_encoder)
    for kind, encoder in (("image", images), ("text", texts)):
        if digest(encoder.recipe) != digest(exact[kind]):
            raise StoreError(
                f"the {kind} encoder is not the one that {store.path} was made with; "
                f"restore it, or say where it is with --{kind}-encoder"
            )
    rows = np.sort(generator.permutation(len(store.image_ids))[:sample])
    say(f"encoding {len(rows):,} pictures and captions again on {images.device}")
    again = []
    for row in tqdm(rows, desc="image", unit=" pictures", disable=None):
        picture = read_picture(root / store.image_paths[row], images.short_side)
        again.append(images.encode(images.pixels(picture)[None])[0])
    found = [_compare("picture", store, "image", rows, np.stack(again))]
    rows = np.sort(generator.permutation(len(store.captions))[:sample])
    again, _ = texts.encode([store.captions[row] for row in rows])
    found.append(_compare("caption", store, "text", rows, again))
    return [line for line, _ in found], [problem for _, problem in found if problem]


def _compare(what: str, store: FeatureStore, kind: str, rows: np.ndarray, again: np.ndarray) -> tuple[str, str | None]:
    features = store.image_features if kind == "image" else store.text_features
    recipe, stored = store.recipes[kind], features[rows]
    error = relative_error(stored, again, spread=features[:SPREAD])
    line = (
        f"{what} features ({recipe['dtype']}, stored as {recipe['store_dtype']}): {len(rows):,} encoded again in "
        f"float32; root-mean-square error {error:.1e} of their spread over {what}s"
    )
    if len(rows) > NEIGHBOURS:
        overlap = neighbour_overlap(stored.reshape(len(rows), -1), again.reshape(len(rows), -1), NEIGHBOURS)
        line += f"; {overlap:.1%} of the {NEIGHBOURS} nearest neighbours are the same"
    allowed = TOLERANCE[recipe["dtype"]] + STORAGE_TOLERANCE[recipe["store_dtype"]]
    if error <= allowed:
        return line, None
    return line, (
        f"the {what} features differ from a new encoding by {error:.1e} of their spread; "
        f"at most {allowed:.0e} is rounding in {recipe['dtype']}"
    )
