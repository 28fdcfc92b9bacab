"""A split's images and captions searched by each other: ranks, scores and who comes first."""

import io
from functools import cached_property

import numpy as np

from onceover.retrieval.embeddings import Embeddings
from onceover.retrieval.ranks import rank

_BLOCK_BYTES = 64 * 2**20  # of scores that are computed at a time


class SearchedSplit:
    """One split of a run, searched in both directions with the correction for hubs that its evaluation has.

    Attributes:
        images, texts, image_index: the split's vectors and the caption map (``SplitVectors``).
        to_text, to_image: the ranks of the images as queries, and of the captions.
        correction: the correction's name, one of ``retrieval.hubness.RERANKS``.
        damaged: the images whose thumbnails were asked for and cannot be decoded, as rows of the embeddings.
    """

    def __init__(self, embeddings: Embeddings, split: str, rerank: str | None = None):
        self.embeddings = embeddings
        self.split = split
        self.correction = rerank or embeddings.rerank
        self.damaged: set[int] = set()
        self._image_rows, self._caption_rows, _ = embeddings.split(split)
        self.images, self.texts, self.image_index = embeddings.vectors_of(split)
        self.biases = embeddings.biases(rerank, split)
        self.to_text, self.to_image = rank(self.images, self.texts, self.image_index, **self.biases)

    def caption(self, row: int) -> str:
        """A caption of the split."""
        return self.embeddings.captions[self._caption_rows[row]]

    def image_id(self, row: int) -> str:
        """The id of an image of the split."""
        return self.embeddings.ids[self._image_rows[row]]

    def thumbnail(self, row: int) -> bytes | None:
        """The JPEG of an image of the split; None where the run has none, or it cannot be decoded."""
        return self.stored_thumbnail(int(self._image_rows[row]))

    def stored_thumbnail(self, row: int) -> bytes | None:
        """The JPEG of any image of the run, by its row in the embeddings; None where there is none that is whole."""
        if self.embeddings.thumbnails is None:
            return None
        thumbnail = self.embeddings.thumbnails[row]
        if is_jpeg(thumbnail):
            return thumbnail
        self.damaged.add(row)
        return None

    def damage(self) -> str | None:
        """A note on the thumbnails that cannot be decoded; None where there are none."""
        if not self.damaged:
            return None
        count = f"{len(self.damaged):,} thumbnail{'s' * (len(self.damaged) > 1)}"
        return f"{count} of the run cannot be decoded, and are not shown; to mend them, extract and fit again"

    def image_scores(self, caption: int) -> np.ndarray:
        """The scores of all images for a caption, float32 (n,)."""
        return self.images @ self.texts[caption] + self.biases.get("image_bias", 0)

    def caption_scores(self, image: int) -> np.ndarray:
        """The scores of all captions for an image, float32 (m,)."""
        return self.texts @ self.images[image] + self.biases.get("text_bias", 0)

    def captions_of(self, image: int) -> np.ndarray:
        """The rows of an image's own captions."""
        return np.flatnonzero(self.image_index == image)

    @cached_property
    def caption_leads(self) -> np.ndarray:
        """By how much the right image of each caption scores more than the best wrong one, float32 (m,)."""
        owners = np.arange(len(self.images))
        return _leads(self.texts, self.images, self.biases.get("image_bias", 0), self.image_index, owners)

    @cached_property
    def image_leads(self) -> np.ndarray:
        """By how much the best own caption of each image scores more than the best wrong one, float32 (n,)."""
        owners = np.arange(len(self.images))
        return _leads(self.images, self.texts, self.biases.get("text_bias", 0), owners, self.image_index)


def is_jpeg(data: bytes) -> bool:
    """Whether a JPEG can be decoded whole."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
    except Exception:  # a damaged image makes errors of many kinds
        return False
    return True


def _leads(
    queries: np.ndarray, gallery: np.ndarray, bias: np.ndarray | float, wanted: np.ndarray, owners: np.ndarray
) -> np.ndarray:
    """The best score of each query's correct items less that of its wrong ones, float32 (Q,).

    Args:
        wanted: the image that each query belongs to. owners: the image that each item of the gallery belongs to.
    """
    leads = np.empty(len(queries), np.float32)
    rows = max(1, _BLOCK_BYTES // (8 * len(gallery)))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        scores = queries[block] @ gallery.T + bias
        is_correct = wanted[block, None] == owners
        correct = np.where(is_correct, scores, -np.inf).max(1)
        leads[block] = correct - np.where(is_correct, -np.inf, scores).max(1)
    return leads
