"""Compares runs query by query on the same split."""

from collections.abc import Sequence
from typing import NamedTuple

from onceover.retrieval.embeddings import Embeddings
from onceover.retrieval.evaluation import EvaluationError
from onceover.retrieval.hubness import biases_of_split
from onceover.retrieval.metrics import RankPair, compare, report
from onceover.retrieval.ranks import rank


class _RankedSplit(NamedTuple):
    """The identity of a split's images and captions, and a run's ranks on it."""

    identity: tuple
    ranks: RankPair


def compare_runs(runs: dict[str, Embeddings], split: str | None = None, rerank: str | None = None) -> dict:
    """Compares the first run with each other one on a split (default: the one the first reports on).

    Args:
        runs: their embeddings, by name. rerank: a correction for hubs for all; by default each run's own.

    Raises:
        EvaluationError: fewer than two runs, or runs whose split holds other images or captions.
    """
    if len(runs) < 2:
        raise EvaluationError("there is nothing to compare; name at least two runs")
    first, *others = runs
    split = split or runs[first].report_split
    ranked = {name: _ranked(run, split, rerank or run.rerank) for name, run in runs.items()}
    for name in others:
        if ranked[name].identity != ranked[first].identity:
            raise EvaluationError(
                f"{split} is not the same in {first} and {name} (other images, captions or order); "
                "only runs on the same split of the same dataset can be compared"
            )
    images, captions, _ = runs[first].split(split)
    return {
        "split": split,
        "n_images": len(images),
        "n_captions": len(captions),
        "selected_on": {name: run.validation_split for name, run in runs.items()},
        "rerank": {name: rerank or run.rerank for name, run in runs.items()},
        "reference": first,
        "runs": {name: report([own.ranks], draws=0) for name, own in ranked.items()},
        "differences": {name: compare([ranked[first].ranks], [ranked[name].ranks]) for name in others},
    }


def _ranked(embeddings: Embeddings, split: str, rerank: str) -> _RankedSplit:
    images, captions, image_index = embeddings.split(split)
    identity = (
        [embeddings.sha256[row] for row in images],
        [embeddings.captions[row] for row in captions],
        image_index.tolist(),
    )
    ranks = rank(*embeddings.vectors_of(split), **biases_of_split(embeddings, split, rerank))
    return _RankedSplit(identity, ranks)


def verdict(interval: Sequence[float]) -> str:
    """The conclusion that a 95 % interval of a difference allows, where more is better."""
    low, high = interval
    if low <= 0 <= high:
        return "not distinguishable"
    return "better" if low > 0 else "worse"
