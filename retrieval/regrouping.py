"""Other ways to count the same search: equal captions as equally correct, and smaller galleries, as papers report."""

from collections.abc import Sequence

import numpy as np

from onceover.retrieval.metrics import RankPair
from onceover.retrieval.ranks import Biases, MetricsError, Ranks, rank


def with_equal_captions(pair: RankPair, captions: Sequence[str]) -> RankPair:
    """Ranks in which all equal captions are correct for an image, and all their images for each of them.

    Equal captions have equal vectors, so that the ranks of one of them are those of all.

    Args:
        pair: ranks of the same captions, as ``rank`` gives them. captions: list of M.
    """
    to_text, to_image = pair
    label = np.unique(np.array(captions, dtype=object), return_inverse=True)[1]
    # a caption for each image and different caption of its own, sorted by caption
    owners = np.stack([label, to_image.group])
    first = np.unique(owners, axis=1, return_index=True)[1]
    copies = np.bincount(label)[label[first]]
    text_ranks = Ranks(
        np.repeat(to_text.query[first], copies),
        np.repeat(to_text.above[first], copies),
        np.repeat(to_text.level[first], copies),
        to_text.gallery,
        to_text.group,
    )
    images = np.bincount(label[first])  # of each different caption
    starts = np.cumsum(images) - images
    query = np.repeat(np.arange(len(label)), images[label])
    number = np.arange(len(query)) - np.repeat(np.cumsum(images[label]) - images[label], images[label])
    correct = first[starts[label[query]] + number]
    image_ranks = Ranks(query, to_image.above[correct], to_image.level[correct], to_image.gallery, to_image.group)
    return text_ranks, image_ranks


def rank_folds(
    images: np.ndarray, texts: np.ndarray, image_index: np.ndarray, folds: int, biases: Biases
) -> RankPair:
    """Ranks in galleries of one fold each, consecutive images with their captions; the queries of all folds together.

    Args:
        images: (N, D). texts: (M, D). image_index: int64 (M,). biases: as ``rank`` takes them.

    Raises:
        MetricsError: a fold without captions.
    """
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
    queries = np.cumsum([0, *(len(part.group) for part in parts)])
    return Ranks(
        np.concatenate([part.query + start for part, start in zip(parts, queries[:-1], strict=True)]),
        np.concatenate([part.above for part in parts]),
        np.concatenate([part.level for part in parts]),
        max(part.gallery for part in parts),
        np.concatenate([fold[part.group] for part, fold in zip(parts, folds, strict=True)]),
    )
