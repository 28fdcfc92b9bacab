"""Evaluates a run, or a store alone, beside its baselines on one split; the result is plain values."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.memory import default_memory
from onceover.base.progress import ProgressBar
from onceover.extract.store import FeatureStore, Roles
from onceover.retrieval.baseline_cache import BaselineCache
from onceover.retrieval.baseline_ranks import Baseline, baseline_dimensions, measure_baselines, step_count
from onceover.retrieval.embeddings import Embeddings, SplitVectors, model_name
from onceover.retrieval.hubness import RERANKS, biases_of_split, hub_skewness
from onceover.retrieval.metrics import DIRECTIONS, RECALL_AT, report
from onceover.retrieval.ranks import Biases, chance, rank
from onceover.retrieval.regrouping import rank_equal_captions, rank_folds
from onceover.retrieval.store_pairs import FittingRows, captions_of, fitting_rows, images_of, roles_of

_RUN_ROW = re.compile(r"multimodal\w*|shuffled", re.ASCII)  # the names of those rows that depend on the run
_FEWEST_FOLDS = 2


class EvaluationError(OnceoverError):
    """A store and a run, or several runs, that do not belong together."""


def evaluate(
    embeddings: Embeddings | None,
    store: FeatureStore,
    split: str | None = None,
    *,
    rerank: Iterable[str] = (),
    equal_captions: bool = False,
    folds: int | None = None,
    shuffled: Embeddings | None = None,
    fitted_images: int | None = None,
    memory: int | None = None,
    seed: int = 0,
    fresh: bool = False,
) -> dict:
    """Measures a run and every baseline on a split (default: the reported one).

    Args:
        embeddings: a run's; None: the baselines alone.
        rerank: corrections for hubs (``retrieval.hubness.RERANKS``) that get a row each; the run's own always does.
        equal_captions: add a row in which equal captions of other images are correct as well.
        folds: add a row of searches in so many smaller galleries, as COCO's five folds of 1,000 images.
        shuffled: the embeddings of the sanity check, heads fitted to shuffled pairs.
        fitted_images: how many images the run was fitted on, as run.json has it. Where these are more than the train
            images, as they are by default, the baselines are fitted on the validation images as well, unless it is
            these that are measured.
        memory: limit in bytes, by default half of the machine's memory. Metrics are always of the whole split; the
            fitted baselines are fitted on as many images as fit.
        fresh: measure the baselines again where they are stored beside the store.

    Raises:
        EvaluationError: the store's features are not those the run was fitted on, an unknown correction, or a row of a
            run where there is none.
        EmbeddingsError: no such split. MetricsError: more folds than images.
    """
    methods = list(rerank)
    if embeddings is None and (methods or equal_captions or folds or shuffled):
        raise EvaluationError("there is no run whose rows could be added; name one")
    for run in (embeddings, shuffled):
        if run is not None:
            check_store(run, store)
    roles = roles_of(store)
    split = split or roles.report_name
    if embeddings is not None:
        embeddings.split(split)  # refuses a split that the run does not have
    images = images_of(store, _measured_roles(roles, split, embeddings), split)
    fitted_images = fitted_images or len(roles.together().train)
    refit = fitted_images > len(roles.train) and split not in ("train", roles.selection_name)
    rows = fitting_rows(store, roles, len(images), memory or default_memory(), refit)
    models: dict[str, dict] = {}
    if embeddings is not None:
        own = _evaluate_run(embeddings, split, methods, equal_captions, folds, seed)
        models |= {name: row | {"fitted_images": fitted_images} for name, row in own.items()}
    for name, baseline in _baselines(store, images, rows, seed, fresh).items():
        dimensions = baseline_dimensions(name, baseline.settings, store.dims)
        models[name] = _baseline_row(baseline, seed) | {"dimensions": dimensions}
    if shuffled is not None:
        row = _evaluate_model(shuffled.vectors_of(split), {}, seed)
        models["shuffled"] = row | {"fitted_images": len(roles.train)}
    captions, image_index = captions_of(store, images)
    models["chance"] = report([chance(len(images), image_index)], draws=0)
    return {
        "split": split,
        "space": embeddings.space if embeddings else None,
        "fingerprints": store.fingerprints,
        "n_images": len(images),
        "n_captions": len(captions),
        "n_different_captions": len({store.captions[row] for row in captions}),
        "selected_on": roles.selection_name,
        "baselines_fitted_on": {"images": len(rows.fitted) if rows else 0, "of": rows.available if rows else 0},
        "models": models,
    }


def _measured_roles(roles: Roles, split: str, embeddings: Embeddings | None) -> Roles:
    """The roles by which a split's images are looked up.

    Embeddings without the validation split's name have its images among the train ones.
    """
    if split == "train" and embeddings is not None and roles.selection_name not in embeddings.splits:
        return roles.together()
    return roles


def check_store(embeddings: Embeddings, store: FeatureStore) -> None:
    """Refuses a store whose features are not those the run was fitted on.

    Raises:
        EvaluationError: their fingerprints differ.
    """
    if embeddings.fingerprints != store.fingerprints:
        changed = ", ".join(
            kind for kind, value in store.fingerprints.items() if embeddings.fingerprints[kind] != value
        )
        raise EvaluationError(
            f"{store.path} is not the store that the run was fitted on ({changed} differ); fit again on it"
        )


def earlier_rows(result: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, dict]:
    """The rows of an earlier result that depend on the run and that a result lacks.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: a row that is none.
    """
    rows = {}
    for name, row in earlier.get("models", {}).items():
        if _RUN_ROW.fullmatch(name) and name not in result["models"]:
            _check_row(name, row)
            rows[name] = row
    return rows


def _check_row(name: str, row: dict) -> None:
    """Refuses what is no row as ``evaluate`` makes it.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: of the first thing that is wrong.
    """
    numbers = [row["rsum"], row.get("fitted_images", 0), row.get("dimensions", 0)]
    for direction in DIRECTIONS:
        for value in row[direction].values():
            numbers += value if isinstance(value, list) else [value]
        numbers += [row[direction][key] for key in ("queries", "gallery", "median_rank", "mean_rank", "mrr")]
        numbers += [row[direction][f"R@{k}"] for k in RECALL_AT]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"{name} has a number that is none")


def with_rows(result: dict, rows: Mapping[str, dict]) -> dict:
    """A result with rows of an earlier one, named in ``kept_rows``, in the order of ``evaluate``.

    That is: the run's, the baselines, ``shuffled`` and ``chance``.
    """
    models = result["models"] | rows
    names = sorted(models, key=_group_of)
    return result | {"models": {name: models[name] for name in names}, "kept_rows": list(rows)}


def _group_of(name: str) -> int:
    """The number of the group of rows that a row stands in."""
    if name.startswith("multimodal"):
        return 0
    return {"shuffled": 2, "chance": 3}.get(name, 1)


def is_of_the_same(result: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Whether two results are of the same embeddings on the same split; earlier versions did not name the features."""
    return all(earlier.get(key, result[key]) == result[key] for key in ("split", "space", "fingerprints"))


def _evaluate_run(
    embeddings: Embeddings, split: str, rerank: Iterable[str], equal_captions: bool, folds: int | None, seed: int
) -> dict[str, dict]:
    """A report of a run without a correction for hubs, with its own, and with each that is asked for.

    The other ways to count, equal captions and folds, are those of the run's own search.
    """
    if folds is not None and folds < _FEWEST_FOLDS:
        raise EvaluationError(f"{folds} folds are no smaller galleries; take {_FEWEST_FOLDS} or more")
    models = {}
    vectors = embeddings.vectors_of(split)
    for method in dict.fromkeys(["none", embeddings.rerank, *rerank]):
        if method not in RERANKS:
            raise EvaluationError(f"unknown correction {method!r}; use {', '.join(RERANKS)}")
        models[model_name(method)] = _evaluate_model(vectors, biases_of_split(embeddings, split, method), seed)
    for name, part in embeddings.parts_of(split).items():
        models[f"multimodal_{name}"] = _evaluate_model(part, {}, seed)
    own = model_name(embeddings.rerank)
    biases = embeddings.biases(embeddings.rerank, split)
    if equal_captions:
        captions = [embeddings.captions[row] for row in embeddings.split(split)[1]]
        models[f"{own}_equal_captions"] = report([rank_equal_captions(*vectors, captions, biases)], seed=seed)
    if folds:
        models[f"{own}_{folds}_folds"] = report([rank_folds(*vectors, folds, biases)], seed=seed)
    return {name: {"dimensions": vectors.images.shape[1]} | row for name, row in models.items()}


def _evaluate_model(vectors: SplitVectors, biases: Biases, seed: int) -> dict:
    """A model's report, with the skewness of its hubs and the dimensions of what is searched."""
    images, texts, _ = vectors
    result = report([rank(*vectors, **biases)], seed=seed) | {"dimensions": images.shape[1]}
    result["image_to_text"]["hub_skewness"] = hub_skewness(texts, images, biases.get("text_bias"))
    result["text_to_image"]["hub_skewness"] = hub_skewness(images, texts, biases.get("image_bias"))
    return result


def _baselines(
    store: FeatureStore, images: np.ndarray, rows: FittingRows | None, seed: int, fresh: bool
) -> dict[str, Baseline]:
    """The baselines on some images: as they are stored beside the store, or else measured, and then stored."""
    cache = BaselineCache(store, images, rows, seed)
    stored = None if fresh else cache.load()
    if stored is not None:
        return stored
    with ProgressBar("baselines", "candidates", total=step_count(rows)) as bar:
        measured = measure_baselines(store, images, rows, seed, bar.update)
    cache.save(measured)
    return measured


def _baseline_row(baseline: Baseline, seed: int) -> dict:
    """The report of a baseline's ranks, with its settings and the number of images that it was fitted on."""
    row = report(baseline.ranks, seed=seed)
    for direction in DIRECTIONS:
        if direction in baseline.hubs:
            row[direction]["hub_skewness"] = baseline.hubs[direction]
    if baseline.fitted_images is not None:
        row |= {"settings": baseline.settings, "fitted_images": baseline.fitted_images}
    return row
