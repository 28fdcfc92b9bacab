"""Compares runs query by query on the same split."""

from collections.abc import Mapping, Sequence

from onceover.retrieval.embeddings import Embeddings, EmbeddingsError
from onceover.retrieval.evaluation import EvaluationError
from onceover.retrieval.hubness import biases_of_split
from onceover.retrieval.metrics import RankPair, compare, report
from onceover.retrieval.ranks import rank


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
    check_same_split(runs, split)
    ranked = {name: _ranked(run, split, rerank or run.rerank) for name, run in runs.items()}
    images, captions, _ = runs[first].split(split)
    return {
        "split": split,
        "n_images": len(images),
        "n_captions": len(captions),
        "selected_on": {name: run.validation_split for name, run in runs.items()},
        "rerank": {name: rerank or run.rerank for name, run in runs.items()},
        "dimensions": {name: run.images.shape[1] for name, run in runs.items()},
        "reference": first,
        "runs": {name: report([own], draws=0) for name, own in ranked.items()},
        "differences": {name: compare([ranked[first]], [ranked[name]]) for name in others},
    }


def check_same_split(runs: Mapping[str, Embeddings], split: str) -> None:
    """Refuses runs of which one has other images or captions in a split than the first, by its name.

    Raises:
        EvaluationError: there is such a run.
    """
    identities = {name: _identity(name, embeddings, split) for name, embeddings in runs.items()}
    first, *others = identities
    for name in others:
        if identities[name] != identities[first]:
            raise EvaluationError(
                f"{split} is not the same in {first} and {name} (other images, captions or order); "
                "only runs on the same split of the same dataset can be compared"
            )


def _identity(name: str, embeddings: Embeddings, split: str) -> tuple:
    """What tells a split from others: the content of its images, its captions, and which belong together."""
    try:
        images, captions, image_index = embeddings.split(split)
    except EmbeddingsError as error:
        raise EvaluationError(f"{name}: {error}") from error
    return (
        [embeddings.sha256[row] for row in images],
        [embeddings.captions[row] for row in captions],
        image_index.tolist(),
    )


def _ranked(embeddings: Embeddings, split: str, rerank: str) -> RankPair:
    """A run's ranks on a split."""
    return rank(*embeddings.vectors_of(split), **biases_of_split(embeddings, split, rerank))


def verdict(interval: Sequence[float]) -> str:
    """The conclusion that a 95 % interval of a difference allows, where more is better."""
    low, high = interval
    if low <= 0 <= high:
        return "not distinguishable"
    return "better" if low > 0 else "worse"
