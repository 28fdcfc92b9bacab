"""Corrections for hubs, items that come up for every query: a bias for each item of a gallery.

Both corrections add to an item's inner products a number that does not depend on the query, so that a corrected
gallery is searched like any other: with the bias as one more coordinate, and a 1 for it in the query.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onceover.base.progress import say
from onceover.extract.store import row_blocks
from onceover.retrieval.embeddings import Embeddings
from onceover.retrieval.exact import exact_search
from onceover.retrieval.gallery import facing_bias
from onceover.retrieval.metrics import clearly_best, is_mostly_noise
from onceover.retrieval.ranks import Biases, rank

RERANKS = ("none", "qbnorm", "csls")
NO_CORRECTION = 0.0  # in the place of a beta: the biases are 0
SCALED_BETA = 2.0  # a beta times the deviation of an item's scores; measured (docs/notes/few-images.md)
BANK = 10_000  # training queries at most
MIN_BANK = 200  # with fewer queries nothing is corrected, since that takes more than it gives; measured (the same)
NEIGHBOURS = 10
_BLOCK_BYTES = 8 * 2**20  # of scores that stay in a processor's caches
_EQUAL = 1e-4  # a standard deviation of scores below which they differ by rounding alone


@dataclass(frozen=True)
class InvertedSoftmax:
    """The correction of two galleries, each with its bank of training queries; all by ``image`` and ``text``.

    Attributes:
        betas: the inverse temperatures, as ``fit_inverted_softmax`` takes them again.
        images: the image of each item, int64 (N,), and of each query of the bank, (B,).
    """

    galleries: dict[str, np.ndarray]
    banks: dict[str, np.ndarray]
    betas: dict[str, float]
    images: dict[str, tuple[np.ndarray, np.ndarray]]

    def bias(self, kind: str) -> np.ndarray:
        """The biases of the images, float32 (N,), or of the captions, (M,)."""
        return inverted_softmax_bias(self.galleries[kind], self.banks[kind], self.betas[kind], self.images[kind])


def correction_text(rerank: str, betas: dict[str, float]) -> str:
    """A run's own correction for hubs, for people: ``none``, or ``qbnorm (images 15, captions none)``."""
    return f"{rerank} ({betas_text(betas)})" if rerank == "qbnorm" else rerank


def betas_text(betas: dict[str, float]) -> str:
    """The sharpness of a correction, for a message: ``images 15, captions none``."""
    parts = []
    for kind, noun in (("image", "images"), ("text", "captions")):
        parts.append(f"{noun} {betas[kind]:g}" if betas[kind] != NO_CORRECTION else f"{noun} none")
    return ", ".join(parts)


def inverted_softmax_bias(
    gallery: np.ndarray, bank: np.ndarray, beta: float, images: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """``-log(mean over the bank of exp(beta * score)) / beta`` for each item, float32 (N,).

    An item that is near everything in the bank is moved away from every query (the inverted softmax of Smith et al.
    2017; with a bank of training queries, as in QB-Norm, Bogolin et al. 2022). Later queries play no part.

    An item's own queries do not count: heads were fitted to bring them near, which does not make it a hub.

    Args:
        gallery: float32 (N, D). bank: queries of the other modality, float32 (B, D).
        beta: ``NO_CORRECTION`` gives zeros.
        images: of each item, int64 (N,), and of each query, (B,), where some of them are of the same image.
    """
    biases = np.zeros(len(gallery), np.float32)
    if beta == NO_CORRECTION:
        return biases
    for rows in _blocks(gallery, bank):
        scores = gallery[rows] @ bank.T
        others = np.full(len(scores), len(bank), np.float32)
        if images is not None:
            is_own = images[0][rows, None] == images[1]
            is_own[is_own.all(1)] = False  # there are no other queries
            scores[is_own] = -np.inf
            others -= is_own.sum(1)
        top = scores.max(1)
        scores -= top[:, None]
        scores *= np.float32(beta)
        biases[rows] = -top - np.log(np.exp(scores, out=scores).sum(1) / others) / beta
    return biases


def _blocks(gallery: np.ndarray, bank: np.ndarray) -> Iterator[slice]:
    """Slices of a gallery's rows whose scores with the bank are ``_BLOCK_BYTES`` or less."""
    return row_blocks(len(gallery), max(1, _BLOCK_BYTES // (4 * len(bank))))


def bank_rows(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """At most ``BANK`` of the training queries ``rows``, drawn with a seed, in ascending order."""
    if len(rows) <= BANK:
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:BANK])


def bias_by_bank(embeddings: Embeddings, kind: str, vectors: np.ndarray) -> np.ndarray:
    """Biases, float32 (N,), of new images' (``kind`` image) or captions' vectors, from a run's training queries."""
    train = np.flatnonzero(np.array(embeddings.splits) == "train")
    if kind == "image":
        bank = embeddings.texts[bank_rows(np.flatnonzero(np.isin(embeddings.image_index, train)))]
    else:
        bank = embeddings.images[bank_rows(train)]
    return inverted_softmax_bias(vectors, bank, embeddings.betas[kind])


def biases_of_split(embeddings: Embeddings, split: str, rerank: str) -> Biases:
    """``image_bias`` and ``text_bias`` of a split's items by one of ``RERANKS``; nothing without a correction."""
    if rerank != "csls":
        return embeddings.biases(rerank, split)
    images, texts, _ = embeddings.vectors_of(split)
    return {"image_bias": csls_bias(images, texts), "text_bias": csls_bias(texts, images)}


def fit_inverted_softmax(
    images: np.ndarray,
    texts: np.ndarray,
    image_index: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    betas: Mapping[str, float | None] | None = None,
) -> InvertedSoftmax:
    """Fits the correction: a bank of train queries for images and for captions, and each one's beta.

    Args:
        images: unit vectors, float32 (N, D). texts: float32 (M, D). image_index: int64 (M,).
        train, validation: rows of images; their captions belong to them. The validation ones decide whether to correct.
        betas: by ``image`` and ``text``, where that was decided before; None: as the spread of the scores asks for.
    """
    bank_captions = bank_rows(np.flatnonzero(np.isin(image_index, train)))
    bank_images = bank_rows(train)
    banks = {"image": texts[bank_captions], "text": images[bank_images]}
    images_of = {"image": (np.arange(len(images)), image_index[bank_captions]), "text": (image_index, bank_images)}
    chosen = {kind: beta for kind, beta in (betas or {}).items() if beta is not None}
    if len(chosen) < len(banks):
        captions = np.flatnonzero(np.isin(image_index, validation))
        galleries = {"image": images[validation], "text": texts[captions]}
        if betas is None:
            chosen = _chosen_betas(galleries, banks, np.searchsorted(validation, image_index[captions]))
        for kind in banks.keys() - chosen.keys():
            chosen[kind] = beta_of_spread(galleries[kind], banks[kind])
    return InvertedSoftmax({"image": images, "text": texts}, banks, chosen, images_of)


def inherited_betas(*several: Mapping[str, float]) -> dict[str, float | None]:
    """The betas, for ``fit_inverted_softmax``, of heads that are made of others with these betas.

    Nothing is corrected where one of them corrects nothing; else the spread of the new scores is asked.
    """
    inherited: dict[str, float | None] = {}
    for kind in ("image", "text"):
        inherited[kind] = NO_CORRECTION if NO_CORRECTION in [betas[kind] for betas in several] else None
    return inherited


def beta_of_spread(gallery: np.ndarray, bank: np.ndarray) -> float:
    """``SCALED_BETA`` divided by the standard deviation of an item's scores over the bank, to a tenth.

    Vectors whose scores lie close together need a sharper correction. Where all are equal, or the bank is small, there
    is none.

    Args:
        gallery: float32 (N, D). bank: float32 (B, D).
    """
    if len(bank) < MIN_BANK:
        return NO_CORRECTION
    variances = 0.0
    for rows in _blocks(gallery, bank):
        variances += float((gallery[rows] @ bank.T).var(axis=1, dtype=np.float64).sum())
    deviation = math.sqrt(variances / len(gallery))
    return round(SCALED_BETA / deviation, 1) if deviation > _EQUAL else NO_CORRECTION


def _chosen_betas(
    galleries: dict[str, np.ndarray], banks: dict[str, np.ndarray], image_index: np.ndarray
) -> dict[str, float]:
    """By the kind of gallery the beta of the spread of its scores, or ``NO_CORRECTION``.

    Nothing is corrected where next to nothing was learned, or where the validation pairs are ranked clearly better
    without.

    Args:
        galleries: the validation images and their captions, which are mapped to them by ``image_index``.
    """
    vectors = (galleries["image"], galleries["text"], image_index)
    without = rank(*vectors)
    chosen = dict.fromkeys(galleries, NO_CORRECTION)
    if is_mostly_noise(without):
        say("nothing is corrected for hubs, since next to nothing was learned")
        return chosen
    for kind, gallery in galleries.items():
        beta = beta_of_spread(gallery, banks[kind])
        if beta == NO_CORRECTION:
            continue
        bias = inverted_softmax_bias(gallery, banks[kind], beta)
        biases: Biases = {"image_bias": bias} if kind == "image" else {"text_bias": bias}
        chosen[kind] = clearly_best({beta: rank(*vectors, **biases), NO_CORRECTION: without}, beta)
    return chosen


def csls_bias(gallery: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Minus half the mean score with the ``NEIGHBOURS`` nearest of ``queries``, float32 (N,).

    CSLS (Conneau et al. 2018) ranks by twice the score less the mean score of both items' neighbours; the query's own
    mean changes no ranking, which leaves this. It needs all queries at once: it is transductive.
    """
    scores, _ = exact_search(queries, gallery, NEIGHBOURS)
    return (-scores.mean(1) / 2).astype(np.float32)


def hub_skewness(gallery: np.ndarray, queries: np.ndarray, bias: np.ndarray | None = None) -> float:
    """Skewness of how often each item is among a query's first ``NEIGHBOURS`` (Radovanović et al. 2010); 0: no hubs."""
    return skewness(occurrences(gallery, queries, bias))


def occurrences(gallery: np.ndarray, queries: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """How often each item of a gallery is among a query's first ``NEIGHBOURS``, int64 (N,)."""
    if bias is not None:
        gallery = np.column_stack([gallery, bias])
        queries = facing_bias(queries)
    _, nearest = exact_search(gallery, queries, NEIGHBOURS)
    return np.bincount(nearest.ravel(), minlength=len(gallery))


def skewness(counts: np.ndarray) -> float:
    """The third standardised moment of counts; 0 where they do not differ."""
    spread = counts.std()
    if not spread:
        return 0.0
    return float(np.mean((counts - counts.mean()) ** 3) / spread**3)
