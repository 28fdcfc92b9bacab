"""The tables that ``export`` and ``embed`` write: a run's own images or captions, or new ones, with their vectors."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onceover.analysis.coordinates import PrincipalMap, map_coordinates, tsne
from onceover.analysis.sources import RunFiles
from onceover.base.errors import OnceoverError
from onceover.base.formats import HEADS
from onceover.base.progress import say
from onceover.extract.image_source import ImageSource
from onceover.retrieval.embeddings import Embeddings
from onceover.retrieval.gallery import NOUNS, Gallery
from onceover.retrieval.vector_table import VectorTable

_FEWEST = 5  # images that t-SNE has something to say about


class ExportError(OnceoverError):
    """Images that are to be written into a table and are not there, or not those that were encoded."""


def run_table(
    folder: Path, provenance: dict[str, Any], embeddings: Embeddings, kind: str, split: str | None, neighbours: int
) -> VectorTable:
    """The table of a run's images (``kind`` image) or captions (text), of all splits or of one; without images' bytes.

    Args:
        folder, provenance, embeddings: the run's.

    Raises:
        EmbeddingsError: no such split. TemporaryFileError: no room.
    """
    gallery = embeddings.gallery(kind, split, "none")
    images = np.arange(len(embeddings.ids))
    captions = np.arange(len(embeddings.captions))
    if split is not None:
        images, captions, _ = embeddings.split(split)
    texts = {}
    if kind == "text":
        images = embeddings.image_index[captions]
        texts["image_id"] = [embeddings.ids[row] for row in images.tolist()]
    texts["split"] = [embeddings.splits[row] for row in images.tolist()]
    points = None
    if kind == "image" and split is not None:
        points = _tsne_of_all(RunFiles(folder, embeddings, split), images)
    about = {"split": split, "map": "t-SNE"}
    if points is None:
        points = _principal_points(embeddings, gallery)
        about["map"] = _principal_name(kind)
    say(f"{len(gallery):,} {NOUNS[kind]}; x and y: {about['map']}")
    return VectorTable(gallery, texts, points, neighbours, None, about | _origin(provenance, embeddings))


def gallery_table(provenance: dict[str, Any], embeddings: Embeddings, gallery: Gallery, neighbours: int) -> VectorTable:
    """The table of new images or captions; their coordinates are those that they have among the run's own.

    Args:
        provenance, embeddings: the run's, whose heads made the gallery's vectors.
    """
    about = {"map": _principal_name(gallery.kind)} | _origin(provenance, embeddings)
    say(f"{len(gallery):,} {NOUNS[gallery.kind]}; x and y: {about['map']}")
    return VectorTable(gallery, {}, _principal_points(embeddings, gallery), neighbours, None, about)


def with_images(table: VectorTable, source: ImageSource, keys: Sequence[str]) -> VectorTable:
    """The same table with the bytes of its images, which are read when it is written.

    Args:
        source: where the images are. keys: of each row's image there.

    Raises:
        ExportError: at once, some images are not there; when the table is written, one is not what was encoded.
    """
    missing = [key for key in keys if source.stat(key)[0] < 0]
    if missing:
        raise ExportError(
            f"{len(missing):,} of {len(keys):,} images are not there (the first: {source.describe(missing[0])}); "
            "name the place of the dataset, or leave the images out"
        )
    return replace(table, images=_checked_images(source, keys, table.gallery.contents))


def _checked_images(source: ImageSource, keys: Sequence[str], sha256: Sequence[str]) -> Iterator[bytes]:
    for key, read, expected in zip(keys, source.reads(keys), sha256, strict=True):
        try:
            image = read()
        except (OSError, OnceoverError) as error:
            raise ExportError(f"{source.describe(key)} cannot be read ({error}); restore it") from error
        if hashlib.sha256(image).hexdigest() != expected:
            raise ExportError(
                f"{source.describe(key)} is not the image that was encoded; restore it, or extract and fit again"
            )
        yield image


def _tsne_of_all(run: RunFiles, images: np.ndarray) -> np.ndarray | None:
    """The coordinates of all images of a split on the run's t-SNE map, as kept; None where it shows only some."""
    from onceover.analysis.figures.embedding_map import MAX_IMAGES

    if not _FEWEST <= len(images) <= MAX_IMAGES:
        return None
    pairs = run.sample_pairs(MAX_IMAGES)
    if not np.array_equal(pairs.images, images):  # some have no caption
        return None
    vectors = np.concatenate([run.embeddings.images[pairs.images], run.embeddings.texts[pairs.captions]])
    return map_coordinates(run, pairs, partial(tsne, vectors, run.seed))[: len(images)]


def _principal_points(embeddings: Embeddings, gallery: Gallery) -> np.ndarray:
    """The coordinates of items along the principal components of the run's own items of their kind."""
    own = embeddings.images if gallery.kind == "image" else embeddings.texts
    return PrincipalMap(own).points(gallery.vectors)


def _principal_name(kind: str) -> str:
    return f"PCA of all {NOUNS[kind]} of the run"


def _origin(provenance: dict[str, Any], embeddings: Embeddings) -> dict[str, Any]:
    """What made the vectors: the encoders and heads, by name and by fingerprint."""
    return {
        "space": embeddings.space,
        "encoders": {kind: provenance["encoders"][kind]["encoder"] for kind in NOUNS},
        "fingerprints": embeddings.fingerprints,
        "heads": provenance["files"][HEADS],
        "vectors": "float32, of length 1; their inner product is the cosine similarity",
    }
