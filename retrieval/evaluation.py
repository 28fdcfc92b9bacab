"""A run, or a store alone, against its baselines on one split: plain values, and terminal, Markdown and CSV tables."""

import csv
import io
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from onceover.base.errors import OnceoverError
from onceover.base.memory import OVERHEAD, default_memory
from onceover.extract.store import FeatureStore, Roles, StoreError, row_blocks
from onceover.retrieval import baselines
from onceover.retrieval.baselines import MAPS, Pairs
from onceover.retrieval.embeddings import Embeddings, EmbeddingsError, model_name
from onceover.retrieval.hubness import RERANKS, csls_bias, hub_skewness
from onceover.retrieval.metrics import DIRECTIONS, RECALL_AT, chance, compare, rank, report

_COLUMNS = (*(f"R@{k}" for k in RECALL_AT), "median_rank", "mean_rank", "mrr", "hub_skewness")
_ARROWS = {"image_to_text": "image→text", "text_to_image": "text→image"}
_DIFFERENCES = (*(f"R@{k}" for k in RECALL_AT), "mrr")
_LEARNED = {
    "cca": baselines.cca,
    "ridge": baselines.ridge,
    "text_knn": lambda train: baselines.neighbours(train, "text_knn"),
    "image_knn": lambda train: baselines.neighbours(train, "image_knn"),
}
_NOTES = {
    "multimodal_qbnorm": "multimodal_qbnorm: inverted softmax with a bank of training queries, its sharpness chosen on "
    "the selection split; inductive: what is searched plays no part in it",
    "multimodal_csls_transductive": "multimodal_csls_transductive: corrected with all queries of the split at once; "
    "transductive: not to be compared with single queries",
    "zero_shot": "zero_shot: the dual encoder's own space, nothing learned here",
    "cca": "cca, ridge, text_knn, image_knn: fitted on the train images' standardised features, settings chosen on "
    "the selection split",
    "image_only": f"image_only, text_only: mean ± standard deviation over {MAPS} random maps, nothing learned",
    "shuffled": "shuffled: heads fitted with the run's settings (an ensemble's first member's) to train images that "
    "had swapped their captions",
}


COPIES = 4  # of features, float64, that the learned baselines hold at a time


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
    """Metrics of the multimodal model and of every baseline on a split (default: the reported one).

    Args:
        embeddings: a run's; None: the baselines alone.
        rerank: corrections for hubs (``retrieval.hubness.RERANKS``) that get a row each; the run's own always does.
        shuffled: the embeddings of the control, heads fitted to permuted pairs.
        memory: bytes that the evaluation may take, by default half of the machine's. Metrics are always of the whole
            split; the learned baselines are fitted on as many train images as fit.

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
    measured, learn = _pictures(store, roles, split), []
    pairs = _pairs(store, measured)
    if len(roles.train):
        train, selection = (_pictures(store, roles, name) for name in ("train", roles.selection_name))
        most = _most_pictures(store, max(len(measured), len(selection)), memory or default_memory())
        learn = [_pairs(store, _sample(train, most)), _pairs(store, selection)]
    models: dict[str, dict] = {}
    if embeddings is not None:
        wanted = dict.fromkeys(["none", embeddings.rerank, *rerank])
        models |= {name: _evaluated(*row, seed=seed) for name, row in _rows_of_run(embeddings, split, wanted)}
    models |= _baselines(pairs, learn, _dual_encoder(store), seed)
    if shuffled is not None:
        models["shuffled"] = _evaluated(*_vectors(shuffled, split), {}, seed=seed)
    models["chance"] = report([chance(len(pairs.images), pairs.image_index)], draws=0)
    return {
        "split": split,
        "n_images": len(pairs.images),
        "n_captions": len(pairs.texts),
        "selected_on": roles.selection_name,
        "baselines_fitted_on": {"pictures": len(learn[0].images) if learn else 0, "of": len(roles.train)},
        "models": models,
    }


def compare_runs(runs: dict[str, Embeddings], split: str | None = None, rerank: str | None = None) -> dict:
    """The first run against each other one, query by query, on a split (default: the one the first reports on).

    Raises:
        EvaluationError: fewer than two runs, or runs whose split holds other images or captions.
    """
    if len(runs) < 2:
        raise EvaluationError("there is nothing to compare; name at least two runs")
    (first, reference), *others = runs.items()
    split = split or reference.report_split
    found = {name: _compared(run, split, rerank) for name, run in runs.items()}
    for name, _ in others:
        if found[name][0] != found[first][0]:
            raise EvaluationError(
                f"{split} is not the same in {first} and {name} (other images, captions or order); "
                "only runs on the same split of the same dataset can be compared"
            )
    pictures, captions, _ = reference.split(split)
    return {
        "split": split,
        "n_images": len(pictures),
        "n_captions": len(captions),
        "selected_on": {name: run.selection_split for name, run in runs.items()},
        "rerank": {name: rerank or run.rerank for name, run in runs.items()},
        "reference": first,
        "runs": {name: report([ranks], draws=0) for name, (_, ranks) in found.items()},
        "differences": {name: compare([found[first][1]], [found[name][1]]) for name, _ in others},
    }


def verdict(interval: list[float]) -> str:
    """What a 95 % interval of a difference allows to say, where more is better."""
    low, high = interval
    if low <= 0 <= high:
        return "not distinguishable"
    return "better" if low > 0 else "worse"


def _compared(embeddings: Embeddings, split: str, rerank: str | None):
    """What identifies a split, and the run's ranks on it."""
    pictures, captions, image_index = embeddings.split(split)
    same = (
        [embeddings.sha256[row] for row in pictures],
        [embeddings.captions[row] for row in captions],
        image_index.tolist(),
    )
    images, texts, index = _vectors(embeddings, split)
    return same, rank(images, texts, index, **_biases(embeddings, split, rerank or embeddings.rerank))


def _roles(store: FeatureStore) -> Roles:
    """The store's roles; of one with nothing to train on or to choose by, whatever it has is reported on."""
    try:
        return store.roles()
    except StoreError:
        splits = np.array(store.image_splits)
        report = next((split for split in ("test", "dev") if (splits == split).any()), None)
        if report is None or not _dual_encoder(store):
            raise
        nothing = np.empty(0, int)
        return Roles(nothing, nothing, np.flatnonzero(splits == report), "", report)


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


def _most_pictures(store: FeatureStore, measured: int, memory: int) -> int:
    """How many images with their captions the learned baselines can be fitted on in ``memory`` bytes.

    Beside those, a split that is measured, of so many images, has its captions in the wider of the two spaces.
    """
    dims, captions = store.dims, len(store.image_index)
    mapped = measured * max(dims) * captions / len(store.image_splits)
    each = dims[0] + dims[1] * captions / len(store.image_splits)
    return max(1000, int(((memory - OVERHEAD) / (8 * COPIES) - mapped) / each))


def _pictures(store: FeatureStore, roles: Roles, split: str) -> np.ndarray:
    """Rows of a split's images.

    Raises:
        EmbeddingsError: there are none with captions.
    """
    named = {"train": roles.train, roles.selection_name: roles.selection, roles.report_name: roles.report}
    pictures = named.get(split, np.flatnonzero(np.array(store.image_splits) == split))
    if not np.isin(store.image_index, pictures).any():
        raise EmbeddingsError(f"there are no images with captions in the split {split!r}; use {', '.join(named)}")
    return pictures


def _sample(rows: np.ndarray, most: int) -> np.ndarray:
    """The rows, in order, or if need be a seeded sample of them."""
    return rows if len(rows) <= most else np.sort(np.random.default_rng(0).permutation(rows)[:most])


def _pairs(store: FeatureStore, pictures: np.ndarray) -> Pairs:
    """The plain features of images, each the mean over its views, and of their captions."""
    captions = np.flatnonzero(np.isin(store.image_index, pictures))
    images = np.empty((len(pictures), store.image_features.shape[2]), np.float32)
    for rows in row_blocks(len(pictures)):
        images[rows] = store.image_features[pictures[rows]].mean(1, dtype=np.float32)
    index = np.searchsorted(pictures, store.image_index[captions])
    return Pairs(images, store.text_features[captions].astype(np.float32), index)


def _vectors(embeddings: Embeddings, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pictures, captions, image_index = embeddings.split(split)
    return embeddings.images[pictures], embeddings.texts[captions], image_index


def _biases(embeddings: Embeddings, split: str, rerank: str) -> dict[str, np.ndarray]:
    if rerank == "csls":
        images, texts, _ = _vectors(embeddings, split)
        return {"image_bias": csls_bias(images, texts), "text_bias": csls_bias(texts, images)}
    return embeddings.biases(rerank, split)


def _rows_of_run(embeddings: Embeddings, split: str, rerank: Iterable[str]):
    for method in rerank:
        if method not in RERANKS:
            raise EvaluationError(f"unknown correction {method!r}; use {', '.join(RERANKS)}")
        row = *_vectors(embeddings, split), _biases(embeddings, split, method)
        yield model_name(method), row


def _evaluated(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray, biases: dict, seed: int) -> dict:
    """A model's report, with the skewness of its hubs."""
    result = report([rank(images, texts, image_index, **biases)], seed=seed)
    for direction, gallery, queries, bias in (
        ("image_to_text", texts, images, biases.get("text_bias")),
        ("text_to_image", images, texts, biases.get("image_bias")),
    ):
        result[direction]["hub_skewness"] = hub_skewness(gallery, queries, bias)
    return result


def _baselines(pairs: Pairs, learn: list[Pairs], dual: bool, seed: int) -> dict[str, dict]:
    """A report of each baseline; ``learn``: train and selection pairs, or nothing where nothing can be fitted."""
    rows: dict[str, dict] = {}
    with tqdm(desc="baselines", unit=" models", disable=None) as bar:
        if dual:
            rows["zero_shot"] = _evaluated(*baselines.zero_shot(pairs), pairs.image_index, {}, seed=seed)
        if learn:
            train, selection, chosen = baselines.standardised(*learn, pairs)
            for name, candidates in _LEARNED.items():
                settings, embed = baselines.choose(candidates(train), selection, bar.update)
                rows[name] = _evaluated(*embed(chosen), pairs.image_index, {}, seed=seed) | {"settings": settings}
        common = {"image_index": pairs.image_index, "seed": seed, "step": bar.update}
        for name, space, others in (
            ("image_only", pairs.images, pairs.texts),
            ("text_only", pairs.texts, pairs.images),
        ):
            maps = baselines.unlearned(space, others, images_are_space=name == "image_only", **common)
            rows[name] = report(maps, seed=seed)
    return rows


def _dual_encoder(store: FeatureStore) -> bool:
    """Whether both kinds of features are projections of one model into its own shared space."""
    image, text = store.recipes["image"], store.recipes["text"]
    return image["weights"] == text["weights"] and image["pooling"] == text["pooling"] == "projection"


def notes(result: dict) -> list[str]:
    """What a reader of the numbers has to know."""
    lines = [
        f"{result['split']}: {result['n_images']:,} images, {result['n_captions']:,} captions; in brackets the size "
        "of the gallery; R@K: hit@K in percent with 95 % intervals over images (true recall@K: in .csv and .json)",
        f"everything that was chosen was chosen on {result['selected_on']}"
        if result["selected_on"]
        else "nothing fitted",
        *(note for model, note in _NOTES.items() if model in result["models"]),
    ]
    fitted = result["baselines_fitted_on"]
    if 0 < fitted["pictures"] < fitted["of"]:
        lines.append(
            f"the learned baselines were fitted on {fitted['pictures']:,} of {fitted['of']:,} train images, as many "
            "as --memory allows"
        )
    return lines + _warnings(result["split"], {"heads and settings": result["selected_on"]})


def _warnings(split: str, selected_on: dict[str, str]) -> list[str]:
    """What makes numbers on a split unfit to be reported; ``selected_on``: by whom what was chosen where."""
    if split == "train":
        return ["warning: the heads were trained on these images: these numbers say nothing about new ones"]
    flattered = [name for name, chosen in selected_on.items() if chosen == split]
    if not flattered:
        return []
    chosen = f"{', '.join(flattered)} were chosen on {split}, and heads by default fitted on it in the end"
    return [f"warning: {chosen}: these numbers flatter them"]


def table_rows(result: dict) -> list[list[str]]:
    """Header and one row for each model and direction, as text."""
    rows = [["model", "direction (gallery)", *_COLUMNS, "rsum"]]
    for model, summary in result["models"].items():
        for direction in DIRECTIONS:
            side = summary[direction]
            label = f"{_ARROWS[direction]} ({side['gallery']:,})"
            rows.append([model, label, *(_cell(side, column) for column in _COLUMNS), f"{summary['rsum']:.1f}"])
    return rows


def comparison_rows(result: dict) -> list[list[str]]:
    """Header and one row for each other run, direction and number: both values, their difference and what it allows."""
    first = result["reference"]
    rows = [["run", "direction (gallery)", "number", first, "run's", "difference [95 %]", "verdict"]]
    for name, difference in result["differences"].items():
        before, after = result["runs"][first], result["runs"][name]
        for direction in DIRECTIONS:
            label = f"{_ARROWS[direction]} ({before[direction]['gallery']:,})"
            for key in _DIFFERENCES:
                rows.append(
                    [name, label, *_difference(key, before[direction], after[direction], difference[direction])]
                )
        rows.append([name, "both", *_difference("rsum", before, after, difference)])
    return rows


def _difference(key: str, before: dict, after: dict, difference: dict) -> list[str]:
    digits = 3 if key == "mrr" else 1
    (low, high), value = difference[f"{key}_ci"], difference[key]
    return [
        key,
        f"{before[key]:.{digits}f}",
        f"{after[key]:.{digits}f}",
        f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]",
        verdict([low, high]),
    ]


def comparison_notes(result: dict) -> list[str]:
    """What a reader of a comparison has to know."""
    lines = [
        f"{result['split']}: {result['n_images']:,} images, {result['n_captions']:,} captions; intervals resample "
        "the images, the same ones for both runs; they say nothing about other seeds, which fits of several seeds do"
    ]
    tests = len(result["differences"]) * (len(DIRECTIONS) * len(_DIFFERENCES) + 1)
    lines.append(f"each of the {tests} verdicts stands alone: without any difference, one in twenty would not hold")
    methods = result["rerank"]
    each = ", ".join(f"{name}: {method}" for name, method in methods.items())
    lines.append(f"correction for hubs: {each if len(set(methods.values())) > 1 else next(iter(methods.values()))}")
    if "csls" in methods.values():
        lines.append("csls is transductive: it uses all queries of the split at once")
    return lines + _warnings(result["split"], result["selected_on"])


def _cell(side: dict, column: str) -> str:
    if column not in side:
        return "–"
    if column in ("mrr", "hub_skewness"):
        return f"{side[column]:.{3 if column == 'mrr' else 2}f}"
    if not column.startswith("R@"):
        return f"{side[column]:.1f}"
    digits = 1 if side[column] >= 2 else 2
    value = f"{side[column]:.{digits}f}"
    if f"{column}_sd" in side:
        return f"{value} ± {side[f'{column}_sd']:.{digits}f}"
    low, high = side.get(f"{column}_ci", (None, None))
    return value if low is None else f"{value} [{low:.{digits}f}, {high:.{digits}f}]"


def terminal_table(rows: list[list[str]]) -> str:
    """A table in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(rows: list[list[str]], remarks: list[str]) -> str:
    """A table in Markdown, with its notes."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks), ""])


def csv_table(result: dict) -> str:
    """Every number in full, one row for each model and direction."""
    rows: list[dict] = []
    for model, summary in result["models"].items():
        for key in DIRECTIONS:
            flat: dict = {"split": result["split"], "n_images": result["n_images"], "n_captions": result["n_captions"]}
            flat |= {"model": model, "direction": key}
            for column, value in summary[key].items():
                flat |= (
                    {f"{column}_low": value[0], f"{column}_high": value[1]}
                    if isinstance(value, list)
                    else {column: value}
                )
            rows.append(flat | {"rsum": summary["rsum"]})
    buffer = io.StringIO()
    writer = csv.DictWriter(
        buffer, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
