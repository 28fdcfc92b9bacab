"""Embeds a feature store, and writes the file that search, evaluation and plots read (docs/store-format.md)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np
import torch

from onceover.base.errors import OnceoverError
from onceover.base.formats import EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION, UNIT_NORM_TOLERANCE
from onceover.base.hdf5 import memory_mapped, write_column, write_hdf5
from onceover.extract.store import SELECTION, FeatureStore, Roles, copy_thumbnails
from onceover.heads.chunks import Features, blocks
from onceover.heads.models import DualHeads, Ensemble
from onceover.heads.rows import captions_of
from onceover.retrieval.hubness import fit_inverted_softmax


class EmbedError(OnceoverError):
    """Heads that give no usable embedding."""


def image_embeddings(heads: DualHeads | Ensemble, features: Features, rows: np.ndarray | None = None) -> np.ndarray:
    """Embeds images: features (N, V, D), or some rows of them -> unit vectors, float32 (N, embedding_dim).

    Raises:
        EmbedError: a vector that is not finite or has no direction.
    """
    return np.concatenate(list(_embedded("image", heads, features, rows)))


def text_embeddings(heads: DualHeads | Ensemble, features: Features, rows: np.ndarray | None = None) -> np.ndarray:
    """Embeds captions: features (M, D), or some rows of them -> unit vectors, float32 (M, embedding_dim).

    Raises:
        EmbedError: a vector that is not finite or has no direction.
    """
    return np.concatenate(list(_embedded("caption", heads, features, rows)))


@torch.inference_mode()
def _embedded(
    noun: str, heads: DualHeads | Ensemble, features: Features, rows: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yields vectors block by block, which reads the features as far as they are needed. ``noun``: image or caption."""
    embed_rows = heads.embed_images if noun == "image" else heads.embed_texts
    device = next(heads.parameters()).device
    start = 0
    for block in blocks(features, rows):
        yield check_units(noun, embed_rows(block.to(device)).cpu().numpy(), start)
        start += len(block)


def check_units(noun: str, vectors: np.ndarray, start: int = 0) -> np.ndarray:
    """Returns the vectors (N, D), if all have length 1.

    Args:
        noun: what they are of, and ``start``: the row of the first one, for the error.

    Raises:
        EmbedError: a vector that is not finite or has no direction.
    """
    bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT_NORM_TOLERANCE))
    if len(bad):
        raise EmbedError(
            f"{len(bad)} {noun} embeddings are not unit vectors (the first: row {start + bad[0]}); "
            "the heads have diverged or collapsed: lower training.learning_rate"
        )
    return vectors


def embed(
    heads: DualHeads | Ensemble, store: FeatureStore, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeds some images of a store and their captions.

    Args:
        images: int64 (P,), rows of the store, ascending.

    Returns:
        Image vectors (P, D), text vectors (T, D), and the position among the images of each caption's image (T,).
    """
    captions = captions_of(store.image_index, images)
    image_vectors = image_embeddings(heads, store.image_features, images)
    text_vectors = text_embeddings(heads, store.text_features, captions)
    return image_vectors, text_vectors, np.searchsorted(images, store.image_index[captions])


def write_embeddings(
    store: FeatureStore,
    heads: DualHeads | Ensemble,
    path: Path,
    roles: Roles,
    space: str,
    rerank: str,
    betas: Mapping[str, float | None] | None = None,
    closed_form_dims: int = 0,
) -> dict[str, float]:
    """Writes the embeddings of the whole store and their hubness biases, whole or not at all, block by block.

    The validation images stand under the split ``select`` where they were taken from train and the heads were not
    fitted on them again.

    Args:
        space: the name of the heads' space. rerank: the correction that searches use by default.
        betas: sharpness of the biases, as ``fit_inverted_softmax`` takes it.
        closed_form_dims: how many of the last dimensions are those of heads in closed form.

    Returns:
        The betas.
    """
    splits = np.array(store.image_splits, dtype=object)
    if roles.selection_name == SELECTION and not np.isin(roles.selection, roles.train).any():
        splits[roles.selection] = SELECTION
    with write_hdf5(path) as writer:
        file = writer.file
        file.attrs["format"] = EMBEDDINGS_FORMAT
        file.attrs["format_version"] = EMBEDDINGS_VERSION
        for kind, fingerprint in store.fingerprints.items():
            file.attrs[f"{kind}_fingerprint"] = fingerprint
        file.attrs["selection_split"] = roles.selection_name
        file.attrs["report_split"] = roles.report_name
        file.attrs["space"] = space
        file.attrs["rerank"] = rerank
        file.attrs["closed_form_dims"] = closed_form_dims
        image = file.create_group("image")
        text = file.create_group("text")
        _write_vectors(image, "image", heads, store.image_features)
        _write_vectors(text, "caption", heads, store.text_features)
        file.flush()
        writer.check()
        image_vectors = memory_mapped(image["embedding"], writer.path)
        text_vectors = memory_mapped(text["embedding"], writer.path)
        bank = np.flatnonzero(splits == "train")
        hubs = fit_inverted_softmax(image_vectors, text_vectors, store.image_index, bank, roles.selection, betas)
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


def _write_vectors(group: h5py.Group, noun: str, heads: DualHeads | Ensemble, features: Features) -> None:
    """Writes the embeddings of all rows of features as the dataset ``embedding`` of a group."""
    column = None
    start = 0
    for vectors in _embedded(noun, heads, features):
        if column is None:
            column = group.create_dataset("embedding", (len(features), vectors.shape[1]), dtype=np.float32)
        column[start : start + len(vectors)] = vectors
        start += len(vectors)
