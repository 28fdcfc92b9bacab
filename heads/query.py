"""Embeds queries with a run's own encoders and heads. Beside fine-tuning the one place where encoders meet heads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from onceover.base.files import read_bytes
from onceover.base.progress import say, warn
from onceover.extract.encoding.text import encode_by_length
from onceover.extract.pictures import MAX_BYTES, named_errors
from onceover.heads.checkpoint import Run
from onceover.heads.embed import image_embeddings, text_embeddings

BATCH = 16  # images encoded at a time


class QueryEmbedder:
    """Embeds texts and image files with a run's own encoders, which are loaded at first use and then kept.

    Args:
        run: a finished run (``heads.checkpoint.load_run``).
        device: as ``--device``; by default the best one at hand.
        image_encoder, text_encoder: where an encoder is now, if it has moved.

    Attributes:
        space: the name of the space that the vectors lie in.
    """

    def __init__(
        self,
        run: Run,
        *,
        device: str | None = None,
        image_encoder: str | None = None,
        text_encoder: str | None = None,
    ):
        self.space: str = run.provenance["space"]
        self._run = run
        self._device = device
        self._specs = {"image": image_encoder, "text": text_encoder}
        self._encoders: dict[str, Any] = {}

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: unit vectors, float32 (Q, embedding_dim).

        Raises:
            RunError: the encoder is not the run's. EmbedError: a vector that is not finite or has no direction.
        """
        vectors, notes = self.embed_texts_with_notes(texts)
        for note in filter(None, notes):
            warn(note)
        return vectors

    def embed_texts_with_notes(self, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Embeds texts as ``embed_texts``, and notes of each what the encoder left out; "" where it took all of it."""
        encoder = self._encoder("text")
        token_ids, truncated = encoder.tokenize(list(texts), are_queries=True)
        unknown, tokens = encoder.unknown_tokens(token_ids)
        notes = []
        for row, text in enumerate(texts):
            lacking = []
            if truncated[row]:
                lacking.append(f"longer than the text encoder takes, and cut: {text[:60]!r}…")
            if unknown[row]:
                counts = f"{unknown[row]} of {tokens[row]} tokens"
                lacking.append(f"{counts} are unknown to the text encoder, and count for nothing: {text[:60]!r}")
            notes.append("; ".join(lacking))
        return text_embeddings(self._run.heads, encode_by_length(encoder.encode_tokens, token_ids)), notes

    def embed_images(self, images: Sequence[str | bytes]) -> np.ndarray:
        """Embeds image files, each by its path, its address or its bytes: unit vectors, float32 (Q, embedding_dim).

        A file that stands twice is encoded once.

        Raises:
            PictureError: a file that is no usable image; and those of ``embed_texts``.
        """
        distinct = list(dict.fromkeys(images))
        vectors = []
        for start in range(0, len(distinct), BATCH):
            vectors.append(self.embed_pixels([self.pixels(image) for image in distinct[start : start + BATCH]]))
        rows = {image: row for row, image in enumerate(distinct)}
        return np.concatenate(vectors)[[rows[image] for image in images]]

    def pixels(self, image: str | bytes) -> torch.Tensor:
        """The pixels of an image file that the image encoder takes. May be called from several threads.

        Raises:
            PictureError: no usable image. MemoryError: no room for it now. And those of ``embed_texts``.
        """
        encoder = self._encoder("image")
        with named_errors("the image" if isinstance(image, bytes) else image):
            return encoder.read(image if isinstance(image, bytes) else read_bytes(image, MAX_BYTES))

    def embed_pixels(self, pixels: Sequence[torch.Tensor]) -> np.ndarray:
        """Embeds what ``pixels`` gave of some images: unit vectors, float32 (Q, embedding_dim).

        Raises:
            EmbedError: a vector that is not finite or has no direction.
        """
        encoder = self._encoder("image")
        features = []
        for start in range(0, len(pixels), BATCH):
            features.append(encoder.encode(torch.stack(list(pixels[start : start + BATCH]))))
        return image_embeddings(self._run.heads, np.concatenate(features))

    def _encoder(self, kind: str) -> Any:
        """The encoder of a kind, which is the run's; it is loaded once.

        Raises:
            RunError: it is another one.
        """
        if kind not in self._encoders:
            spec = self._specs[kind]
            encoder = self._run.load_encoder(kind, spec, self._device)
            self._run.check_encoder(kind, encoder.recipe)
            where = spec or self._run.provenance["encoders"][kind]["encoder"]
            say(f"encoding queries with {where} on {encoder.device}")
            self._encoders[kind] = encoder
        return self._encoders[kind]
