"""Hubs, items that come up for everything, and what is done about them: one bias for each item of a gallery.

Both corrections add to an item's inner products a number that does not depend on the query, so that a corrected
gallery is searched like any other: with the bias as one more coordinate, and a 1 in the query's place for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onceover.retrieval.embeddings import Embeddings
from onceover.retrieval.exact import exact_search
from onceover.retrieval.gallery import facing_bias
from onceover.retrieval.metrics import RECALL_AT, rank, report

RERANKS = ("none", "qbnorm", "csls")
BETAS = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0)
BANK = 10_000  # training queries at most
NEIGHBOURS = 10
_BLOCK_BYTES = 8 * 2**20  # what stays in a processor's caches


@dataclass(frozen=True)
class InvertedSoftmax:
    """The correction of two galleries, each with its bank of training queries; all by ``image`` and ``text``.

    Attributes:
        betas: the inverse temperatures, as ``fit_inverted_softmax`` takes them again.
    """

    galleries: dict[str, np.ndarray]
    banks: dict[str, np.ndarray]
    betas: dict[str, float]

    def bias(self, kind: str) -> np.ndarray:
        """The biases of the images, float32 (N,), or of the captions, (M,)."""
        return inverted_softmax_bias(self.galleries[kind], self.banks[kind], self.betas[kind])


def inverted_softmax_bias(gallery: np.ndarray, bank: np.ndarray, beta: float) -> np.ndarray:
    """``-log(mean over the bank of exp(beta * score)) / beta`` for each item, float32 (N,).

    An item that is near everything in the bank is moved away from every query (the inverted softmax of Smith et al.
    2017; with a bank of training queries, as in QB-Norm, Bogolin et al. 2022). What is searched later plays no part.

    Args:
        gallery: float32 (N, D). bank: queries of the other modality, float32 (B, D).
    """
    return _biases(gallery, bank, (beta,))[0]


def _biases(gallery: np.ndarray, bank: np.ndarray, betas: Sequence[float]) -> np.ndarray:
    """The bias of each item for several betas, which share the scores: float32 (len(betas), N)."""
    biases = np.empty((len(betas), len(gallery)), np.float32)
    rows = max(1, _BLOCK_BYTES // (4 * len(bank)))
    for start in range(0, len(gallery), rows):
        scores = gallery[start : start + rows] @ bank.T
        top = scores.max(1)
        scores -= top[:, None]
        for beta, bias in zip(betas, biases, strict=True):
            powers = scores * np.float32(beta)
            bias[start : start + rows] = -top - np.log(np.exp(powers, out=powers).mean(1)) / beta
    return biases


def bank_rows(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """At most ``BANK`` of the training queries ``rows``, drawn with a seed, in ascending order."""
    return rows if len(rows) <= BANK else np.sort(np.random.default_rng(seed).permutation(rows)[:BANK])


def bias_by_bank(embeddings: Embeddings, kind: str, vectors: np.ndarray) -> np.ndarray:
    """Biases, float32 (N,), of any images' (``kind`` image) or captions' vectors, from a run's training queries."""
    train = np.flatnonzero(np.array(embeddings.splits) == "train")
    if kind == "image":
        bank = embeddings.texts[bank_rows(np.flatnonzero(np.isin(embeddings.image_index, train)))]
    else:
        bank = embeddings.images[bank_rows(train)]
    return inverted_softmax_bias(vectors, bank, embeddings.betas[kind])


def fit_inverted_softmax(
    images: np.ndarray,
    texts: np.ndarray,
    image_index: np.ndarray,
    train: np.ndarray,
    selection: np.ndarray,
    betas: dict[str, float] | None = None,
) -> InvertedSoftmax:
    """A bank of train queries for every image and caption, and each direction's beta chosen on selection.

    Args:
        images: unit vectors, float32 (N, D). texts: float32 (M, D). image_index: int64 (M,).
        train, selection: rows of images; their captions belong to them.
        betas: by ``image`` and ``text``, where they were chosen before.
    """
    captions = bank_rows(np.flatnonzero(np.isin(image_index, train)))
    banks = {"image": texts[captions], "text": images[bank_rows(train)]}
    best = betas or _best_betas(images, texts, image_index, banks, selection)
    return InvertedSoftmax({"image": images, "text": texts}, banks, best)


def _best_betas(images, texts, image_index, banks: dict[str, np.ndarray], selection: np.ndarray) -> dict[str, float]:
    """The beta that ranks the selection pairs best, by the kind of gallery."""
    chosen = np.flatnonzero(np.isin(image_index, selection))
    split = images[selection], texts[chosen], np.searchsorted(selection, image_index[chosen])
    best = {}
    for kind, gallery, direction in (("image", split[0], "text_to_image"), ("text", split[1], "image_to_text")):
        sums = {}
        for beta, bias in zip(BETAS, _biases(gallery, banks[kind], BETAS), strict=True):
            side = report([rank(*split, **{f"{kind}_bias": bias})], draws=0)[direction]
            sums[beta] = sum(side[f"R@{k}"] for k in RECALL_AT)
        best[kind] = max(sums, key=sums.get)
    return best


def csls_bias(gallery: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Minus half the mean score with the ``NEIGHBOURS`` nearest of ``queries``, float32 (N,).

    CSLS (Conneau et al. 2018) ranks by twice the score less the mean score of either side's neighbours; the query's
    own mean changes no ranking, which leaves this. It needs all queries at once: it is transductive.
    """
    scores, _ = exact_search(queries, gallery, NEIGHBOURS)
    return (-scores.mean(1) / 2).astype(np.float32)


def hub_skewness(gallery: np.ndarray, queries: np.ndarray, bias: np.ndarray | None = None) -> float:
    """Skewness of how often each item is among a query's first ``NEIGHBOURS`` (Radovanović et al. 2010); 0: no hubs."""
    if bias is not None:
        gallery = np.column_stack([gallery, bias])
        queries = facing_bias(queries)
    _, found = exact_search(gallery, queries, NEIGHBOURS)
    counts = np.bincount(found.ravel(), minlength=len(gallery))
    spread = counts.std()
    return float(np.mean((counts - counts.mean()) ** 3) / spread**3) if spread else 0.0
