"""Queries with what they found, as the pages show them: the best and the worst of each direction."""

from typing import NamedTuple

import numpy as np

from onceover.analysis.pages.tables import minus
from onceover.analysis.report.searched import SearchedSplit
from onceover.retrieval.ranks import Ranks

HITS = 5  # shown of each query


class ShownImage(NamedTuple):
    """An image with its thumbnail (None: there is none), a label such as ``1. 0.523``, and a caption (or "")."""

    name: str
    thumbnail: bytes | None
    label: str = ""
    is_truth: bool = False
    caption: str = ""


class ShownCaption(NamedTuple):
    """A caption with its score."""

    text: str
    score: float
    is_truth: bool = False


class CaptionQuery(NamedTuple):
    """A caption that searched for its image: the right image (labelled), and the first hits."""

    caption: str
    rank: float
    gallery: int
    truth: ShownImage
    hits: list[ShownImage]


class ImageQuery(NamedTuple):
    """An image that searched for its captions: the first hits, and its own captions."""

    image: ShownImage
    rank: float
    gallery: int
    hits: list[ShownCaption]
    own: list[ShownCaption]


def worst(ranks: Ranks, count: int) -> np.ndarray:
    """The queries with the highest ranks, the worst first; one for each image."""
    return _one_for_each_image(np.argsort(-ranks.expected_rank(), kind="stable"), ranks, count)


def best(ranks: Ranks, leads: np.ndarray, count: int) -> np.ndarray:
    """The queries that find a correct item first and by the widest lead, the widest first; one for each image.

    Args:
        leads: of each query, its correct item's score less that of the best wrong item.
    """
    first = np.flatnonzero(ranks.expected_rank() == 1)
    return _one_for_each_image(first[np.argsort(-leads[first], kind="stable")], ranks, count)


def _one_for_each_image(queries: np.ndarray, ranks: Ranks, count: int) -> np.ndarray:
    """The first queries in an order, of each image only the first."""
    _, first = np.unique(ranks.group[queries], return_index=True)
    return queries[np.sort(first)[:count]]


def worst_captions(searched: SearchedSplit, count: int) -> list[CaptionQuery]:
    """The captions that find their image last."""
    return [_caption_query(searched, query) for query in worst(searched.to_image, count).tolist()]


def best_captions(searched: SearchedSplit, count: int) -> list[CaptionQuery]:
    """The captions that find their image first, by the widest lead."""
    chosen = best(searched.to_image, searched.caption_leads, count)
    return [_caption_query(searched, query) for query in chosen.tolist()]


def worst_images(searched: SearchedSplit, count: int) -> list[ImageQuery]:
    """The images that find their captions last."""
    return [_image_query(searched, query) for query in worst(searched.to_text, count).tolist()]


def best_images(searched: SearchedSplit, count: int) -> list[ImageQuery]:
    """The images that find one of their captions first, by the widest lead."""
    chosen = best(searched.to_text, searched.image_leads[searched.to_text.group], count)
    return [_image_query(searched, query) for query in chosen.tolist()]


def _caption_query(searched: SearchedSplit, query: int) -> CaptionQuery:
    scores = searched.image_scores(query)
    truth = int(searched.image_index[query])
    hits = []
    for number, row in enumerate(_first(scores).tolist(), 1):
        hits.append(shown_image(searched, row, minus(f"{number}. {scores[row]:.3f}"), row == truth))
    return CaptionQuery(
        caption=searched.caption(query),
        rank=float(searched.to_image.expected_rank()[query]),
        gallery=len(searched.images),
        truth=shown_image(searched, truth, minus(f"the right one, {scores[truth]:.3f}"), True),
        hits=hits,
    )


def _image_query(searched: SearchedSplit, query: int) -> ImageQuery:
    image = int(searched.to_text.group[query])
    scores = searched.caption_scores(image)
    own = searched.captions_of(image)
    hits = []
    for row in _first(scores).tolist():
        hits.append(ShownCaption(searched.caption(row), float(scores[row]), row in own))
    ranked = own[np.argsort(-scores[own], kind="stable")].tolist()
    return ImageQuery(
        image=shown_image(searched, image),
        rank=float(searched.to_text.expected_rank()[query]),
        gallery=len(searched.texts),
        hits=hits,
        own=[ShownCaption(searched.caption(row), float(scores[row])) for row in ranked],
    )


def shown_image(searched: SearchedSplit, image: int, label: str = "", is_truth: bool = False) -> ShownImage:
    """An image of the split, by its row there."""
    own = searched.captions_of(image)
    caption = searched.caption(int(own[0])) if len(own) else ""
    return ShownImage(searched.image_id(image), searched.thumbnail(image), label, is_truth, caption)


def _first(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:HITS]
