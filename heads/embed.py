"""Feature store + heads -> embeddings: the file that search, evaluation and plots work on (docs/store-format.md)."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch

from onceover.base.errors import OnceoverError
from onceover.base.formats import EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION, UNIT_NORM_TOLERANCE
from onceover.base.hdf5 import memory_mapped, write_column, write_hdf5
from onceover.extract.store import SELECTION, FeatureStore, Roles, copy_thumbnails
from onceover.heads.chunks import blocks
from onceover.heads.models import DualHeads, Ensemble
from onceover.retrieval.hubness import fit_inverted_softmax


class EmbedError(OnceoverError):
    """Heads that give no usable embedding."""


def image_embeddings(heads: DualHeads | Ensemble, features: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Float features (N, V, D), or some rows of them -> unit vectors, float32 (N, embedding_dim).

    Raises:
        EmbedError: a vector that is not finite or has no direction.
    """
    return np.concatenate(list(_embedded("image", heads, features, rows)))


def text_embeddings(heads: DualHeads | Ensemble, features: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Float features (M, D), or some rows of them -> unit vectors, float32 (M, embedding_dim).

    Raises:
        EmbedError: a vector that is not finite or has no direction.
    """
    return np.concatenate(list(_embedded("caption", heads, features, rows)))


@torch.inference_mode()
def _embedded(
    what: str, heads: DualHeads | Ensemble, features: np.ndarray, rows: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """The vectors block by block; the features are read as far as they are needed."""
    embed_rows = heads.embed_pictures if what == "image" else heads.embed_texts
    device = next(heads.parameters()).device
    start = 0
    for part in blocks(features, rows):
        yield check_units(what, embed_rows(part.to(device)).cpu().numpy(), start)
        start += len(part)


def check_units(what: str, vectors: np.ndarray, start: int = 0) -> np.ndarray:
    """The vectors (N, D) themselves, if all have length 1; ``what`` they are and the first one's row, for the error.

    Raises:
        EmbedError: a vector that is not finite or has no direction.
    """
    bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT_NORM_TOLERANCE))
    if len(bad):
        raise EmbedError(
            f"{len(bad)} {what} embeddings are not unit vectors (the first: row {start + bad[0]}); "
            "the heads have diverged or collapsed: lower training.learning_rate"
        )
    return vectors


def embed(heads: DualHeads | Ensemble, store: FeatureStore, pictures: np.ndarray):
    """Embeddings of some images and of their captions, and the caption map counted among them."""
    captions = np.flatnonzero(np.isin(store.image_index, pictures))
    return (
        image_embeddings(heads, store.image_features, pictures),
        text_embeddings(heads, store.text_features, captions),
        np.searchsorted(pictures, store.image_index[captions]),
    )


def write_embeddings(
    store: FeatureStore,
    heads: DualHeads | Ensemble,
    path: Path,
    roles: Roles,
    space: str,
    rerank: str,
    betas: dict[str, float] | None = None,
) -> dict[str, float]:
    """Writes the embeddings of the whole store with their biases, whole or not at all, block by block; gives the betas.

    The images that chose the heads stand under the split ``select`` where they were taken from train and have not
    gone back there. ``betas``: of the biases, where they were chosen before.
    """
    splits = np.array(store.image_splits, dtype=object)
    if roles.selection_name == SELECTION and not np.isin(roles.selection, roles.train).any():
        splits[roles.selection] = SELECTION
    with write_hdf5(path) as writer:
        file = writer.file
        file.attrs["format"], file.attrs["format_version"] = EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION
        for kind, fingerprint in store.fingerprints.items():
            file.attrs[f"{kind}_fingerprint"] = fingerprint
        file.attrs["selection_split"], file.attrs["report_split"] = roles.selection_name, roles.report_name
        file.attrs["space"], file.attrs["rerank"] = space, rerank
        image, text = file.create_group("image"), file.create_group("text")
        _write_vectors(image, "image", heads, store.image_features)
        _write_vectors(text, "caption", heads, store.text_features)
        file.flush()
        writer.check()
        vectors = memory_mapped(image["embedding"], writer.path), memory_mapped(text["embedding"], writer.path)
        bank = np.flatnonzero(splits == "train")
        hubs = fit_inverted_softmax(*vectors, store.image_index, bank, roles.selection, betas)
        for kind, group in (("image", image), ("text", text)):
            group["bias"] = hubs.bias(kind)
            group["bias"].attrs["beta"] = hubs.betas[kind]
        text["image_index"] = store.image_index
        write_column(image, "id", store.image_ids)
        write_column(image, "path", store.image_paths)
        write_column(image, "split", splits.tolist())
        write_column(image, "sha256", store.sha256)
        write_column(text, "caption", store.captions)
        copy_thumbnails(store.thumbnails(), image)
    return hubs.betas


def _write_vectors(group: h5py.Group, what: str, heads: DualHeads | Ensemble, features: np.ndarray) -> None:
    column, start = None, 0
    for vectors in _embedded(what, heads, features):
        if column is None:
            column = group.create_dataset("embedding", (len(features), vectors.shape[1]), dtype=np.float32)
        column[start : start + len(vectors)] = vectors
        start += len(vectors)
