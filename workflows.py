"""Chains of stages, which the command line and Python callers share: dataset to store, store to run, run to results.

Each function takes paths and settings, writes what it makes to disk, and returns it opened or as plain values. Stages
are imported when they are needed, so that evaluating and drawing load no model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onceover.base.errors import OnceoverError
from onceover.base.files import json_text, sealed
from onceover.base.formats import (
    BEST,
    CONFIG,
    CURRENT,
    EMBEDDINGS,
    ENCODERS,
    ERRORS,
    EVALUATION,
    LEADERBOARD,
    RESULTS,
    SHUFFLED,
    TRIALS,
)
from onceover.base.outputs import Outputs
from onceover.base.progress import say
from onceover.configs.schema import DEFAULT_CONFIG, Config, ConfigError, ExtractConfig, load_config

if TYPE_CHECKING:
    from onceover.extract.pipeline import Summary
    from onceover.extract.store import FeatureStore
    from onceover.heads.checkpoint import Run
    from onceover.heads.grid import Setting
    from onceover.retrieval.embeddings import Embeddings, Gallery
    from onceover.retrieval.index import Index
    from onceover.retrieval.search import Hit

GALLERIES = {"image": "images", "text": "captions"}  # kind -> folder within an index
_EVALUATE_AGAIN = "move it elsewhere and evaluate again"


class WorkflowError(OnceoverError):
    """Files of several stages that do not go together."""


@contextlib.contextmanager
def _opened(store: FeatureStore | str | Path) -> Iterator[FeatureStore]:
    """A feature store by its path, closed at the end; one that is open already stays open."""
    from onceover.extract.store import FeatureStore

    if isinstance(store, FeatureStore):
        yield store
        return
    with FeatureStore(store) as opened:
        yield opened


def _folder_of(run: Run | str | Path) -> Path:
    return Path(run) if isinstance(run, str | Path) else run.folder


def _run_at(run: Run | str | Path) -> Run:
    """A run by its folder; one that is loaded already stays as it is."""
    from onceover.heads.checkpoint import load_run

    return load_run(run) if isinstance(run, str | Path) else run


def extract(
    data: str | Path,
    store: str | Path,
    config: ExtractConfig | None = None,
    *,
    limit: int | None = None,
    device: str | None = None,
    force: bool = False,
    prune: bool = False,
    retry_failures: bool = False,
) -> Summary:
    """Encodes a dataset into the feature store at ``store``, or what of it is new, and says what was done.

    Args:
        data: the dataset's folder, or its CSV or JSON file.
        config: encoders and settings; by default those of ``configs/config.yaml``.
        limit: only so many images, the first ones.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; by default the best one at hand.
        force: replace features of other encoders or settings.
        prune: drop rows that the dataset no longer has.
        retry_failures: try images again that the ledger records as failed.
    """
    from onceover.extract.layouts import read_dataset
    from onceover.extract.pipeline import extract as encode

    config = config or load_config(DEFAULT_CONFIG).extract
    dataset = read_dataset(data, config.seed)
    for note in dataset.notes:
        say(note)
    return encode(
        dataset.first(limit),
        store,
        config,
        device=device,
        force=force,
        prune=prune,
        retry_failures=retry_failures,
        say=say,
    )


def extract_features(data: str | Path, store: str | Path, **options: Any) -> FeatureStore:
    """Encodes a dataset and returns its feature store, opened; the options are those of ``extract``."""
    from onceover.extract.store import FeatureStore

    return FeatureStore(extract(data, store, **options).path)


def fit(
    store: FeatureStore | str | Path,
    run: str | Path,
    config: Config | None = None,
    *,
    device: str | None = None,
    memory: int | None = None,
    force: bool = False,
) -> Run:
    """Fits projection heads on a feature store and returns the run, which is also on disk.

    Args:
        run: the folder to write.
        config: settings; by default those of ``configs/config.yaml``.
        memory: the limit in bytes; by default half of the machine's.
        force: replace the run that is there.
    """
    with _opened(store) as opened:
        from onceover.extract.encoding.devices import pick_device
        from onceover.heads.checkpoint import load_run
        from onceover.heads.training import fit as train

        config = config or load_config(DEFAULT_CONFIG)
        train(opened, run, config, device=pick_device(device), memory=memory, force=force)
    return load_run(run)


def sweep(
    store: FeatureStore | str | Path,
    out: str | Path,
    settings: Sequence[Setting],
    *,
    halving: bool = False,
    device: str | None = None,
    memory: int | None = None,
) -> list[dict[str, Any]]:
    """Fits all settings of a grid, ranks them on the validation images, and returns the leaderboard, best first.

    Writes the trials, ``results.csv``, ``leaderboard.md``, ``best.yaml`` and figures to ``out``.

    Args:
        settings: as ``heads.grid.expand`` makes them of a grid.
        halving: drop settings early that are clearly behind the best one.
    """
    with _opened(store) as opened:
        import yaml

        from onceover.analysis.sweeps import plot_sweep
        from onceover.extract.encoding.devices import pick_device
        from onceover.heads.grid import trial_name
        from onceover.heads.sweep import sweep as train
        from onceover.retrieval.evaluation import markdown_table
        from onceover.retrieval.leaderboard import Judge, leaderboard, leaderboard_table, notes, results_csv

        out = Path(out)
        judge = Judge()
        results = train(opened, out, settings, judge, halving=halving, device=pick_device(device), memory=memory)
        trials = [(setting.values, [trial_name(config) for config in setting.configs]) for setting in settings]
        rows = leaderboard(judge, trials, results, opened.roles().selection_name)
        keys = list(settings[0].values)
        texts = {
            RESULTS: results_csv(rows),
            LEADERBOARD: markdown_table(leaderboard_table(rows, keys), notes(rows)),
            BEST: yaml.safe_dump(_best_config(settings, rows[0]).to_dict(), sort_keys=False),
        }
        outputs = Outputs(out, "move it elsewhere and sweep again: finished trials are not fitted again")
        outputs.write_texts(texts)
        plot_sweep(out, out / "figures", step=_drawing)
        return rows


def fit_best(
    store: FeatureStore | str | Path, out: str | Path, *, device: str | None = None, memory: int | None = None
) -> Run:
    """Fits the best setting of the sweep in ``out`` to the run ``out/best``; that of an earlier best is replaced.

    Raises:
        WorkflowError: another run lies there, which the sweep knows nothing of.
    """
    from onceover.heads.grid import trial_name

    folder = Path(out) / "best"
    config = load_config(Path(out) / BEST)
    is_other = (folder / CONFIG).is_file() and load_config(folder / CONFIG) != config
    if is_other and not (Path(out) / TRIALS / f"{trial_name(load_config(folder / CONFIG))}.json").is_file():
        raise WorkflowError(f"{folder} holds a run of settings that this sweep has not tried; move it elsewhere")
    return fit(store, folder, config, device=device, memory=memory, force=is_other)


def _best_config(settings: Sequence[Setting], row: dict[str, Any]) -> Config:
    """The configuration of a leaderboard's row."""
    for setting in settings:
        if all(row[key] == value for key, value in setting.values.items()):
            return setting.configs[0]
    raise WorkflowError("the leaderboard has no setting of this grid")


def _drawing(name: str) -> None:
    say(f"drawing {name}")


def finetune(
    run: Run | str | Path,
    data: str | Path,
    store: FeatureStore | str | Path,
    out: str | Path,
    config: Config | None = None,
    *,
    unfreeze: str = "image",
    cached: bool = True,
    activations: str | Path | None = None,
    encoders: dict[str, str | None] | None = None,
    device: str | None = None,
    force: bool = False,
) -> dict[str, Any] | None:
    """Fine-tunes layers of a run's encoders together with its heads, and writes them to ``out``.

    Returns what ``finetune.json`` says; None in all processes but the first, where several share the batches. The new
    encoders' features are still to be extracted: ``complete_finetuned``.
    """
    from onceover.extract.encoding.devices import pick_device
    from onceover.heads.finetune import finetune as train

    loaded = _run_at(run)
    settings = (config or load_config(DEFAULT_CONFIG)).finetune
    with _opened(store) as opened:
        return train(
            opened,
            loaded,
            data,
            out,
            settings,
            unfreeze=unfreeze,
            cached=cached,
            activations=activations,
            encoders=encoders,
            device=pick_device(device),
            force=force,
        )


def complete_finetuned(
    store: FeatureStore | str | Path, data: str | Path, out: str | Path, *, device: str | None = None
) -> Summary:
    """Extracts the features of fine-tuned encoders, where they changed, and makes ``out`` a run like any other."""
    from onceover.extract.pipeline import extract as encode
    from onceover.extract.store import FeatureStore
    from onceover.heads.finetune_export import check_encoder, dataset_of, finish

    out = Path(out)
    force = _has_own_store(out)
    with _opened(store) as old:
        summary = encode(
            dataset_of(old, data),
            out / "store.h5",
            load_config(out / CONFIG).extract,
            device=device,
            reuse=old,
            tokenizer_files=old.tokenizer_files,
            check_encoder=partial(check_encoder, out),
            force=force,
            say=say,
        )
    with FeatureStore(out / "store.h5") as new:
        finish(new, out)
    return summary


def _has_own_store(out: Path) -> bool:
    """Whether ``store.h5`` in a fine-tuned run's folder is of its encoders, and may be replaced when they change.

    Raises:
        WorkflowError: it is a link, or another store that was copied there.
    """
    from onceover.extract.store import FeatureStore

    path = out / "store.h5"
    if not os.path.lexists(path):
        return False
    if not path.is_symlink():
        with FeatureStore(path) as store:
            specs = {store.provenance[kind]["encoder"] for kind in GALLERIES}
        config = load_config(out / CONFIG).extract
        own = f"{(out / ENCODERS).resolve()}{os.sep}"
        if any(own in spec for spec in specs):
            return True
        if specs == {config.image_encoder, config.text_encoder}:  # no epoch was better, and they are the run's before
            return False
    raise WorkflowError(
        f"{path} is not a store of the encoders in {out}, and would be replaced by theirs; move it elsewhere"
    )


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation as plain values, and the files that it was written to; prints as a table."""

    result: dict[str, Any]
    files: list[Path]

    def __str__(self) -> str:
        from onceover.retrieval.evaluation import table_rows, terminal_table

        return terminal_table(table_rows(self.result))


def evaluate(
    run: Run | str | Path | None = None,
    *,
    store: str | Path | None = None,
    split: str | None = None,
    rerank: Sequence[str] = (),
    shuffled: bool = False,
    memory: int | None = None,
    device: str | None = None,
) -> Evaluation:
    """Measures a run beside its baselines and chance, both ways, or a store's baselines alone.

    Writes ``evaluation-SPLIT.md``, ``.csv`` and ``.json`` into the run's folder, or beside the store.

    Args:
        store: of a run, where its store is now, if it has moved; without a run, the store.
        split: by default the one to be reported on.
        rerank: further rows, corrected for hubs: ``qbnorm``, ``csls``.
        shuffled: fit a sanity check, heads of shuffled pairs, which must score at chance.
    """
    from onceover.extract.store import FeatureStore
    from onceover.heads.provenance import read_provenance
    from onceover.retrieval import evaluation
    from onceover.retrieval.embeddings import read_embeddings

    folder = None if run is None else _folder_of(run)
    embeddings = None
    if folder:
        provenance = read_provenance(folder)
        store = store or store_of(folder, provenance)
        embeddings = read_embeddings(folder / EMBEDDINGS)
        _check_evaluation(folder, split or embeddings.report_split)
    if store is None:
        raise WorkflowError("there is nothing to evaluate: name a run, or a store")
    with FeatureStore(store) as opened:
        if embeddings:
            evaluation.check_store(embeddings, opened)
        control = _fit_shuffled(folder, opened, memory, device) if folder and shuffled else None
        result = evaluation.evaluate(embeddings, opened, split, rerank=rerank, shuffled=control, memory=memory)
    stem = EVALUATION.format(result["split"])
    if not folder:
        stem = f"{Path(store).name}.{stem}"
        folder = Path(store).parent
    texts = {
        f"{stem}.md": evaluation.markdown_table(evaluation.table_rows(result), evaluation.notes(result)),
        f"{stem}.csv": evaluation.csv_table(result),
        f"{stem}.json": json_text(sealed(result)),
    }
    Outputs(folder, _EVALUATE_AGAIN).write_texts(texts)
    return Evaluation(result, [folder / name for name in texts])


def _fit_shuffled(folder: Path, store: FeatureStore, memory: int | None, device: str | None) -> Embeddings:
    """The embeddings of heads that were fitted to shuffled pairs, beside the run in ``folder``.

    A sanity check of an earlier store or of other settings is replaced.

    Raises:
        WorkflowError: something else is where the sanity check is to lie.
    """
    from onceover.heads.provenance import RunError
    from onceover.retrieval.embeddings import read_embeddings

    say("fitting the sanity check: heads of shuffled pairs")
    shuffled = folder / SHUFFLED
    if shuffled.is_symlink():
        raise WorkflowError(f"{shuffled} is a link, and the sanity check is fitted there; move it elsewhere")
    single = {"shuffle_pairs": "true", "members": 1, "cca": "false", "refit": "false"}
    config = load_config(folder / CONFIG, [f"training.{key}={value}" for key, value in single.items()])
    try:
        fit(store, shuffled, config, memory=memory, device=device)
    except RunError:
        if (shuffled / CONFIG).is_file() and not load_config(shuffled / CONFIG).training.shuffle_pairs:
            raise WorkflowError(
                f"{shuffled} holds another run, and the sanity check is fitted there; move it elsewhere"
            ) from None
        fit(store, shuffled, config, memory=memory, device=device, force=True)
    return read_embeddings(shuffled / EMBEDDINGS)


def _check_evaluation(folder: Path, split: str) -> None:
    """Refuses to evaluate where the results could not be written, before anything is computed."""
    outputs = Outputs(folder, _EVALUATE_AGAIN)
    for suffix in (".md", ".csv", ".json"):
        outputs.check(EVALUATION.format(split) + suffix)


def store_of(folder: Path, provenance: dict[str, Any]) -> Path:
    """The store that the run in ``folder`` was fitted on.

    Raises:
        ConfigError: it is not there any more.
    """
    store = Path(provenance["store"])
    if not store.exists():
        raise ConfigError(f"{folder} was fitted on {store}, which is not there; name it: --store FILE.h5")
    return store


def error_page(run: Run | str | Path, split: str, count: int, rerank: Sequence[str] = ()) -> Path:
    """Writes the ``count`` worst queries each way as a page into the run's folder, and returns its path."""
    from onceover.analysis.report import error_page as draw
    from onceover.retrieval.embeddings import read_embeddings

    folder = _folder_of(run)
    name = ERRORS.format(split)
    correction = "qbnorm" if "qbnorm" in rerank else None
    page = draw(read_embeddings(folder / EMBEDDINGS), split, count, correction)
    Outputs(folder, _EVALUATE_AGAIN).write_texts({name: page})
    return folder / name


def compare(runs: Sequence[str | Path], split: str | None = None, rerank: str | None = None) -> dict[str, Any]:
    """Compares runs with the first one, query by query; differences come with 95 % intervals."""
    from onceover.heads.provenance import read_provenance
    from onceover.retrieval import evaluation
    from onceover.retrieval.embeddings import read_embeddings

    for folder in runs:
        read_provenance(Path(folder))
    opened = {str(folder): read_embeddings(Path(folder) / EMBEDDINGS) for folder in runs}
    return evaluation.compare_runs(opened, split, rerank)


def ensemble(runs: Sequence[str | Path], out: str | Path, *, store: str | Path | None = None) -> Run:
    """Joins runs of one store into one, whose score is the mean of theirs.

    Args:
        store: the runs' feature store, if it has moved.
    """
    from onceover.heads.checkpoint import load_run
    from onceover.heads.ensemble import ensemble as join

    opened = [load_run(folder) for folder in runs]
    with _opened(store or store_of(Path(runs[0]), opened[0].provenance)) as features:
        join(features, opened, out)
    return load_run(out)


@dataclass(frozen=True)
class IndexOptions:
    """Choices in building an index; None stands for what the index had before, or else for the default.

    Attributes:
        kind: ``auto``, ``flat``, ``hnsw``, ``ivf`` or ``ivfpq``. memory: for ``auto``, the limit in bytes.
        min_recall: the recall@10 below which an approximate index is refused. rerank: ``none`` or ``qbnorm``.
        prune: drop what is no longer there, with its features. retry_failures: try failed images again.
        force: replace an index of something else; go on although most items are gone.
        encoders: by kind, where an encoder is now, if it has moved.
    """

    kind: str | None = None
    memory: int | None = None
    min_recall: float | None = None
    rerank: str | None = None
    prune: bool = False
    retry_failures: bool = False
    force: bool = False
    device: str | None = None
    encoders: dict[str, str | None] | None = None


def index(
    run: Run | str | Path,
    out: str | Path | None = None,
    *,
    images: str | Path | None = None,
    captions: str | Path | None = None,
    split: str | None = None,
    options: IndexOptions | None = None,
) -> Path:
    """Indexes a run's own images and captions, or a folder's images, or a file's captions, for fast search.

    Args:
        out: the folder to write; by default ``index`` in the run's folder.
        images: a folder of images. captions: a text file, one caption per line. split: only this split of the run's.

    Returns:
        The index's folder.
    """
    from onceover.base.memory import default_memory
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.index import check_origin, claim_index, compact, update

    loaded = _run_at(run)
    options = options or IndexOptions()
    out = loaded.folder / "index" if out is None else Path(out)
    embeddings = read_embeddings(loaded.folder / EMBEDDINGS)
    loaded.check_space(embeddings.space)
    origin = str(loaded.folder.resolve())
    source = str(Path(images or captions or loaded.folder).resolve())
    if split:
        source += f", split {split}"
    for kind, foreign in (("image", images), ("text", captions)):
        if foreign or not (images or captions):
            before = check_origin(out / GALLERIES[kind], source, origin, embeddings.space, force=options.force)
            if options.rerank is None and before:
                options = replace(options, rerank="qbnorm" if before["biased"] else "none")
    claim_index(out, GALLERIES.values())  # before anything is encoded
    if images or captions:
        galleries = [_foreign_gallery(loaded, embeddings, out, images, captions, options)]
    else:
        galleries = [embeddings.gallery(kind, split, options.rerank) for kind in GALLERIES]
    for gallery in galleries:
        folder = out / GALLERIES[gallery.kind]
        probes = embeddings.probes(gallery.kind, gallery.biased)
        summary = update(
            folder,
            gallery,
            probes,
            source=source,
            run=origin,
            kind=options.kind,
            memory=options.memory or default_memory(),
            min_recall=options.min_recall,
            force=options.force,
            say=say,
        )
        rows = f"{summary.rows:,} {GALLERIES[gallery.kind]}"
        if summary.up_to_date:
            say(f"{rows}: up to date")
        else:
            say(f"{rows}: {summary.added:,} added, {summary.removed:,} removed")
        if options.prune:
            compact(folder, probes, say, keep_last=False)
    return out


def _foreign_gallery(
    run: Run,
    embeddings: Embeddings,
    out: Path,
    images: str | Path | None,
    captions: str | Path | None,
    options: IndexOptions,
) -> Gallery:
    """A folder's images or a file's captions, encoded into a feature store of their own and embedded by the heads."""
    from onceover.extract.dataset.alone import read_captions, read_images
    from onceover.extract.pipeline import extract as encode
    from onceover.extract.store import FeatureStore
    from onceover.heads.embed import image_embeddings, text_embeddings
    from onceover.retrieval.embeddings import gallery_of_store
    from onceover.retrieval.hubness import bias_by_bank
    from onceover.retrieval.index import check_vanished

    if images:
        kind = "image"
        dataset = read_images(images)
        items = dataset.ids
    else:
        assert captions is not None, "there are images or captions"
        kind = "text"
        dataset = read_captions(captions)
        items = dataset.captions
    store_file = out / f"{GALLERIES[kind]}.h5"
    _check_gallery_store(store_file, kind, dataset.root, options.force)
    if not (options.prune or options.force):
        check_vanished(out / GALLERIES[kind], items, str(images or captions))
    for note in dataset.notes:
        say(note)
    encode_summary = encode(
        dataset,
        store_file,
        _extraction_of(run, kind, options),
        device=options.device,
        tokenizer_files=run.tokenizer_files,
        check_encoder=run.check_encoder,
        force=options.force,
        retry_failures=options.retry_failures,
        keep_vanished=True,
        prune=options.prune,
        say=say,
    )
    for line in encode_summary.lines():
        say(line)
    with FeatureStore(encode_summary.path) as store:
        run.check_encoder(kind, store.recipes[kind])
        if images:
            vectors = image_embeddings(run.heads, store.image_features)
        else:
            vectors = text_embeddings(run.heads, store.text_features)
        corrected = (options.rerank or embeddings.rerank) == "qbnorm"
        bias = bias_by_bank(embeddings, kind, vectors) if corrected else None
        gallery = gallery_of_store(store, kind, vectors, bias, embeddings.space)
    if not images:
        return gallery
    root = Path(images).resolve()
    return replace(gallery, paths=[str(root / path) for path in gallery.paths])


def _check_gallery_store(path: Path, kind: str, root: Path, force: bool) -> None:
    """Refuses to write over a store in an index's folder that is not of the index's own items.

    Args:
        kind: of the items: ``image`` or ``text``. root: where they are. force: replace that of items elsewhere.

    Raises:
        WorkflowError: it is a link, holds features of the other kind, or of other items.
    """
    from onceover.extract.store import FeatureStore

    if not os.path.lexists(path):
        return
    if path.is_symlink():
        raise WorkflowError(f"{path} is a link, and an index keeps features there; move it elsewhere")
    with FeatureStore(path) as store:
        is_paired = len(store.image_ids) > 0 and len(store.captions) > 0
        holds_kind = len(store.image_ids if kind == "image" else store.captions) > 0
        is_of_others = store.provenance["data"] != str(root.resolve())
    if is_paired or not holds_kind:
        raise WorkflowError(f"{path} is another feature store, and an index keeps features there; move it elsewhere")
    if is_of_others and not force:
        raise WorkflowError(f"{path} holds features of other items than those in {root}; move it elsewhere, or --force")


def _extraction_of(run: Run, kind: str, options: IndexOptions) -> ExtractConfig:
    """The settings by which other images or captions get features like those that the run was fitted on."""
    provenance = run.provenance
    places = options.encoders or {}
    return replace(
        ExtractConfig(**provenance["extract"]),
        image_encoder=places.get("image") or provenance["encoders"]["image"]["encoder"],
        text_encoder=places.get("text") or provenance["encoders"]["text"]["encoder"],
        seed=provenance["encoders"][kind]["seed"],
        dtype=provenance["recipes"][kind]["dtype"],
        batch_size=None,
    )


def change_index(folder: str | Path, *, remove: Sequence[str] = (), run: str | Path | None = None) -> None:
    """Removes the named items from an index; without names, writes it anew without what was removed before.

    Args:
        run: the run that the index was made with, if it has moved.
    """
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.index import Index, IndexingError, compact
    from onceover.retrieval.index import remove as remove_items

    folder = Path(folder)
    folders = {kind: folder / name for kind, name in GALLERIES.items() if (folder / name / CURRENT).exists()}
    if not folders:
        raise IndexingError(f"there is no index at {folder}")
    indexes = {kind: Index(path) for kind, path in folders.items()}
    run = Path(run) if run else run_of(folder, next(iter(indexes.values())))
    embeddings = read_embeddings(run / EMBEDDINGS)
    if any(opened.space != embeddings.space for opened in indexes.values()):
        raise IndexingError(f"{folder} was made by other heads than {run}'s; name its own --run, or index again")
    present = {kind: set(opened.ids()).intersection(remove) for kind, opened in indexes.items()}
    missing = sorted(set(remove).difference(*present.values()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise IndexingError(f"{folder} holds no {missing[0]!r}{more}")
    for kind, path in folders.items():
        probes = embeddings.probes(kind, indexes[kind].biased)
        if not remove:
            summary = compact(path, probes, say)
            say(f"{path}: {summary.rows:,} rows; the room of {summary.removed:,} removed ones is free")
        elif present[kind]:
            summary = remove_items(path, sorted(present[kind]), probes=probes, say=say)
            say(f"{path}: {summary.rows:,} rows; {summary.removed:,} removed")


def run_of(folder: Path, opened: Index) -> Path:
    """The run that the index in ``folder`` was made with.

    Raises:
        ConfigError: it is not there any more.
    """
    run = Path(opened.manifest["run"])
    if not run.exists():
        raise ConfigError(f"{folder} was made with the run {run}, which is not there; name it: --run DIR")
    return run


def open_index(folder: str | Path, kind: str) -> Index:
    """The gallery of an index that holds images (``image``) or captions (``text``).

    Raises:
        IndexingError: there is none, or a damaged one.
    """
    from onceover.retrieval.index import Index, IndexingError

    folder = Path(folder)
    name = GALLERIES[kind]
    if not any((folder / gallery / CURRENT).exists() for gallery in GALLERIES.values()):
        raise IndexingError(f"there is no index at {folder}, or an unfinished one; onceover index makes it")
    if not (folder / name / CURRENT).exists():
        raise IndexingError(
            f"{folder} holds no {name}; index them: onceover index --run RUN --index {folder} --{name} …"
        )
    return Index(folder / name)


def search(run: Run | str | Path, query: str, *, top_k: int = 5, **options: Any) -> list[Hit]:
    """The images that fit a sentence best, or with ``mode="image2text"`` the captions that fit an image's file.

    The options are those of ``search_many``.
    """
    results = search_many(run, [query], top_k=top_k, **options)
    _, hits = next(iter(results))
    return hits


def search_many(
    run: Run | str | Path | None,
    queries: Iterable[str],
    *,
    mode: str = "text2image",
    top_k: int = 5,
    index: str | Path | None = None,
    other: str | None = None,
    weight: float = 0.5,
    split: str | None = None,
    rerank: str | None = None,
    figure: str | Path | None = None,
    device: str | None = None,
    encoders: dict[str, str | None] | None = None,
) -> Iterator[tuple[str, list[Hit]]]:
    """Yields each query with its hits, batch by batch, so that any number of queries takes the same memory.

    Args:
        run: None where ``index`` names the run.
        queries: sentences (``text2image``) or paths of images (``image2text``).
        index: search an index, as ``index`` writes it, in the place of the run's own images or captions.
        other: an image's path (``text2image``) or a sentence (``image2text``) that is mixed into each query.
        weight: the share of each query beside ``other``.
        split: search this split alone.
        figure: draw the hits of the first query to this .png, .svg or .pdf file.
        encoders: by kind, where an encoder is now, if it has moved.
    """
    from onceover.heads.query import QueryEmbedder
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.search import Query, Searcher

    if figure:
        from onceover.analysis.plots import check_figure, plot_hits

        check_figure(figure)
    if other is not None and mode == "text2image" and not Path(other).is_file():
        raise ConfigError(f"--with takes an image's path beside a sentence; {other!r} is no file")
    batches = _checked_batches(queries, mode, other)
    first = next(batches, None)  # what is wrong with it is said before an encoder is loaded
    if first is None:
        return
    kind = "image" if mode == "text2image" else "text"
    gallery: Gallery | Index
    if index is not None:
        gallery = open_index(index, kind)
        loaded = _run_at(run or run_of(Path(index), gallery))
    elif run is not None:
        loaded = _run_at(run)
        gallery = read_embeddings(loaded.folder / EMBEDDINGS).gallery(kind, split, rerank)
    else:
        raise WorkflowError("there is nothing to search: name a run, or an index")
    places = encoders or {}
    embedder = QueryEmbedder(
        loaded, device=device, image_encoder=places.get("image"), text_encoder=places.get("text")
    )
    searcher = Searcher(gallery, embedder, thumbnails=figure is not None)  # type: ignore[arg-type]
    for batch in chain([first], batches):
        if mode == "text2image":
            asked = [Query(sentence=text, picture=other, weight=weight) for text in batch]
        else:
            asked = [Query(sentence=other, picture=path, weight=1 - weight) for path in batch]
        results = searcher.search_many(asked, top_k)
        if figure:
            plot_hits(results[0], asked[0], kind, Path(figure))
        yield from zip(batch, results, strict=True)


def _checked_batches(queries: Iterable[str], mode: str, other: str | None) -> Iterator[list[str]]:
    """The queries, as many at a time as are searched together; each makes sense for ``mode``."""
    from onceover.extract.pictures import read_picture
    from onceover.retrieval.search import AT_ONCE, check_query

    opposite = {"text2image": "image2text", "image2text": "text2image"}
    if other is not None:
        check_query(other, opposite[mode])
        if mode == "text2image":
            read_picture(other)
    remaining = iter(queries)
    while batch := list(islice(remaining, AT_ONCE)):
        for query in batch:
            check_query(query, mode)
        if mode == "image2text":
            for path in batch:
                read_picture(path)
        yield batch


def plot(
    out: str | Path,
    *,
    run: str | Path | None = None,
    store: str | Path | None = None,
    sweep: str | Path | None = None,
    split: str | None = None,
    memory: int | None = None,
) -> list[Path]:
    """Draws the figures of a run, a store or a sweep to the folder ``out``, and returns their files."""
    from onceover.analysis.plots import plot_run, plot_store

    if sweep:
        from onceover.analysis.sweeps import plot_sweep

        return plot_sweep(sweep, out, step=_drawing)
    if run:
        from onceover.heads.provenance import read_provenance

        read_provenance(Path(run))
        return plot_run(run, out, split, step=_drawing)
    if store:
        with _opened(store) as opened:
            return plot_store(opened, out, memory, step=_drawing)
    raise WorkflowError("there is nothing to draw: name a run, a store or a sweep")
