"""Encodes a sample of a store's records again and compares the features with the stored ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from extract.encoders import image_encoder_of, text_encoder_of
from extract.files import digest
from extract.pictures import read_picture
from extract.store import FeatureStore, StoreError

TOLERANCE = 1e-3  # of the spread of features over records; batches of another size stay below 1e-4 in float32


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
    """Encodes ``sample`` pictures and captions again; the error is relative to the spread of features over records.

    A cosine alone says little, since features of different pictures can agree to 0.998. ``data``, ``image_encoder``
    and ``text_encoder`` say where these are now, if they have moved.

    Returns:
        Lines that report the errors, and what is wrong.

    Raises:
        StoreError: the pictures or the encoders are not those of the store. EncoderError: an encoder cannot be had.
        PictureError: a picture cannot be read.
    """
    root = data or Path(store.provenance["data"])
    if not root.is_dir():
        raise StoreError(f"the pictures are not at {root}; name their folder with --data")
    settings, generator = store.provenance["settings"], np.random.default_rng(0)
    images = image_encoder_of(store.provenance["image"], settings, device, image_encoder)
    texts = text_encoder_of(store.provenance["text"], settings, store.tokenizer_files, device, text_encoder)
    for kind, encoder in (("image", images), ("text", texts)):
        if digest(encoder.recipe) != store.fingerprints[kind]:
            raise StoreError(
                f"the {kind} encoder is not the one that {store.path} was made with; "
                f"restore it, or say where it is with --{kind}-encoder"
            )
    rows = np.sort(generator.permutation(len(store.image_ids))[:sample])
    say(f"encoding {len(rows):,} pictures and captions again on {images.device}")
    bar = tqdm(rows, desc="image", unit=" pictures", disable=None)
    again = [images.encode(images.pixels(read_picture(root / store.image_paths[row]))[None])[0] for row in bar]
    found = [_compare("picture", store.image_features, rows, np.stack(again))]
    rows = np.sort(generator.permutation(len(store.captions))[:sample])
    again, _ = texts.encode([store.captions[row] for row in rows])
    found.append(_compare("caption", store.text_features, rows, again))
    return [line for line, _ in found], [problem for _, problem in found if problem]


def _compare(what: str, stored, rows: np.ndarray, again: np.ndarray) -> tuple[str, str | None]:
    spread = float(stored[: min(len(stored), 4096)].std(0).mean())
    error = float(np.sqrt(np.mean(np.square(again - stored[rows])))) / max(spread, np.finfo(np.float32).tiny)
    line = (
        f"{what} features: {len(rows):,} encoded again; root-mean-square error {error:.1e} of their spread over {what}s"
    )
    if error <= TOLERANCE:
        return line, None
    return line, (
        f"the {what} features differ from a new encoding by {error:.1e} of their spread; "
        f"at most {TOLERANCE:.0e} is rounding"
    )
