"""Measures all baselines of a store on a split, several at a time."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from onceover.base.progress import warn
from onceover.base.threads import worker_threads
from onceover.extract.store import FeatureStore
from onceover.retrieval import closed_form, neighbours
from onceover.retrieval.baselines import MAPS, Embed, Family, Pairs, choose, standardised, unlearned, zero_shot
from onceover.retrieval.closed_form import CCA, Moments, Ridge
from onceover.retrieval.exact import load_faiss
from onceover.retrieval.hubness import hub_skewness
from onceover.retrieval.metrics import RankPair
from onceover.retrieval.neighbours import Bridge
from onceover.retrieval.ranks import MetricsError, rank
from onceover.retrieval.store_pairs import FittingRows, has_own_space, read_pairs

Step = Callable[[], object]
#: makes each fitted baseline, by name
Families = dict[str, Callable[[], Family]]
UNLEARNED = ("image_only", "text_only")
FITTED = ("cca", "ridge", "text_knn", "image_knn")


@dataclass(frozen=True, eq=False)
class Baseline:
    """A baseline's ranks on a split.

    Attributes:
        ranks: one pair, or one for each random map.
        hubs: by direction, the skewness of the hubs; empty for random maps.
        settings: those that were chosen; empty where there are none.
        fitted_images: how many images it was fitted on; None where nothing is fitted.
    """

    ranks: list[RankPair]
    hubs: dict[str, float] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    fitted_images: int | None = None


def measure_baselines(
    store: FeatureStore, images: np.ndarray, rows: FittingRows | None, seed: int = 0, step: Step = lambda: None
) -> dict[str, Baseline]:
    """Measures the baselines on some images, by name.

    Args:
        images: rows of the measured images. rows: those to fit on; None: nothing is fitted.
        seed: of the random maps.
        step: called, from several threads, after each candidate, each map and each fit: ``step_count`` times at most.
    """
    load_faiss()  # whose threads can only be bounded once it is loaded
    measured = read_pairs(store, images)
    baselines: dict[str, Baseline] = {}
    stopping = threading.Event()

    def go_on() -> None:
        if stopping.is_set():
            raise CancelledError
        step()

    with worker_threads() as pool:
        try:
            if has_own_space(store):
                baselines["zero_shot"] = _measured(zero_shot, measured)
            maps = {name: pool.submit(_unlearned, measured, name, seed, go_on) for name in UNLEARNED}
            if rows is not None:
                baselines |= _fitted(store, rows, measured, pool, go_on)
            for name, future in maps.items():
                baselines[name] = Baseline(future.result())
        except BaseException:  # an interruption, too: the threads end with the candidate they are at
            stopping.set()
            raise
    return baselines


def baseline_dimensions(name: str, settings: dict, dims: tuple[int, int]) -> int:
    """How many dimensions the vectors have that a baseline compares. ``dims``: of the features of images and texts."""
    image_dim, text_dim = dims
    if name == "cca":
        return settings["dimensions"]
    if name in UNLEARNED:  # the wider space has as many of its columns taken
        return min(dims)
    in_text_space = name == "image_knn" or settings.get("onto") == "text"
    return text_dim if in_text_space else image_dim


def baseline_names(store: FeatureStore, rows: FittingRows | None) -> list[str]:
    """The baselines that ``measure_baselines`` gives, in their order, unless one of them cannot be fitted."""
    names = ["zero_shot"] if has_own_space(store) else []
    if rows is not None:
        names += FITTED
    return [*names, *UNLEARNED]


def step_count(rows: FittingRows | None) -> int:
    """How many candidates, maps and fits ``measure_baselines`` has at most."""
    count = len(UNLEARNED) * MAPS
    if rows is not None:
        count += closed_form.CANDIDATES + 2 * neighbours.CANDIDATES + len(FITTED)
    return count


def _unlearned(measured: Pairs, name: str, seed: int, step: Step) -> list[RankPair]:
    """The ranks of ``image_only`` or ``text_only``, for each random map."""
    images_are_space = name == "image_only"
    space = measured.images if images_are_space else measured.texts
    others = measured.texts if images_are_space else measured.images
    return unlearned(space, others, measured.image_index, images_are_space=images_are_space, seed=seed, step=step)


def _fitted(
    store: FeatureStore, rows: FittingRows, measured: Pairs, pool: ThreadPoolExecutor, step: Step
) -> dict[str, Baseline]:
    """The fitted baselines: their settings are chosen first, and then they are fitted again where that is asked for."""
    fitting, validation, moved = standardised(
        read_pairs(store, rows.train), read_pairs(store, rows.validation), measured
    )
    families = _families(fitting, pool)
    chosen = {name: pool.submit(_chosen, make, validation, step) for name, make in families.items()}
    settings = {name: future.result() for name, future in _possible(chosen)}
    if not np.array_equal(rows.train, rows.fitted):
        del families, fitting, validation, moved  # memory for the others
        fitting, moved = standardised(read_pairs(store, rows.fitted), measured)
        families = _families(fitting, pool)
    tasks: dict[str, Future[Baseline]] = {}
    for name in settings:
        tasks[name] = pool.submit(_fit_and_measure, families[name], settings[name], moved, len(rows.fitted), step)
    measured_baselines = {name: task.result() for name, task in _possible(tasks)}
    return {name: measured_baselines[name] for name in FITTED if name in measured_baselines}


def _possible(tasks: dict[str, Future[Any]]) -> Iterator[tuple[str, Future[Any]]]:
    """The tasks that did not end in a ``MetricsError``, once each has ended; the others are told of."""
    for name, task in tasks.items():
        error = task.exception()
        if isinstance(error, MetricsError):
            warn(f"the baseline {name} has no row, since it cannot be fitted: {error}")
        else:
            yield name, task


def _families(pairs: Pairs, pool: ThreadPoolExecutor) -> Families:
    """The fitted baselines of pairs, in the order in which they are to be begun.

    Two of them wait for the moments, which are computed once, beside the others.
    """
    moments = pool.submit(Moments.of, pairs)
    return {
        "text_knn": partial(Bridge, pairs, moves_texts=True),
        "image_knn": partial(Bridge, pairs, moves_texts=False),
        "cca": lambda: CCA(moments.result()),
        "ridge": lambda: Ridge(moments.result()),
    }


def _chosen(make: Callable[[], Family], validation: Pairs, step: Step) -> dict:
    return choose(make(), validation, step)


def _fit_and_measure(
    make: Callable[[], Family], settings: dict, measured: Pairs, fitted_images: int, step: Step
) -> Baseline:
    baseline = _measured(make().fit(settings), measured, settings, fitted_images)
    step()
    return baseline


def _measured(embed: Embed, pairs: Pairs, settings: dict | None = None, fitted_images: int | None = None) -> Baseline:
    """A baseline that gives pairs their vectors."""
    images, texts = embed(pairs)
    hubs = {"image_to_text": hub_skewness(texts, images), "text_to_image": hub_skewness(images, texts)}
    return Baseline([rank(images, texts, pairs.image_index)], hubs, settings or {}, fitted_images)
