"""Evaluates a run, or a store alone, beside its baselines on one split; the result is plain values."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.memory import OVERHEAD, default_memory
from onceover.base.progress import ProgressBar
from onceover.extract.store import FeatureStore, Roles, StoreError, row_blocks
from onceover.retrieval import baselines, closed_form
from onceover.retrieval.baselines import Pairs
from onceover.retrieval.embeddings import Embeddings, EmbeddingsError, SplitVectors, model_name
from onceover.retrieval.hubness import RERANKS, biases_of_split, hub_skewness
from onceover.retrieval.metrics import report
from onceover.retrieval.ranks import Biases, chance, rank

COPIES = 4  # of features, float64, that the learned baselines hold at a time
_MIN_TRAIN = 1000  # images that the learned baselines are fitted on in however little memory
_LEARNED = {
    "cca": closed_form.cca,
    "ridge": closed_form.ridge,
    "text_knn": lambda train: baselines.neighbours(train, "text_knn"),
    "image_knn": lambda train: baselines.neighbours(train, "image_knn"),
}


class EvaluationError(OnceoverError):
    """A store and a run, or several runs, that do not belong together."""


def evaluate(
    embeddings: Embeddings | None,
    store: FeatureStore,
    split: str | None = None,
    *,
    rerank: Iterable[str] = (),
    shuffled: Embeddings | None = None,
    memory: int | None = None,
    seed: int = 0,
) -> dict:
    """Measures a run and every baseline on a split (default: the reported one).

    Args:
        embeddings: a run's; None: the baselines alone.
        rerank: corrections for hubs (``retrieval.hubness.RERANKS``) that get a row each; the run's own always does.
        shuffled: the embeddings of the sanity check, heads fitted to shuffled pairs.
        memory: limit in bytes, by default half of the machine's memory. Metrics are always of the whole split; the
            learned baselines are fitted on as many train images as fit.

    Raises:
        EvaluationError: the store's features are not those the run was fitted on, or an unknown correction.
        EmbeddingsError: no such split.
    """
    for run in (embeddings, shuffled):
        if run is not None:
            check_store(run, store)
    roles = _roles(store)
    split = split or roles.report_name
    if split == "train" and embeddings is not None and roles.selection_name not in embeddings.splits:
        roles = roles.together()  # the run was fitted on the validation images as well
    images = _images_of(store, roles, split)
    measured = _read_pairs(store, images)
    fitting = _fitting_pairs(store, roles, len(images), memory or default_memory())
    models: dict[str, dict] = {}
    if embeddings is not None:
        models |= _evaluate_run(embeddings, split, rerank, seed)
    models |= _evaluate_baselines(measured, fitting, _is_dual_encoder(store), seed)
    if shuffled is not None:
        models["shuffled"] = _evaluate_model(shuffled.vectors_of(split), {}, seed)
    models["chance"] = report([chance(len(measured.images), measured.image_index)], draws=0)
    return {
        "split": split,
        "space": embeddings.space if embeddings else None,
        "n_images": len(measured.images),
        "n_captions": len(measured.texts),
        "selected_on": roles.selection_name,
        "baselines_fitted_on": {"pictures": len(fitting.train.images) if fitting else 0, "of": len(roles.train)},
        "models": models,
    }


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


def _roles(store: FeatureStore) -> Roles:
    """The store's roles; a dual encoder's store without train or validation images is reported on all the same."""
    try:
        return store.roles()
    except StoreError:
        if not _is_dual_encoder(store):
            raise
        splits = np.array(store.image_splits)
        for split in ("test", "dev"):
            images = np.flatnonzero(splits == split)
            if len(images):
                nothing = np.empty(0, int)
                return Roles(nothing, nothing, images, "", split)
        raise


def _is_dual_encoder(store: FeatureStore) -> bool:
    """Whether both kinds of features are projections of one model into its own shared space."""
    image = store.recipes["image"]
    text = store.recipes["text"]
    return image["weights"] == text["weights"] and image["pooling"] == text["pooling"] == "projection"


def _images_of(store: FeatureStore, roles: Roles, split: str) -> np.ndarray:
    """Rows of a split's images.

    Raises:
        EmbeddingsError: there are none with captions.
    """
    rows_of = {"train": roles.train, roles.selection_name: roles.selection, roles.report_name: roles.report}
    images = rows_of.get(split, np.flatnonzero(np.array(store.image_splits) == split))
    if not np.isin(store.image_index, images).any():
        raise EmbeddingsError(f"there are no images with captions in the split {split!r}; use {', '.join(rows_of)}")
    return images


def _read_pairs(store: FeatureStore, images: np.ndarray) -> Pairs:
    """The plain features of images, each the mean over its views, and of their captions."""
    captions = np.flatnonzero(np.isin(store.image_index, images))
    features = np.empty((len(images), store.image_features.shape[2]), np.float32)
    for rows in row_blocks(len(images)):
        features[rows] = store.image_features[images[rows]].mean(1, dtype=np.float32)
    index = np.searchsorted(images, store.image_index[captions])
    return Pairs(features, store.text_features[captions].astype(np.float32), index)


class _FittingPairs(NamedTuple):
    """The pairs that the learned baselines are fitted on, and those that choose their settings."""

    train: Pairs
    validation: Pairs


def _fitting_pairs(store: FeatureStore, roles: Roles, measured: int, memory: int) -> _FittingPairs | None:
    """The pairs for the learned baselines, a sample where memory is short; None where there is nothing to fit on.

    Args:
        measured: how many images the measured split has.
    """
    if not len(roles.train):
        return None
    train = _images_of(store, roles, "train")
    validation = _images_of(store, roles, roles.selection_name)
    most = _most_images(store, max(measured, len(validation)), memory)
    if len(train) > most:
        train = np.sort(np.random.default_rng(0).permutation(train)[:most])
    return _FittingPairs(_read_pairs(store, train), _read_pairs(store, validation))


def _most_images(store: FeatureStore, measured: int, memory: int) -> int:
    """How many images with their captions the learned baselines can be fitted on in ``memory`` bytes.

    Beside them, a measured split of so many images has its captions in the wider of the two spaces.
    """
    image_dim, text_dim = store.dims
    captions = len(store.image_index)
    mapped = measured * max(image_dim, text_dim) * captions / len(store.image_splits)
    per_image = image_dim + text_dim * captions / len(store.image_splits)
    return max(_MIN_TRAIN, int(((memory - OVERHEAD) / (8 * COPIES) - mapped) / per_image))


def _evaluate_run(embeddings: Embeddings, split: str, rerank: Iterable[str], seed: int) -> dict[str, dict]:
    """A report of a run without a correction for hubs, with its own, and with each that is asked for."""
    models = {}
    vectors = embeddings.vectors_of(split)
    for method in dict.fromkeys(["none", embeddings.rerank, *rerank]):
        if method not in RERANKS:
            raise EvaluationError(f"unknown correction {method!r}; use {', '.join(RERANKS)}")
        models[model_name(method)] = _evaluate_model(vectors, biases_of_split(embeddings, split, method), seed)
    return models


def _evaluate_model(vectors: SplitVectors, biases: Biases, seed: int) -> dict:
    """A model's report, with the skewness of its hubs."""
    images, texts, _ = vectors
    result = report([rank(*vectors, **biases)], seed=seed)
    result["image_to_text"]["hub_skewness"] = hub_skewness(texts, images, biases.get("text_bias"))
    result["text_to_image"]["hub_skewness"] = hub_skewness(images, texts, biases.get("image_bias"))
    return result


def _evaluate_baselines(measured: Pairs, fitting: _FittingPairs | None, is_dual: bool, seed: int) -> dict[str, dict]:
    """A report of each baseline.

    Args:
        fitting: None where nothing can be fitted. is_dual: whether the encoder gets a row of its own.
    """
    models: dict[str, dict] = {}
    with ProgressBar("baselines", "models") as bar:
        if is_dual:
            vectors = SplitVectors(*baselines.zero_shot(measured), measured.image_index)
            models["zero_shot"] = _evaluate_model(vectors, {}, seed)
        if fitting:
            models |= _evaluate_learned(measured, fitting, seed, bar.update)
        common: dict[str, Any] = {"image_index": measured.image_index, "seed": seed, "step": bar.update}
        maps = baselines.unlearned(measured.images, measured.texts, images_are_space=True, **common)
        models["image_only"] = report(maps, seed=seed)
        maps = baselines.unlearned(measured.texts, measured.images, images_are_space=False, **common)
        models["text_only"] = report(maps, seed=seed)
    return models


def _evaluate_learned(
    measured: Pairs, fitting: _FittingPairs, seed: int, step: Callable[[], object]
) -> dict[str, dict]:
    """A report of each fitted baseline, with the settings that were chosen."""
    models = {}
    train, validation, measured = baselines.standardised(*fitting, measured)
    for name, candidates in _LEARNED.items():
        settings, embed = baselines.choose(candidates(train), validation, step)
        vectors = SplitVectors(*embed(measured), measured.image_index)
        models[name] = _evaluate_model(vectors, {}, seed) | {"settings": settings}
    return models
