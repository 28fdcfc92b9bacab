"""Encodes a sample of a store's records again and compares the features with the stored ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from extract.encoders import ImageEncoder, TextEncoder
from extract.files import digest
from extract.pictures import read_picture
from extract.store import FeatureStore

TOLERANCE = 1e-3  # of the spread of features over records; batches of another size stay below 1e-4 in float32


def verify_sample(
    store: FeatureStore, sample: int, data: Path | None, device: str | None, say: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """Encodes ``sample`` pictures and captions again; the error is relative to the spread of features over records.

    A cosine alone says little, since features of different pictures can agree to 0.998.

    Returns:
        Lines that report the errors, and what is wrong.

    Raises:
        EncoderError: an encoder cannot be had. PictureError: a picture cannot be read.
    """
    root = data or Path(store.provenance["data"])
    settings = store.provenance["settings"]
    generator = np.random.default_rng(0)
    lines, problems = [], []

    made = store.provenance["image"]
    encoder = ImageEncoder(
        made["encoder"], views=settings["views"], dtype=settings["dtype"], seed=made["seed"], device=device
    )
    rows = np.sort(generator.permutation(len(store.image_ids))[:sample])
    say(f"encoding {len(rows):,} pictures and captions again on {encoder.device}")
    again = [
        encoder.encode(encoder.pixels(read_picture(root / store.image_paths[row]))[None])[0]
        for row in tqdm(rows, desc="image", unit=" pictures", disable=None)
    ]
    _compare(
        "picture",
        store.image_features,
        rows,
        np.stack(again),
        encoder.recipe,
        store.fingerprints["image"],
        lines,
        problems,
    )

    made = store.provenance["text"]
    text = TextEncoder(
        made["encoder"],
        pooling=settings["text_pooling"],
        max_length=settings["max_length"],
        dtype=settings["dtype"],
        seed=made["seed"],
        device=device,
        tokenizer_files=store.tokenizer_files,
    )
    rows = np.sort(generator.permutation(len(store.captions))[:sample])
    again, _ = text.encode([store.captions[row] for row in rows])
    _compare("caption", store.text_features, rows, again, text.recipe, store.fingerprints["text"], lines, problems)
    return lines, problems


def _compare(
    what: str, stored, rows: np.ndarray, again: np.ndarray, recipe: dict, fingerprint: str, lines: list, problems: list
) -> None:
    if digest(recipe) != fingerprint:
        problems.append(f"the {what} encoder is not the one the store was made with")
        return
    kept = stored[rows]
    spread = float(stored[: min(len(stored), 4096)].std(0).mean())
    error = float(torch.from_numpy(again - kept).square().mean().sqrt()) / max(spread, np.finfo(np.float32).tiny)
    lines.append(
        f"{what} features: {len(rows):,} encoded again; root-mean-square error {error:.1e} of their spread over {what}s"
    )
    if not error <= TOLERANCE:
        problems.append(
            f"the {what} features differ from a new encoding by {error:.1e} of their spread; "
            f"at most {TOLERANCE:.0e} is rounding"
        )
