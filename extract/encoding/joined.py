"""Joined encoders: several encoders of one kind, whose features lie side by side in a row."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from onceover.extract.encoder_files import numbered_files
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.preprocessing import Preprocessing
from onceover.extract.encoding.text import TextEncoder, encode_by_length
from onceover.extract.joined import joined_recipe


class JoinedPreprocessing:
    """The preprocessings of several image encoders. Their pixels lie one after the other, as bytes.

    Attributes:
        views: those of all encoders, from the first on.
    """

    def __init__(self, preprocessings: Sequence[Preprocessing], views: list):
        self.views = views
        self._preprocessings = preprocessings
        sample = Image.new("RGB", (256, 256))
        self._shapes = []
        for preprocessing in preprocessings:
            pixels = preprocessing.pixels(sample)
            self._shapes.append((pixels.shape, pixels.dtype))

    def read(self, data: bytes) -> tuple[Image.Image, Callable[[], Tensor]]:
        """The image in ``data``, as the first encoder has it decoded, and a function that gives the pixels.

        It is decoded for each encoder as for it alone.

        Raises:
            PictureError, MemoryError: as ``pictures.decode``.
        """
        decoded = [preprocessing.read(data) for preprocessing in self._preprocessings]

        def pixels() -> Tensor:
            return _together([own_pixels() for _, own_pixels in decoded])

        return decoded[0][0], pixels

    def pixels(self, image: Image.Image) -> Tensor:
        """The pixels of an image for all encoders: uint8 (P,)."""
        return _together([preprocessing.pixels(image) for preprocessing in self._preprocessings])

    def split(self, pixels: Tensor) -> list[Tensor]:
        """Pixels of B images, (B, P), as each encoder takes them."""
        parts = []
        start = 0
        for shape, dtype in self._shapes:
            end = start + shape.numel() * dtype.itemsize
            parts.append(pixels[:, start:end].contiguous().view(dtype).view(-1, *shape))
            start = end
        return parts


def _together(pixels: list[Tensor]) -> Tensor:
    """Pixels of one image for several encoders, as bytes one after the other: uint8 (P,)."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in pixels])


class JoinedEncoder:
    """Several encoders of one kind; the base of those of images and of texts.

    Attributes:
        recipe: that of the features side by side.
        parts: the provenance of each encoder.
        device: where they compute.
        backend: the name of the backend that computes, or one of each encoder, with commas between them.
    """

    def __init__(self, kind: str, encoders: Sequence[Any], parts: list[dict], store_dtype: str):
        self.recipe = joined_recipe(kind, [encoder.recipe for encoder in encoders], store_dtype)
        self.parts = parts
        self.device = encoders[0].device
        backends = [encoder.backend for encoder in encoders]
        self.backend = backends[0] if len(set(backends)) == 1 else ", ".join(backends)
        self._store_dtype = np.dtype(store_dtype)

    def _side_by_side(self, features: list[np.ndarray]) -> np.ndarray:
        """Features of the same rows, one after the other in each row."""
        return np.concatenate(features, axis=-1, dtype=self._store_dtype)


class JoinedImageEncoder(JoinedEncoder):
    """Several image encoders, used like one ``ImageEncoder``.

    Attributes:
        preprocessing: the steps before the networks.
    """

    def __init__(self, encoders: Sequence[ImageEncoder], parts: list[dict], store_dtype: str):
        super().__init__("image", encoders, parts, store_dtype)
        self._encoders = encoders
        preprocessings = [encoder.preprocessing for encoder in encoders]
        self.preprocessing = JoinedPreprocessing(preprocessings, self.recipe["views"])

    def read(self, data: bytes) -> Tensor:
        """The pixels of the image in ``data``, decoded for each encoder as for it alone."""
        return self.preprocessing.read(data)[1]()

    def pixels(self, image: Image.Image) -> Tensor:
        """As ``JoinedPreprocessing.pixels``."""
        return self.preprocessing.pixels(image)

    def encode(self, pixels: Tensor) -> np.ndarray:
        """Features of B images: (B, P) of ``pixels`` -> (B, V, D) as stored, of the views that all encoders have."""
        return self.begin(pixels)()

    def begin(self, pixels: Tensor) -> Callable[[], np.ndarray]:
        """Begins to encode; the call that is returned waits for what ``encode`` gives."""
        count = len(self.preprocessing.views)
        parts = zip(self._encoders, self.preprocessing.split(pixels), strict=True)
        begun = [encoder.begin(own_pixels) for encoder, own_pixels in parts]
        return lambda: self._side_by_side([finish()[:, :count] for finish in begun])


class JoinedTokens:
    """The token ids of a caption for several text encoders; its length is the longest one's."""

    def __init__(self, parts: Sequence[list[int]]):
        self.parts = parts

    def __len__(self) -> int:
        return max(map(len, self.parts))


class JoinedTextEncoder(JoinedEncoder):
    """Several text encoders, used like one ``TextEncoder``.

    Attributes:
        tokenizer_files: those of all tokenizers, with the number of each in their names.
    """

    def __init__(self, encoders: Sequence[TextEncoder], parts: list[dict], store_dtype: str):
        super().__init__("text", encoders, parts, store_dtype)
        self._encoders = encoders
        self.tokenizer_files = numbered_files([encoder.tokenizer_files for encoder in encoders])

    def encode(
        self, captions: list[str], batch_size: int = 64, *, are_queries: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features of M captions, (M, D) as stored, in their order, and which one of the encoders cut, bool (M,)."""
        token_ids, is_cut = self.tokenize(captions, are_queries=are_queries)
        return encode_by_length(self.encode_tokens, token_ids, batch_size), is_cut

    def tokenize(self, captions: list[str], *, are_queries: bool = False) -> tuple[list[JoinedTokens], np.ndarray]:
        """Token ids of M captions for all encoders, and which one of these cut, bool (M,)."""
        tokenized = [encoder.tokenize(captions, are_queries=are_queries) for encoder in self._encoders]
        is_cut = np.logical_or.reduce([truncated for _, truncated in tokenized])
        return [JoinedTokens(parts) for parts in zip(*(ids for ids, _ in tokenized), strict=True)], is_cut

    def unknown_tokens(self, token_ids: list[JoinedTokens]) -> tuple[np.ndarray, np.ndarray]:
        """As ``TextEncoder.unknown_tokens``, of the encoder whose vocabulary lacks the least of a caption."""
        counts = []
        for number, encoder in enumerate(self._encoders):
            counts.append(encoder.unknown_tokens([tokens.parts[number] for tokens in token_ids]))
        unknown = np.stack([of_encoder for of_encoder, _ in counts])
        tokens = np.stack([of_encoder for _, of_encoder in counts])
        best = (unknown / np.maximum(tokens, 1)).argmin(axis=0)[None]
        return np.take_along_axis(unknown, best, 0)[0], np.take_along_axis(tokens, best, 0)[0]

    def encode_tokens(self, token_ids: list[JoinedTokens]) -> np.ndarray:
        """Features of a batch of B captions: (B, D) as stored."""
        return self.begin(token_ids)()

    def begin(self, token_ids: list[JoinedTokens]) -> Callable[[], np.ndarray]:
        """Begins to encode; the call that is returned waits for what ``encode_tokens`` gives."""
        begun = []
        for number, encoder in enumerate(self._encoders):
            begun.append(encoder.begin([tokens.parts[number] for tokens in token_ids]))
        return lambda: self._side_by_side([finish() for finish in begun])
