"""Other ways to count the same search: equal captions as equally correct, and smaller galleries, as papers report."""

from collections.abc import Sequence

import numpy as np

from onceover.retrieval.metrics import RankPair
from onceover.retrieval.ranks import Biases, MetricsError, Ranks, rank


def rank_equal_captions(
    images: np.ndarray, texts: np.ndarray, image_index: np.ndarray, captions: Sequence[str], biases: Biases
) -> RankPair:
    """Ranks in which all equal captions are correct for an image, and all their images for each of them.

    Equal captions all score as the first of them does; their own vectors and biases can differ in the last bits.

    Args:
        images: (N, D). texts: (M, D). image_index: int64 (M,). captions: list of M. biases: as ``rank`` takes them.
    """
    _, first, label = np.unique(np.array(captions, dtype=object), return_index=True, return_inverse=True)
    representative = first[label]
    own: Biases = {**biases}
    if "text_bias" in own:
        own["text_bias"] = own["text_bias"][representative]
    to_text, to_image = rank(images, texts[representative], image_index, **own)
    # one caption for each image and different caption of its own, sorted by caption
    owned = np.unique(np.stack([label, image_index]), axis=1, return_index=True)[1]
    return _to_all_copies(to_text, label, owned), _to_all_images(to_image, label, owned)


def _to_all_copies(ranks: Ranks, label: np.ndarray, owned: np.ndarray) -> Ranks:
    """Image-to-text ranks in which each copy of an image's own captions is a correct item; copies rank alike.

    Args:
        label: int64 (M,), the number of each caption's text. owned: a caption for each image and text of its own.
    """
    copies = np.bincount(label)[label[owned]]
    return Ranks(
        np.repeat(ranks.query[owned], copies),
        np.repeat(ranks.above[owned], copies),
        np.repeat(ranks.level[owned], copies),
        ranks.gallery,
        ranks.group,
    )


def _to_all_images(ranks: Ranks, label: np.ndarray, owned: np.ndarray) -> Ranks:
    """Text-to-image ranks in which each image with a caption of the query's text is a correct item.

    Args:
        label: int64 (M,), the number of each caption's text. owned: a caption for each text and image, sorted by text.
    """
    images = np.bincount(label[owned])  # of each text
    starts = np.cumsum(images) - images
    correct = images[label]  # of each query
    query = np.repeat(np.arange(len(label)), correct)
    number = np.arange(len(query)) - np.repeat(np.cumsum(correct) - correct, correct)
    pair = owned[starts[label[query]] + number]
    return Ranks(query, ranks.above[pair], ranks.level[pair], ranks.gallery, ranks.group)


def rank_folds(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray, folds: int, biases: Biases) -> RankPair:
    """Ranks in galleries of one fold each, consecutive images with their captions; the queries of all folds together.

    Args:
        images: (N, D). texts: (M, D). image_index: int64 (M,). biases: as ``rank`` takes them.

    Raises:
        MetricsError: a fold without captions.
    """
    if folds > len(images):
        raise MetricsError(f"{len(images):,} images do not make {folds} folds; take fewer folds")
    parts: list[RankPair] = []
    owners: list[np.ndarray] = []
    for fold in np.array_split(np.arange(len(images)), folds):
        captions = np.flatnonzero(np.isin(image_index, fold))
        if not len(captions):
            raise MetricsError(f"{len(images):,} images do not make {folds} folds with captions; take fewer folds")
        own: Biases = {}
        if "image_bias" in biases:
            own["image_bias"] = biases["image_bias"][fold]
        if "text_bias" in biases:
            own["text_bias"] = biases["text_bias"][captions]
        parts.append(rank(images[fold], texts[captions], image_index[captions] - fold[0], **own))
        owners.append(fold)
    to_text, to_image = zip(*parts, strict=True)
    return _joined(to_text, owners), _joined(to_image, owners)


def _joined(parts: Sequence[Ranks], folds: Sequence[np.ndarray]) -> Ranks:
    """The ranks of several folds as one; the gallery is the largest one's."""
    starts = np.cumsum([0, *(len(part.group) for part in parts)])
    return Ranks(
        np.concatenate([part.query + start for part, start in zip(parts, starts[:-1], strict=True)]),
        np.concatenate([part.above for part in parts]),
        np.concatenate([part.level for part in parts]),
        max(part.gallery for part in parts),
        np.concatenate([fold[part.group] for part, fold in zip(parts, folds, strict=True)]),
    )
