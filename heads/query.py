"""Queries -> vectors: the run's frozen encoders, then its heads. Beside fine-tuning the one place where both meet."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from onceover.extract.encoding.image import image_encoder_of
from onceover.extract.encoding.text import text_encoder_of
from onceover.extract.pictures import read_picture
from onceover.heads.checkpoint import Run
from onceover.heads.embed import EmbedError, image_embeddings, text_embeddings
from onceover.heads.models import mix

BATCH = 16  # images encoded at a time


class QueryEmbedder:
    """Embeds texts and image files with a run's own encoders, which are loaded at first use and then kept.

    Args:
        run: a finished run (``heads.checkpoint.load_run``).
        device: as ``--device``; the best one at hand by default.
        image_encoder, text_encoder: where an encoder is now, if it has moved.
        say: receives what the user should be told, such as that a text was cut.
    """

    def __init__(
        self,
        run: Run,
        *,
        device: str | None = None,
        image_encoder: str | None = None,
        text_encoder: str | None = None,
        say: Callable[[str], None] = lambda _: None,
    ):
        self._run, self._device, self._say = run, device, say
        self._specs = {"image": image_encoder, "text": text_encoder}
        self._encoders: dict = {}
        self.space = run.provenance["space"]

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 (Q, embedding_dim).

        Raises:
            RunError: the encoder is not the run's. EmbedError: a vector that is not finite or has no direction.
        """
        features, truncated = self._encoder("text").encode(list(texts))
        for number in np.flatnonzero(truncated):
            self._say(f"longer than the text encoder takes, and cut: {texts[number][:60]!r}…")
        return text_embeddings(self._run.heads, features)

    def embed_images(self, paths: Sequence[str]) -> np.ndarray:
        """Unit vectors of image files, float32 (Q, embedding_dim).

        Raises:
            PictureError: a file that is no usable image; and those of ``embed_texts``.
        """
        encoder, blocks = self._encoder("image"), []
        different = list(dict.fromkeys(paths))
        place = {path: number for number, path in enumerate(different)}
        for start in range(0, len(different), BATCH):
            part = different[start : start + BATCH]
            pixels = torch.stack([encoder.pixels(read_picture(path, encoder.short_side)) for path in part])
            blocks.append(encoder.encode(pixels))
        vectors = image_embeddings(self._run.heads, np.concatenate(blocks))
        return vectors[[place[path] for path in paths]]

    def embed_mixed(self, texts: Sequence[str], paths: Sequence[str], weight: float) -> np.ndarray:
        """Normalised weighted sums of texts' and images' vectors; ``weight``, 0 to 1, is the texts' share.

        Raises:
            EmbedError: a sum without direction; and those of ``embed_texts`` and ``embed_images``.
        """
        pair = (torch.from_numpy(side) for side in (self.embed_texts(texts), self.embed_images(paths)))
        vectors = mix(*pair, weight).numpy()
        if not vectors.any(1).all():
            raise EmbedError("the text and the image point in opposite directions; change the weight")
        return vectors

    def _encoder(self, kind: str):
        if kind not in self._encoders:
            made, spec = self._run.provenance, self._specs[kind]
            where = made["encoders"][kind]
            if kind == "image":
                encoder = image_encoder_of(where, made["recipes"][kind], made["extract"], self._device, spec)
            else:
                encoder = text_encoder_of(
                    where, made["recipes"][kind], made["extract"], self._run.tokenizer_files, self._device, spec
                )
            self._run.check_encoder(kind, encoder.recipe)
            self._say(f"encoding queries with {spec or where['encoder']} on {encoder.device}")
            self._encoders[kind] = encoder
        return self._encoders[kind]
