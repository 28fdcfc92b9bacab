"""The vectors of the last queries' terms: what somebody goes on typing at, or sends again, is not embedded again."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

KEPT = 2048  # vectors

Value = TypeVar("Value")


class Upload(bytes):
    """The bytes of an image file, with the pixels that were made of them already for the image encoder."""

    pixels: Any


class Vectors:
    """An embedder that keeps the last vectors. One thread alone uses it.

    Args:
        embedder: the one that it asks (``heads.query.QueryEmbedder``).
    """

    def __init__(self, embedder: Any):
        self.space: str = embedder.space
        self._embedder = embedder
        self._kept: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._notes: dict[str, str] = {}  # by text, of those that are kept

    def embed_texts(self, texts: Sequence[str], /) -> np.ndarray:
        """Unit vectors of texts, float32 (Q, D)."""
        return self._embedded([("text", text) for text in texts], texts, self._embed_texts)

    def note(self, text: str) -> str:
        """What the encoder left out of one of the last texts; "" where it took all of it."""
        return self._notes.get(text, "")

    def _embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        vectors, notes = self._embedder.embed_texts_with_notes(texts)
        for text, note in zip(texts, notes, strict=True):
            if note:
                self._notes[text] = note
        return vectors

    def embed_images(self, images: Sequence[str | bytes], /) -> np.ndarray:
        """Unit vectors of images, each an ``Upload``, float32 (Q, D)."""
        names = [("image", hashlib.sha256(bytes(image)).hexdigest()) for image in images]  # type: ignore[arg-type]
        return self._embedded(names, images, self._embed_uploads)

    def _embed_uploads(self, uploads: Sequence[Any]) -> np.ndarray:
        return self._embedder.embed_pixels([upload.pixels for upload in uploads])

    def _embedded(
        self, names: list[tuple[str, str]], values: Sequence[Value], embed: Callable[[Sequence[Value]], np.ndarray]
    ) -> np.ndarray:
        """The vectors of values by their names; those that are not kept are embedded together."""
        known = {name: self._kept[name] for name in names if name in self._kept}
        missing = {name: value for name, value in zip(names, values, strict=True) if name not in known}
        if missing:
            vectors = embed(list(missing.values()))
            known |= {name: vector.copy() for name, vector in zip(missing, vectors, strict=True)}  # not the whole batch
        for name, vector in known.items():
            self._kept[name] = vector
            self._kept.move_to_end(name)
        while len(self._kept) > KEPT:
            (_, value), _ = self._kept.popitem(last=False)
            self._notes.pop(value, None)
        return np.stack([known[name] for name in names])
