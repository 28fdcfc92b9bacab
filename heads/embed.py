"""Feature store + heads -> embeddings: the file that search, evaluation and plots work on (docs/store-format.md)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from configs import OnceoverError
from configs.formats import EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION, UNIT_NORM_TOLERANCE
from extract.files import whole_file
from extract.store import SELECTION, FeatureStore, Roles, write_column
from heads.models import DualHeads, Ensemble

BLOCK = 4096  # rows embedded at a time
#: images (N, D), texts (M, D), image_index (M,), train and selection rows -> biases (``retrieval.hubness``)
CorrectHubs = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], Any]


class EmbedError(OnceoverError):
    """Heads that give no usable embedding."""


@torch.inference_mode()
def image_embeddings(heads: DualHeads | Ensemble, features: Tensor) -> np.ndarray:
    """float (N, V, D) -> unit vectors, float32 (N, embedding_dim).

    Raises:
        EmbedError: a vector that is not finite or has no direction.
    """
    return _checked("picture", [heads.embed_pictures(block.float()).cpu().numpy() for block in features.split(BLOCK)])


@torch.inference_mode()
def text_embeddings(heads: DualHeads | Ensemble, features: Tensor) -> np.ndarray:
    """float (M, D) -> unit vectors, float32 (M, embedding_dim).

    Raises:
        EmbedError: a vector that is not finite or has no direction.
    """
    return _checked("caption", [heads.embed_texts(block.float()).cpu().numpy() for block in features.split(BLOCK)])


def _checked(what: str, blocks: list[np.ndarray]) -> np.ndarray:
    vectors = np.concatenate(blocks)
    bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT_NORM_TOLERANCE))
    if len(bad):
        raise EmbedError(
            f"{len(bad)} {what} embeddings are not unit vectors (the first: row {bad[0]}); "
            "the heads have diverged or collapsed: lower training.learning_rate"
        )
    return vectors


def embed(heads: DualHeads | Ensemble, images: Tensor, texts: Tensor, image_index: np.ndarray, pictures: np.ndarray):
    """Embeddings of some pictures and of their captions, and the caption map counted among them."""
    captions = np.flatnonzero(np.isin(image_index, pictures))
    place = np.full(len(images), -1)
    place[pictures] = np.arange(len(pictures))
    return (
        image_embeddings(heads, images[torch.from_numpy(pictures).to(images.device)]),
        text_embeddings(heads, texts[torch.from_numpy(captions).to(texts.device)]),
        place[image_index[captions]],
    )


def write_embeddings(
    store: FeatureStore,
    heads: DualHeads | Ensemble,
    path: Path,
    roles: Roles,
    space: str,
    rerank: str,
    correct_hubs: CorrectHubs,
) -> None:
    """Writes the embeddings of the whole store with their biases, whole or not at all.

    The pictures that chose the heads stand under the split ``select`` where they were taken from train.
    """
    splits = np.array(store.image_splits, dtype=object)
    if roles.selection_name == SELECTION:
        splits[roles.selection] = SELECTION
    images = image_embeddings(heads, torch.from_numpy(store.image_features[:]))
    texts = text_embeddings(heads, torch.from_numpy(store.text_features[:]))
    hubs = correct_hubs(images, texts, store.image_index, roles.train, roles.selection)
    with whole_file(path) as aside, h5py.File(aside, "w") as file:
        file.attrs["format"], file.attrs["format_version"] = EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION
        for kind, fingerprint in store.fingerprints.items():
            file.attrs[f"{kind}_fingerprint"] = fingerprint
        file.attrs["selection_split"], file.attrs["report_split"] = roles.selection_name, roles.report_name
        file.attrs["space"], file.attrs["rerank"] = space, rerank
        image, text = file.create_group("image"), file.create_group("text")
        image["embedding"], text["embedding"] = images, texts
        for group, bias, beta in ((image, hubs.image, hubs.image_beta), (text, hubs.text, hubs.text_beta)):
            group["bias"] = bias
            group["bias"].attrs["beta"] = beta
        text["image_index"] = store.image_index
        write_column(image, "id", store.image_ids)
        write_column(image, "path", store.image_paths)
        write_column(image, "split", splits.tolist())
        write_column(image, "sha256", store.sha256)
        write_column(text, "caption", store.captions)
        thumbnails = store.thumbnails()
        if thumbnails is not None:
            write_column(image, "thumbnail", thumbnails)
