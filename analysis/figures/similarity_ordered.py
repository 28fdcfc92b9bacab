"""The similarity matrix of a whole split, ordered so that images with similar captions and looks lie side by side."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onceover.analysis.figures.similarity import SCALE_IMAGES, draw_scores
from onceover.analysis.sources import RunFiles

SOURCE = "run"
ORDER = 25
MAX_IMAGES = SCALE_IMAGES  # a pixel each; more would not be seen
GROUPS = 14
_LEAST_SHARE = 0.03  # of the images, for a group that gets a name
_LEAST_CAPTIONS = 3  # that hold a word, for it to name a group
_WORD = re.compile(r"[^\W\d_]{3,20}")


def drawings(source: RunFiles) -> dict[str, Callable[[], Figure]]:
    """The matrix."""
    return {"similarity-ordered": partial(draw_ordered_similarity, source)}


def draw_ordered_similarity(run: RunFiles) -> Figure:
    """Draws cosine similarities of images and captions; groups are named by the word that sets their captions apart."""
    pairs = run.sample_pairs(MAX_IMAGES)
    images = run.embeddings.images[pairs.images]
    texts = run.embeddings.texts[pairs.captions]
    order, groups = cluster_order(images + texts)
    scores = images[order] @ texts[order].T
    captions = [run.embeddings.captions[pairs.captions[row]] for row in order]
    figure = Figure(figsize=(6.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    draw_scores(axes, scores, run)
    are_named = _name_groups(axes, groups, captions)
    axes.set(
        xlabel="caption",
        ylabel="image (words: what sets a group's captions apart)" if are_named else "image",
        xticks=[],
        title=f"Similarity of images and captions\n{run.split}: {len(scores):,} of {pairs.total:,} images, one caption "
        "each, ordered by image and own caption together\neach image's own caption lies on the diagonal",
    )
    return figure


def cluster_order(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order in which similar rows are neighbours, int64 (N,), and the number of each place's group, ascending.

    That is average linkage by cosine, with the leaves in optimal order (Bar-Joseph et al. 2001).
    """
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage

    if len(vectors) < 2:
        return np.zeros(len(vectors), np.int64), np.zeros(len(vectors), np.int64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.where(lengths > 1e-6, vectors / np.maximum(lengths, 1e-6), 1.0)  # opposite pairs have no direction
    tree = linkage(unit, "average", metric="cosine", optimal_ordering=True)
    order = leaves_list(tree).astype(np.int64)
    names = fcluster(tree, GROUPS, "maxclust")[order]
    groups = np.concatenate([[0], np.cumsum(names[1:] != names[:-1])])
    return order, groups


def telling_words(captions: Sequence[str], groups: np.ndarray) -> dict[int, str]:
    """The word of each group that tells most of it, no word twice; groups that no word tells of are left out.

    That is the word w with the largest p log(p / q), p and q the shares of the group's captions and of all that hold w.
    Of a word that tells most of several groups, the one of which it tells most has it.
    """
    words = [set(_WORD.findall(caption.lower())) for caption in captions]
    overall = Counter(word for own in words for word in own)
    weighed = []
    for group in np.unique(groups).tolist():
        members = np.flatnonzero(groups == group).tolist()
        counts = Counter(word for row in members for word in words[row])
        for word, count in counts.items():
            weight = _weight(count / len(members), overall[word] / len(captions))
            if count >= _LEAST_CAPTIONS and weight >= 0:
                weighed.append((weight, word, group))
    named: dict[int, str] = {}
    for _, word, group in sorted(weighed, reverse=True):
        if group not in named and word not in named.values():
            named[group] = word
    return named


def _weight(share: float, overall: float) -> float:
    return share * float(np.log(share / overall))


def _name_groups(axes: Axes, groups: np.ndarray, captions: Sequence[str]) -> bool:
    """Draws lines between groups, and the words of large ones beside them; whether there are any words."""
    places = []
    labels = []
    words = telling_words(captions, groups)
    for group in np.unique(groups).tolist():
        members = np.flatnonzero(groups == group)
        if group and len(members) >= _LEAST_SHARE * len(groups):
            for line in (axes.axhline, axes.axvline):
                line(members[0] - 0.5, color="black", linewidth=0.3, alpha=0.5)
        if len(members) >= _LEAST_SHARE * len(groups) and group in words:
            places.append(float(members.mean()))
            labels.append(words[group])
    axes.set_yticks(places, labels)
    return bool(labels)
