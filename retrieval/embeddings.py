"""Reads an embeddings file (docs/store-format.md), checks that it is what it must be, and makes galleries of it."""

import errno
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from onceover.base.errors import OnceoverError, first_line
from onceover.base.formats import EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION, UNIT_NORM_TOLERANCE
from onceover.base.hdf5 import DAMAGE, memory_mapped, open_hdf5
from onceover.extract.store import Column, FeatureStore, caption_ids


class EmbeddingsError(OnceoverError):
    """An embeddings file that is missing, damaged or not normalised."""


BLOCK = 8192  # rows read at a time
PROBES = 500  # queries that an index is measured with
IN_MEMORY = 256 * 2**20  # bytes of vectors with a bias up to which they need no temporary file


@dataclass(frozen=True)
class Embeddings:
    """N images and M captions in one space, as unit vectors.

    Attributes:
        images, texts: float32 (N, D), (M, D), mapped: only what is used is read.
        image_index: int64 (M,), each caption's image.
        ids, paths, splits, sha256: lists of N; thumbnails: N JPEGs, or None. captions: list of M.
        image_bias, text_bias: float32 (N,), (M,), of the inverted softmax (``retrieval.hubness``), made with ``betas``.
        rerank: whether a search adds these biases (``qbnorm``) or not (``none``) unless told otherwise.
        fingerprints: of the image features, the text features and the dataset behind it.
        space: names the heads and encoders that made the vectors; only queries of the same space may be compared.
        selection_split, report_split: what the heads were chosen by, and what they are to be reported on.
    """

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray
    ids: list[str]
    paths: list[str]
    splits: list[str]
    captions: list[str]
    sha256: list[str]
    thumbnails: Sequence[bytes] | None
    image_bias: np.ndarray
    text_bias: np.ndarray
    betas: dict[str, float]
    rerank: str
    space: str
    fingerprints: dict[str, str]
    selection_split: str
    report_split: str

    def biases(self, rerank: str | None = None, split: str | None = None) -> dict[str, np.ndarray]:
        """``image_bias`` and ``text_bias``, of all splits or of one, where ``rerank`` or else the run asks for them."""
        if (rerank or self.rerank) != "qbnorm":
            return {}
        pictures, captions = self.split(split)[:2] if split is not None else (slice(None), slice(None))
        return {"image_bias": self.image_bias[pictures], "text_bias": self.text_bias[captions]}

    def probes(self, kind: str, biased: bool, seed: int = 0) -> np.ndarray:
        """At most ``PROBES`` queries for a gallery of a kind: of the other one, a sample of the reported split's."""
        pictures, captions, _ = self.split(self.report_split)
        rows = self.texts[captions] if kind == "image" else self.images[pictures]
        rows = rows[np.random.default_rng(seed).permutation(len(rows))[:PROBES]]
        return facing_bias(rows) if biased else rows

    def gallery(self, kind: str, split: str | None = None, rerank: str | None = None) -> "Gallery":
        """The images (``kind`` image) or captions (text) as a gallery, of all splits or of one."""
        vectors, bias = getattr(self, f"{kind}s"), self.biases(rerank).get(f"{kind}_bias")
        columns = self.ids, self.paths, self.sha256, self.captions, self.image_index, self.thumbnails
        gallery = _gallery(kind, vectors, bias, self.space, *columns)
        return gallery if split is None else gallery.take(self.split(split)[0 if kind == "image" else 1])

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the images of a split, rows of their captions, and the caption map counted among those images.

        Raises:
            EmbeddingsError: no such split, or one without captions.
        """
        pictures = np.flatnonzero(np.array(self.splits) == name)
        captions = np.flatnonzero(np.isin(self.image_index, pictures))
        if not len(pictures) or not len(captions):
            known = ", ".join(sorted({split for split in self.splits if split}))
            raise EmbeddingsError(f"the run has no images in the split {name!r}; its splits: {known}")
        return pictures, captions, np.searchsorted(pictures, self.image_index[captions])


@dataclass(frozen=True)
class Gallery:
    """What is searched: N images, or N captions, in memory, by exact search.

    Attributes:
        kind: ``image`` or ``text``.
        vectors: float32 (N, D): unit vectors, with their bias as one more coordinate where ``biased``.
        ids: the images' or captions' ids. paths: of the images, "" for a caption that has none.
        captions: for each item its captions, or the caption that it is.
        contents: equal for items that look the same, to a reader of the hits: SHA-256 of an image, text of a caption.
        thumbnails: of the images, JPEG, or None.
        space: names the heads and encoders that made the vectors.
    """

    kind: str
    vectors: np.ndarray
    biased: bool
    ids: list[str]
    paths: list[str]
    captions: list[list[str]]
    contents: list[str]
    thumbnails: Sequence[bytes] | None
    space: str

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and rows, best first, for each of the queries, float32 (Q, D) with a 1 for the bias where biased."""
        from onceover.retrieval.exact import exact_search  # with faiss, which figures do without

        return list(zip(*exact_search(self.vectors, queries, k), strict=True))

    def contents_of(self, rows: list[int]) -> list[str]:
        """For each of the rows what is equal where two look the same."""
        return [self.contents[row] for row in rows]

    def item(self, row: int) -> dict:
        """What a hit shows of a row: id, path, captions, thumbnail."""
        return {
            "id": self.ids[row],
            "path": self.paths[row],
            "captions": self.captions[row],
            "thumbnail": None if self.thumbnails is None else self.thumbnails[row],
        }

    def take(self, rows: np.ndarray) -> "Gallery":
        """Some of the items; their thumbnails stay where they are until one is asked for."""
        lists = ("ids", "paths", "captions", "contents")
        columns = {name: [getattr(self, name)[row] for row in rows] for name in lists}
        small = None if self.thumbnails is None else Lazy(self.thumbnails.__getitem__, np.asarray(rows).tolist())
        return replace(self, vectors=self.vectors[rows], thumbnails=small, **columns)


class Lazy(Sequence):
    """What ``read`` gives for each of some keys, read when it is asked for."""

    def __init__(self, read: Callable[[Any], bytes], keys: list):
        self._read, self._keys = read, keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> bytes:
        return self._read(self._keys[number])


def model_name(rerank: str) -> str:
    """What a run is called among the models of an evaluation when it is corrected for hubs in this way, or not."""
    return {"none": "multimodal", "csls": "multimodal_csls_transductive"}.get(rerank, f"multimodal_{rerank}")


def facing_bias(queries: np.ndarray) -> np.ndarray:
    """Queries (Q, D) with a 1 as one more coordinate, to meet the bias of a gallery's items; float32 stays float32."""
    return np.column_stack([queries, np.ones(len(queries), np.float32)])


def gallery_of_store(
    store: FeatureStore, kind: str, vectors: np.ndarray, bias: np.ndarray | None, space: str
) -> Gallery:
    """The images or captions of any store as a gallery, with the vectors that heads have made of their features."""
    columns = store.image_ids, store.image_paths, store.sha256, store.captions, store.image_index, store.thumbnails()
    return _gallery(kind, vectors, bias, space, *columns)


def _gallery(kind, vectors, bias, space, ids, paths, sha256, captions, image_index, thumbnails) -> Gallery:
    if bias is not None:
        vectors = _beside(vectors, bias)
    if kind == "text":
        of_caption = ["" if picture < 0 else paths[picture] for picture in image_index.tolist()]
        names = caption_ids(ids, image_index) if len(ids) else _sentence_ids(captions)
        said = [[caption] for caption in captions]
        return Gallery(kind, vectors, bias is not None, names, of_caption, said, captions, None, space)
    of_picture: list[list[str]] = [[] for _ in ids]
    for caption, picture in zip(captions, image_index.tolist(), strict=True):
        of_picture[picture].append(caption)
    return Gallery(kind, vectors, bias is not None, ids, paths, of_picture, sha256, thumbnails, space)


def _beside(vectors: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """``vectors`` with ``bias`` as one more coordinate, in memory, or where they are many in a mapped temporary file.

    Raises:
        EmbeddingsError: the temporary folder has no room for it.
    """
    joined = _room_for((len(vectors), vectors.shape[1] + 1))
    for start in range(0, len(vectors), BLOCK):
        rows = slice(start, start + BLOCK)
        joined[rows, :-1], joined[rows, -1] = vectors[rows], bias[rows]
    return joined


def _room_for(shape: tuple[int, int]) -> np.ndarray:
    """A float32 array to be filled; its room is reserved, since a mapped file without room ends the process."""
    size = 4 * shape[0] * shape[1]
    if size <= IN_MEMORY:
        return np.empty(shape, np.float32)
    try:
        with tempfile.TemporaryFile() as file:
            _reserve(file, size)
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as error:
        raise EmbeddingsError(
            f"{tempfile.gettempdir()} has no room for a temporary file of {size / 2**20:,.0f} MiB ({error.strerror}); "
            "make room there, or name another folder in the environment variable TMPDIR"
        ) from error


def _reserve(file: BinaryIO, size: int) -> None:
    """Makes a file so many bytes long, all of them on the disk."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        zeros = bytes(2**20)
        for start in range(0, size, len(zeros)):
            file.write(zeros[: size - start])
        file.flush()


def _sentence_ids(sentences: list[str]) -> list[str]:
    """A stable id for each sentence: the beginning of its SHA-256, and a number where it stands several times."""
    seen: Counter[str] = Counter()
    names = []
    for sentence in sentences:
        name = hashlib.sha256(sentence.encode()).hexdigest()[:12]
        names.append(f"{name}#{seen[name]}")
        seen[name] += 1
    return names


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
            embeddings = _read(file, path)
    except (OnceoverError, PermissionError):
        raise
    except DAMAGE as error:
        raise EmbeddingsError(f"{path} is damaged ({first_line(error)}); fit again") from error
    for name, rows in (("image", embeddings.images), ("text", embeddings.texts)):
        blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
        bad = sum(int((~(np.abs(np.linalg.norm(block, axis=1) - 1) < UNIT_NORM_TOLERANCE)).sum()) for block in blocks)
        if bad:
            raise EmbeddingsError(f"{path}: {bad} {name} embeddings are not finite unit vectors; fit again")
        if getattr(embeddings, f"{name}_bias").shape != rows.shape[:1]:
            raise EmbeddingsError(f"{path}: there is not one bias for each {name} embedding; fit again")
    index, pictures = embeddings.image_index, len(embeddings.ids)
    if len(index) and not (index.min() >= 0 and index.max() < pictures):
        raise EmbeddingsError(f"{path}: the caption map points outside the images; fit again")
    return embeddings


def _read(file: h5py.File, path: Path) -> Embeddings:
    image, text = file["image"], file["text"]
    strings = {name: image[name].asstr()[:].tolist() for name in ("id", "path", "split", "sha256")}
    return Embeddings(
        images=memory_mapped(image["embedding"], path),
        texts=memory_mapped(text["embedding"], path),
        image_index=text["image_index"][:],
        ids=strings["id"],
        paths=strings["path"],
        splits=strings["split"],
        sha256=strings["sha256"],
        image_bias=image["bias"][:],
        text_bias=text["bias"][:],
        betas={"image": float(image["bias"].attrs["beta"]), "text": float(text["bias"].attrs["beta"])},
        rerank=file.attrs["rerank"],
        space=file.attrs["space"],
        captions=text["caption"].asstr()[:].tolist(),
        thumbnails=Column(image["thumbnail"], path) if "thumbnail" in image else None,
        fingerprints={kind: file.attrs[f"{kind}_fingerprint"] for kind in ("image", "text", "dataset")},
        selection_split=file.attrs["selection_split"],
        report_split=file.attrs["report_split"],
    )
