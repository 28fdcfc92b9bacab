"""The reader of an embeddings file (docs/store-format.md); it checks the file and makes galleries of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from onceover.base.errors import OnceoverError, first_line
from onceover.base.formats import EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION, UNIT_NORM_TOLERANCE
from onceover.base.hdf5 import DAMAGE, memory_mapped, open_hdf5
from onceover.base.progress import LOGGER
from onceover.extract.store import Column, texts_in
from onceover.retrieval.baselines import unit_rows
from onceover.retrieval.gallery import Gallery, Items, facing_bias
from onceover.retrieval.ranks import Biases

BLOCK = 8192  # rows read at a time
PROBES = 500  # queries that an index is measured with


class EmbeddingsError(OnceoverError):
    """An embeddings file that is missing, damaged or not normalised."""


class SplitVectors(NamedTuple):
    """The vectors of a split.

    Attributes:
        images: float32 (n, D). texts: float32 (m, D). image_index: int64 (m,), the row in ``images`` of each text.
    """

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray


@dataclass(frozen=True)
class Embeddings:
    """N images and M captions in one space, as unit vectors.

    Attributes:
        images, texts: float32 (N, D), (M, D), memory-mapped.
        image_index: int64 (M,), each caption's image.
        ids, paths, splits, sha256: lists of N. thumbnails: N JPEGs, or None. captions: list of M.
        image_bias, text_bias: float32 (N,), (M,), of the inverted softmax (``retrieval.hubness``), made with ``betas``.
        rerank: whether a search adds these biases (``qbnorm``) or not (``none``) unless told otherwise.
        fingerprints: of the image features, the text features and the dataset behind it.
        space: names the heads and encoders that made the vectors; only queries of the same space may be compared.
        validation_split, report_split: the splits that chose the heads, and that they are to be reported on.
        closed_form_dims: how many of the last dimensions are those of heads in closed form, beside trained ones; or 0.
    """

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray
    ids: Sequence[str]
    paths: Sequence[str]
    splits: Sequence[str]
    captions: Sequence[str]
    sha256: Sequence[str]
    thumbnails: Sequence[bytes] | None
    image_bias: np.ndarray
    text_bias: np.ndarray
    betas: dict[str, float]
    rerank: str
    space: str
    fingerprints: dict[str, str]
    validation_split: str
    report_split: str
    closed_form_dims: int = 0

    def biases(self, rerank: str | None = None, split: str | None = None) -> Biases:
        """``image_bias`` and ``text_bias``, of all splits or of one, where ``rerank`` or else the run asks for them."""
        if (rerank or self.rerank) != "qbnorm":
            return {}
        if split is None:
            return {"image_bias": self.image_bias, "text_bias": self.text_bias}
        images, captions, _ = self.split(split)
        return {"image_bias": self.image_bias[images], "text_bias": self.text_bias[captions]}

    def probes(self, kind: str, biased: bool, seed: int = 0) -> np.ndarray:
        """At most ``PROBES`` queries for a gallery of a kind: a sample of the other kind in the reported split."""
        images, captions, _ = self.split(self.report_split)
        queries = self.texts[captions] if kind == "image" else self.images[images]
        queries = queries[np.random.default_rng(seed).permutation(len(queries))[:PROBES]]
        if biased:
            queries = facing_bias(queries)
        return queries

    def gallery(self, kind: str, split: str | None = None, rerank: str | None = None) -> Gallery:
        """The images (``kind`` image) or captions (text) as a gallery, of all splits or of one.

        Raises:
            EmbeddingsError: no such split. TemporaryFileError: no room.
        """
        items = Items(self.ids, self.paths, self.sha256, self.captions, self.image_index, self.thumbnails)
        biases = self.biases(rerank)
        if kind == "image":
            gallery = items.gallery(kind, self.images, biases.get("image_bias"), self.space)
        else:
            gallery = items.gallery(kind, self.texts, biases.get("text_bias"), self.space)
        if split is None:
            return gallery
        images, captions, _ = self.split(split)
        rows = images if kind == "image" else captions
        return gallery.take(rows)

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the images of a split, rows of their captions, and the caption map counted among those images.

        Raises:
            EmbeddingsError: no such split, or one without captions.
        """
        images = np.flatnonzero(np.array(self.splits) == name)
        captions = np.flatnonzero(np.isin(self.image_index, images))
        if not len(images) or not len(captions):
            known = ", ".join(sorted(set(self.splits) - {""}))
            raise EmbeddingsError(f"the run has no images in the split {name!r}; its splits: {known}")
        return images, captions, np.searchsorted(images, self.image_index[captions])

    def vectors_of(self, split: str) -> SplitVectors:
        """The vectors of a split's images and captions, with the caption map.

        Raises:
            EmbeddingsError: no such split, or one without captions.
        """
        images, captions, image_index = self.split(split)
        return SplitVectors(self.images[images], self.texts[captions], image_index)

    def parts_of(self, split: str) -> dict[str, SplitVectors]:
        """The vectors of the trained heads and of those in closed form, each alone, where there are both.

        Raises:
            EmbeddingsError: no such split, or one without captions.
        """
        if not self.closed_form_dims:
            return {}
        images, texts, image_index = self.vectors_of(split)
        trained = slice(None, -self.closed_form_dims)
        closed_form = slice(-self.closed_form_dims, None)
        parts = {}
        for name, columns in (("trained", trained), ("closed_form", closed_form)):
            parts[name] = SplitVectors(unit_rows(images[:, columns]), unit_rows(texts[:, columns]), image_index)
        return parts


def model_name(rerank: str) -> str:
    """The name that a run has among the models of an evaluation, by its correction for hubs."""
    names = {"none": "multimodal", "csls": "multimodal_csls_transductive"}
    return names.get(rerank, f"multimodal_{rerank}")


def read_embeddings(path: str | Path) -> Embeddings:
    """Reads and checks an embeddings file.

    Raises:
        EmbeddingsError: missing, not of this format, rows that are not finite unit vectors, a map that points outside.

    Example:
        >>> embeddings = onceover.read_embeddings("runs/first/embeddings.h5")
        >>> embeddings.images.shape, embeddings.texts.shape
        ((60, 16), (300, 16))
        >>> scores = embeddings.images @ embeddings.texts.T  # cosine similarities
    """
    path = Path(path)
    if not path.exists():
        raise EmbeddingsError(f"there are no embeddings at {path}; fit writes them")
    try:
        with open_hdf5(path) as file:
            if (file.attrs.get("format"), file.attrs.get("format_version")) != (EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION):
                raise EmbeddingsError(f"{path} is no embeddings file of the format {EMBEDDINGS_VERSION}; fit again")
            LOGGER.debug("reading the embeddings %s", path)
            embeddings = _read(file, path)
    except (OnceoverError, PermissionError):
        raise
    except DAMAGE as error:
        raise EmbeddingsError(f"{path} is damaged ({first_line(error)}); fit again") from error
    _check(embeddings, path)
    return embeddings


def _check(embeddings: Embeddings, path: Path) -> None:
    """Refuses rows that are no unit vectors, biases that are not one for each row, and a map that points outside.

    Raises:
        EmbeddingsError: the first thing that is wrong.
    """
    columns = {
        "image": (embeddings.images, embeddings.image_bias),
        "text": (embeddings.texts, embeddings.text_bias),
    }
    for name, (rows, bias) in columns.items():
        bad = _count_bad(rows)
        if bad:
            raise EmbeddingsError(f"{path}: {bad} {name} embeddings are not finite unit vectors; fit again")
        if bias.shape != rows.shape[:1]:
            raise EmbeddingsError(f"{path}: there is not one bias for each {name} embedding; fit again")
    if not 0 <= embeddings.closed_form_dims < embeddings.images.shape[1]:
        raise EmbeddingsError(f"{path}: more dimensions are said to be in closed form than there are; fit again")
    index = embeddings.image_index
    if len(index) and not (index.min() >= 0 and index.max() < len(embeddings.ids)):
        raise EmbeddingsError(f"{path}: the caption map points outside the images; fit again")


def _count_bad(rows: np.ndarray) -> int:
    """The number of rows that are not finite or not of length 1."""
    bad = 0
    for start in range(0, len(rows), BLOCK):
        lengths = np.linalg.norm(rows[start : start + BLOCK], axis=1)
        is_unit = np.abs(lengths - 1) < UNIT_NORM_TOLERANCE
        bad += int((~is_unit).sum())
    return bad


def _read(file: h5py.File, path: Path) -> Embeddings:
    image = file["image"]
    text = file["text"]
    columns = {name: texts_in(image[name]) for name in ("id", "path", "split", "sha256")}
    thumbnails = None
    if "thumbnail" in image:
        thumbnails = Column(image["thumbnail"], path)
    return Embeddings(
        images=memory_mapped(image["embedding"]),
        texts=memory_mapped(text["embedding"]),
        image_index=text["image_index"][:],
        ids=columns["id"],
        paths=columns["path"],
        splits=columns["split"],
        sha256=columns["sha256"],
        image_bias=image["bias"][:],
        text_bias=text["bias"][:],
        betas={"image": float(image["bias"].attrs["beta"]), "text": float(text["bias"].attrs["beta"])},
        rerank=file.attrs["rerank"],
        space=file.attrs["space"],
        captions=texts_in(text["caption"]),
        thumbnails=thumbnails,
        fingerprints={kind: file.attrs[f"{kind}_fingerprint"] for kind in ("image", "text", "dataset")},
        validation_split=file.attrs["selection_split"],
        report_split=file.attrs["report_split"],
        closed_form_dims=int(file.attrs.get("closed_form_dims", 0)),
    )
