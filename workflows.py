"""Chains of stages, shared by the command line and Python callers: dataset to store, store to run, run to results.

Each function takes paths and settings, writes its result to disk, and returns it opened or as plain values. Stages are
imported when they are needed, so that evaluating and drawing load no model.

The examples run in a folder with a small dataset ``data`` (60 drawn images, five captions each), its feature store
``store.h5``, two runs, ``runs/first`` and ``runs/second``, and the settings of them all, ``defaults.yaml``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onceover.base.addresses import is_address, path_of
from onceover.base.errors import OnceoverError
from onceover.base.formats import EMBEDDINGS, ERRORS, EVALUATION
from onceover.base.outputs import Outputs
from onceover.base.progress import say, warn
from onceover.configs.schema import DEFAULT_CONFIG, Config, ExtractConfig, load_config

if TYPE_CHECKING:
    from onceover.analysis.hits_shown import Hits
    from onceover.extract.dataset import Dataset
    from onceover.extract.dataset.reading import ReadOptions
    from onceover.extract.share import Share
    from onceover.extract.store import FeatureStore
    from onceover.extract.summary import Summary
    from onceover.heads.checkpoint import Run
    from onceover.heads.grid import Setting
    from onceover.heads.originals import Originals
    from onceover.heads.sweep import SweepShare
    from onceover.retrieval.search import Hit

NEIGHBOURS = 10  # the nearest others that a row of an exported table names
_EVALUATE_AGAIN = "move it elsewhere and evaluate again"


class WorkflowError(OnceoverError):
    """Files of several stages that do not belong together."""


def _opened(store: FeatureStore | str | Path) -> contextlib.AbstractContextManager[FeatureStore]:
    """Opens a feature store by its path, to be closed at the end; one that is open already stays open."""
    from onceover.extract.store import FeatureStore

    if isinstance(store, FeatureStore):
        return contextlib.nullcontext(store)
    return FeatureStore(store)


def _folder_of(run: Run | str | Path) -> Path:
    return Path(run) if isinstance(run, str | Path) else run.folder


def extract(
    data: str | Path,
    store: str | Path,
    config: ExtractConfig | None = None,
    *,
    limit: int | None = None,
    reading: ReadOptions | None = None,
    device: str | None = None,
    engine: str = "auto",
    backend: str = "auto",
    address: str | None = None,
    force: bool = False,
    prune: bool = False,
    retry_failures: bool = False,
) -> Summary:
    """Encodes a dataset into the feature store at ``store``, reusing rows already there, and returns a summary.

    Args:
        data: the dataset's folder or file, a pattern of shards, or an address such as ``s3://bucket/data``.
        config: encoders and settings; by default those of ``configs/config.yaml``.
        limit: encode only the first images, this many.
        reading: how to read the dataset (columns, the images' folder, …), where its files do not tell.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; by default the best available. Several, as in
            ``cuda:0,cuda:1``, work in a process each; a script that asks for that needs ``if __name__ == "__main__":``.
        engine: ``threads``, ``processes`` (they feed a GPU), ``ray`` (a cluster), one of another package, or ``auto``.
        address: of Ray's cluster; by default the one in ``RAY_ADDRESS``, one that runs here, or a new one here.
        backend: ``eager`` (torch), ``openvino``, ``plain``, one of another package, or ``auto``: OpenVINO where it is
            installed and faster.
        force: replace features of other encoders or settings.
        prune: drop rows that are no longer in the dataset.
        retry_failures: retry images that the ledger records as failed.
    """
    from onceover.extract.pipeline import extract as encode
    from onceover.extract.store_form import store_place

    config = config or load_config(DEFAULT_CONFIG).extract
    store_place(store)  # one that cannot be is refused before the dataset is read
    check_cluster(engine, address, device)
    return encode(
        _dataset(data, config, limit, reading),
        store,
        config,
        device=device,
        engine=engine,
        backend=backend,
        force=force,
        prune=prune,
        retry_failures=retry_failures,
    )


def check_cluster(engine: str | None, address: str | None, device: str | None = None) -> None:
    """Connects to Ray's cluster at an address, if one is given, and refuses what does not go with an engine.

    Raises:
        WorkflowError: an address without ``ray``, or several devices with it. RayError: the cluster cannot be reached.
    """
    if engine != "ray":
        if address is not None:
            raise WorkflowError("--address is that of Ray's cluster; give it with --engine ray")
        return
    if device is not None and "," in device:
        raise WorkflowError("--engine ray uses all cards of its nodes; give it the kind of device alone: --device cuda")
    from onceover.extract.engines.ray import connect

    connect(address)


def extract_share(
    data: str | Path,
    store: str | Path,
    worker: str,
    config: ExtractConfig | None = None,
    *,
    limit: int | None = None,
    reading: ReadOptions | None = None,
    device: str | None = None,
    engine: str = "auto",
    backend: str = "auto",
    prune: bool = False,
    retry_failures: bool = False,
) -> Share:
    """Encodes one worker's share of a dataset, for the feature store at ``store``, which ``extract`` finishes.

    Any number of workers may run at once, on machines that share the folder of the store.

    Args:
        data, store: as for ``extract``, and so are all others; they must be the same for all workers.
        worker: which one of how many, from 1: ``2/4``.
    """
    from onceover.base.worker import parse_worker
    from onceover.extract.share import extract_share as encode
    from onceover.extract.store_form import store_place

    if engine == "ray":
        raise WorkflowError("--engine ray hands out shards itself; leave out --worker, or the engine")
    config = config or load_config(DEFAULT_CONFIG).extract
    store_place(store)
    return encode(
        _dataset(data, config, limit, reading),
        store,
        config,
        parse_worker(worker),
        device=device,
        engine=engine,
        backend=backend,
        prune=prune,
        retry_failures=retry_failures,
    )


def _dataset(data: str | Path, config: ExtractConfig, limit: int | None, reading: ReadOptions | None) -> Dataset:
    """The first images of a dataset, with their captions; the user is told how it was read."""
    from onceover.extract.dataset.reading import ReadOptions
    from onceover.extract.encoders import parse_spec
    from onceover.extract.layouts import read_dataset

    for spec in (config.image_encoder, config.text_encoder):
        parse_spec(spec)  # one that cannot be is refused before the dataset is read
    dataset = read_dataset(data, config.seed, reading or ReadOptions())
    for note in (dataset.taken, *dataset.notes):
        say(note)
    return dataset.first(limit)


def extract_features(data: str | Path, store: str | Path, **options: Any) -> FeatureStore:
    """Encodes a dataset once and returns its feature store, opened; rows already in the store are reused.

    Args:
        data: the dataset's folder or file, a pattern of shards, or an address such as ``s3://bucket/data``.
        store: the .h5 file to write, or a folder for a large dataset (``flickr.store``, or a name with a slash at the
            end); a name that says neither becomes a folder from 8 GiB of features.
        options: ``config`` (encoders and settings; by default those of ``configs/config.yaml``), ``limit`` (encode only
            the first images), ``reading`` (``ReadOptions``: columns, the images' folder, …),
            ``device``, ``engine``, ``backend``, ``force`` (replace features of other encoders or
            settings), ``prune`` (drop rows that are no longer in the dataset), ``retry_failures`` (retry images that
            are recorded as failed).

    Example:
        >>> store = onceover.extract_features("data", "new.h5")
        >>> len(store.image_ids), len(store.captions)
        (60, 300)
    """
    from onceover.extract.store import FeatureStore

    return FeatureStore(extract(data, store, **options).path)


def join(stores: Sequence[str | Path], store: str | Path, *, common: bool = False, force: bool = False) -> FeatureStore:
    """Writes the features of several stores of one dataset side by side into one store and returns it, opened.

    Nothing is encoded again. An encoder that several stores have in common is taken once; queries pass all encoders.

    Args:
        stores: the stores to join.
        store: the .h5 file or folder to write.
        common: take the images and captions that all stores have, where one lacks some.
        force: replace another store that is there.

    Example:
        >>> config = onceover.load_config("defaults.yaml", ["extract.text_pooling=cls"])
        >>> second = onceover.extract_features("data", "second.h5", config=config.extract)
        >>> joined = onceover.join(["store.h5", "second.h5"], "joined.h5")
        >>> second.dims, joined.dims  # the image encoder is the same in both
        ((16, 32), (16, 64))
    """
    from onceover.extract.joining import join_stores
    from onceover.extract.store import FeatureStore

    return FeatureStore(join_stores(stores, store, common=common, force=force).path)


def repack(store: str | Path, to: str | Path, *, force: bool = False) -> FeatureStore:
    """Writes a store in its other form, one file or a folder of shards, and returns it, opened.

    Args:
        store: the store, a .h5 file or a folder.
        to: the file or folder to write; a name that ends with ``.h5``, or with ``.store`` or a slash, says which.
        force: replace another store at ``to``.

    Example:
        >>> folder = onceover.repack("store.h5", "drawn.store")
        >>> len(folder.image_ids), folder.image_features.shape
        (60, (60, 2, 16))
    """
    from onceover.extract.repack import repack as write
    from onceover.extract.store import FeatureStore

    return FeatureStore(write(store, to, force=force).path)


def fit(
    store: FeatureStore | str | Path,
    run: str | Path,
    config: Config | None = None,
    *,
    device: str | None = None,
    memory: int | None = None,
    force: bool = False,
) -> Run:
    """Fits projection heads on a feature store, writes the run folder and returns the run.

    Args:
        store: an open feature store, or its path.
        run: the folder to write.
        config: settings; by default those of ``configs/config.yaml``.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; by default the best available.
        memory: the memory limit in bytes; by default half of the machine's.
        force: replace an existing run.

    Example:
        >>> config = onceover.load_config(None, ["training.num_epochs=2", "model.embedding_dim=16"])
        >>> run = onceover.fit("store.h5", "runs/third", config)
        >>> run.provenance["epochs"]
        [2]
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
    engine: str | None = None,
    address: str | None = None,
) -> list[dict[str, Any]]:
    """Fits all settings of a grid, ranks them on the validation split and returns the leaderboard, best first.

    Writes the trials, ``results.csv``, ``leaderboard.md``, ``best.yaml`` and figures to ``out``.

    Args:
        settings: a grid, as ``heads.grid.expand`` makes it.
        halving: stop settings early that are clearly behind the best.
        engine: ``ray``: a cluster, at ``address``, fits the settings; by default this process does.
    """
    check_cluster(engine, address)
    with _opened(store) as opened:
        from onceover.analysis.figures import plot_sweep
        from onceover.extract.encoding.devices import pick_device
        from onceover.extract.engines import ENGINES
        from onceover.heads.grid import schedule_all
        from onceover.heads.sweep import sweep as train
        from onceover.heads.sweep_tables import write_tables
        from onceover.retrieval.leaderboard import Judge

        out = Path(out)
        settings = schedule_all(settings, len(opened.roles().train))
        judge = Judge()
        results = train(
            opened,
            out,
            settings,
            judge,
            halving=halving,
            device=pick_device(device),
            memory=memory,
            cluster=ENGINES.load("ray") if engine == "ray" else None,
        )
        rows = write_tables(out, settings, judge, results, opened.roles().selection_name)
        plot_sweep(out, out / "figures")
        return rows


def sweep_share(
    store: FeatureStore | str | Path,
    out: str | Path,
    settings: Sequence[Setting],
    worker: str,
    *,
    device: str | None = None,
    memory: int | None = None,
) -> SweepShare:
    """Fits one worker's share of the settings of a grid; ``sweep`` fits what is left and ranks them.

    Any number of workers may run at once, on machines that share the folder ``out``.

    Args:
        settings: a grid, as for ``sweep``; it must be the same for all workers.
        worker: which one of how many, from 1: ``2/4``.
    """
    from onceover.base.worker import parse_worker

    with _opened(store) as opened:
        from onceover.extract.encoding.devices import pick_device
        from onceover.heads.grid import schedule_all
        from onceover.heads.sweep import sweep_share as train

        settings = schedule_all(settings, len(opened.roles().train))
        return train(opened, out, settings, parse_worker(worker), device=pick_device(device), memory=memory)


def fit_best(
    store: FeatureStore | str | Path, out: str | Path, *, device: str | None = None, memory: int | None = None
) -> Run:
    """Fits the best setting of the sweep in ``out`` as the run ``out/best``, replacing an earlier best.

    Raises:
        SweepError: ``out/best`` holds a run that is not of this sweep.
    """
    from onceover.heads.sweep_tables import claim_best

    folder, config, is_other = claim_best(Path(out))
    return fit(store, folder, config, device=device, memory=memory, force=is_other)


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
    re_extract: bool = False,
) -> dict[str, Any] | None:
    """Fine-tunes layers of a run's encoders together with its heads and writes them to ``out``.

    On the images that the run was fitted on; the last epoch counts where the validation images are among them.

    Returns the contents of ``finetune.json``; None in all processes but the first, where several share the batches.
    ``complete_finetuned`` then extracts the features of the fine-tuned encoders; with ``re_extract``, what it would
    refuse is refused before anything is trained.
    """
    from onceover.extract.encoding.devices import pick_device
    from onceover.heads.checkpoint import run_at
    from onceover.heads.finetune import finetune as train

    loaded = run_at(run)
    settings = (config or load_config(DEFAULT_CONFIG)).finetune
    with _opened(store) as opened:
        if re_extract:
            from onceover.heads.completion import check_completion

            check_completion(opened, data, Path(out))
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
    """Extracts the features of the fine-tuned encoders and completes ``out`` as a run."""
    from onceover.heads.completion import complete

    with _opened(store) as opened:
        return complete(opened, data, Path(out), device)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation as plain values, and the files it was written to; prints and shows as a table."""

    result: dict[str, Any] = field(repr=False)
    files: list[Path]

    def __str__(self) -> str:
        from onceover.base.terminal import stdout_encoding, tables_text
        from onceover.retrieval.tables import evaluation_tables

        return tables_text(evaluation_tables(self.result), encoding=stdout_encoding())

    def _repr_html_(self) -> str:
        from onceover.analysis.results_page import evaluation_html

        return evaluation_html(self.result)


class Comparison(dict[str, Any]):
    """The result of a comparison, a dict of plain values; prints and shows as a table."""

    def __str__(self) -> str:
        from onceover.base.terminal import stdout_encoding, tables_text
        from onceover.retrieval.tables import comparison_tables

        return tables_text(comparison_tables(self), encoding=stdout_encoding())

    def _repr_html_(self) -> str:
        from onceover.analysis.results_page import comparison_html

        return comparison_html(self)


def evaluate(
    run: Run | str | Path | None = None,
    *,
    store: str | Path | None = None,
    split: str | None = None,
    rerank: Sequence[str] = (),
    equal_captions: bool = False,
    folds: int | None = None,
    shuffled: bool = False,
    memory: int | None = None,
    device: str | None = None,
    fresh: bool = False,
) -> Evaluation:
    """Measures a run beside its baselines and chance in both directions, or a store's baselines alone.

    Writes ``evaluation-SPLIT.md``, ``.csv`` and ``.json`` into the run's folder, or beside the store. Rows that an
    earlier evaluation of the same run has and this one lacks stay.

    Args:
        run: a run, or its folder.
        store: without a run, the store; with one, the new location of its store, if it has moved.
        split: the split to evaluate; by default the reported one.
        rerank: add rows corrected for hubs: ``qbnorm``, ``csls``.
        equal_captions: add a row in which equal captions of other images are correct as well.
        folds: add a row of searches in so many smaller galleries, as COCO's five folds of 1,000 images.
        shuffled: add a sanity check: heads trained on shuffled pairs, which must score at chance.
        memory: the memory limit in bytes; by default half of the machine's.
        fresh: measure the baselines again, which are otherwise kept beside the store (``STORE.h5.baselines``).

    Example:
        >>> evaluation = onceover.evaluate("runs/first")
        >>> print(evaluation)  # doctest: +ELLIPSIS
        image → caption: 12 queries, gallery of 60
        ...
        >>> [path.name for path in evaluation.files]
        ['evaluation-test.md', 'evaluation-test.csv', 'evaluation-test.json']
        >>> round(evaluation.result["models"]["chance"]["text_to_image"]["R@1"], 1)  # in percent, of 12 images
        8.3
    """
    from onceover.extract.store import FeatureStore
    from onceover.heads.provenance import read_provenance, store_of
    from onceover.retrieval import evaluation
    from onceover.retrieval.embeddings import read_embeddings

    folder = None if run is None else _folder_of(run)
    embeddings = None
    fitted_images = None
    if folder:
        provenance = read_provenance(folder)
        fitted_images = provenance.get("train_pictures")
        store = store or store_of(folder, provenance)
        embeddings = read_embeddings(folder / EMBEDDINGS)
        _check_evaluation(folder, split or embeddings.report_split)
    if store is None:
        raise WorkflowError("there is nothing to evaluate: name a run, or a store")
    if shuffled and not folder:
        raise WorkflowError("there is no run whose sanity check could be fitted; name one")
    with FeatureStore(store) as opened:
        if embeddings:
            evaluation.check_store(embeddings, opened)
        control = None
        if folder and shuffled:
            from onceover.heads.sanity import fit_shuffled

            control = fit_shuffled(folder, opened, memory, device)
        result = evaluation.evaluate(
            embeddings,
            opened,
            split,
            rerank=rerank,
            equal_captions=equal_captions,
            folds=folds,
            shuffled=control,
            fitted_images=fitted_images,
            memory=memory,
            fresh=fresh,
        )
    return _write_evaluation(result, folder, opened.path)


def _write_evaluation(result: dict[str, Any], folder: Path | None, store: Path) -> Evaluation:
    """Writes a result into the run's folder, with the rows that it keeps of an earlier one, or beside the store.

    That of a store at an address goes into the current folder.

    Args:
        folder: of the run; None where a store alone was evaluated.
    """
    from onceover.retrieval import tables

    stem = EVALUATION.format(result["split"])
    if folder is None:
        stem = f"{store.name}.{stem}"
    outputs = Outputs(folder or (Path() if is_address(store) else store.parent), _EVALUATE_AGAIN)
    with outputs.writing(tables.evaluation_names(stem)):
        if folder is not None:
            result = _with_earlier_rows(result, folder / f"{stem}.json")
        texts = tables.evaluation_files(stem, result)
        for name, text in texts.items():
            outputs.write_text(name, text)
    return Evaluation(result, [outputs.folder / name for name in texts])


def _with_earlier_rows(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """A result with those rows of the run that an earlier evaluation has beside it; tells which stay, or why not."""
    from onceover.base.errors import first_line
    from onceover.base.files import FileError, read_record
    from onceover.retrieval.evaluation import earlier_rows, is_of_the_same, with_rows

    try:
        earlier = read_record(file, "the earlier evaluation") if file.exists() else {}
        rows = earlier_rows(result, earlier)
    except (FileError, KeyError, TypeError, AttributeError, ValueError) as error:
        warn(f"{file} is damaged or of another version, and is replaced: {first_line(error)}")
        return result
    if not rows:
        return result
    names = ", ".join(rows)
    if not is_of_the_same(result, earlier):
        warn(f"{file} is of other embeddings and is replaced, with its rows {names}")
        return result
    return with_rows(result, rows)


def _check_evaluation(folder: Path, split: str) -> None:
    """Refuses, before anything is computed, to evaluate where the results could not be written."""
    from onceover.retrieval.tables import evaluation_names

    outputs = Outputs(folder, _EVALUATE_AGAIN)
    for name in evaluation_names(EVALUATION.format(split)):
        outputs.check(name)


def error_page(run: Run | str | Path, split: str, count: int, rerank: Sequence[str] = ()) -> Path:
    """Writes a page with the ``count`` worst queries in each direction into the run's folder; returns its path."""
    from onceover.analysis.report import error_page as draw
    from onceover.retrieval.embeddings import read_embeddings

    folder = _folder_of(run)
    name = ERRORS.format(split)
    correction = "qbnorm" if "qbnorm" in rerank else None
    page = draw(read_embeddings(folder / EMBEDDINGS), split, count, correction)
    Outputs(folder, _EVALUATE_AGAIN).write_texts({name: page})
    return folder / name


def compare(runs: Sequence[str | Path], split: str | None = None, rerank: str | None = None) -> Comparison:
    """Compares runs with the first one, query by query; differences come with 95 % intervals.

    Args:
        runs: folders of two or more runs of one dataset.
        split: the split to compare on; by default the one the first run reports.
        rerank: the hubness correction for all runs; by default each run's own.

    Example:
        >>> comparison = onceover.compare(["runs/first", "runs/second"])
        >>> list(comparison["differences"])
        ['runs/second']
        >>> low, high = comparison["differences"]["runs/second"]["rsum_ci"]
        >>> low <= high
        True
    """
    from onceover.heads.provenance import read_provenance
    from onceover.retrieval.comparison import compare_runs
    from onceover.retrieval.embeddings import read_embeddings

    for folder in runs:
        read_provenance(Path(folder))
    opened = {str(folder): read_embeddings(Path(folder) / EMBEDDINGS) for folder in runs}
    return Comparison(compare_runs(opened, split, rerank))


def ensemble(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    store: str | Path | None = None,
) -> Run:
    """Joins runs into one run, whose score is the weighted mean of theirs.

    Args:
        runs: folders of the runs.
        out: the folder to write.
        weights: how much each run counts; by default all the same.
        store: the new location of the runs' feature store, if it has moved; of runs of several stores, the one that
            ``join`` made of these.

    Example:
        >>> joined = onceover.ensemble(["runs/first", "runs/second"], "runs/joined")
        >>> len(joined.provenance["members"])
        2
    """
    from onceover.heads.checkpoint import load_run
    from onceover.heads.ensemble import ensemble as join
    from onceover.heads.provenance import store_of

    opened = [load_run(folder) for folder in runs]
    with _opened(store or store_of(Path(runs[0]), opened[0].provenance)) as features:
        join(features, opened, out, weights)
    return load_run(out)


def distill(run: Run | str | Path, out: str | Path, *, dim: int | None = None, store: str | Path | None = None) -> Run:
    """Makes one pair of linear heads of an ensemble, in closed form: its recall at one pair's cost in search.

    Args:
        run: the run or its folder, of several linear pairs of heads.
        out: the folder to write.
        dim: dimensions of the new pair; by default those of the run's first one.
        store: the new location of the run's feature store, if it has moved.

    Example:
        >>> both = onceover.ensemble(["runs/first", "runs/second"], "runs/two")
        >>> pair = onceover.distill(both, "runs/distilled", dim=8)
        >>> len(pair.provenance["members"])
        1
    """
    from onceover.heads.checkpoint import load_run, run_at
    from onceover.heads.distilling import distill as make
    from onceover.heads.provenance import store_of

    opened = run_at(run)
    with _opened(store or store_of(opened.folder, opened.provenance)) as features:
        make(features, opened, out, dim)
    return load_run(out)


@dataclass(frozen=True)
class IndexOptions:
    """Options for building an index; None means the index's previous choice, or else the default.

    Attributes:
        kind: ``auto``, ``flat``, ``hnsw``, ``ivf`` or ``ivfpq``. memory: for ``auto``, the memory limit in bytes.
        min_recall: the recall@10 below which an approximate index is refused. rerank: ``none`` or ``qbnorm``.
        prune: drop items that are no longer there, with their features. retry_failures: retry failed images.
        force: replace an index of something else; continue although most items are gone.
        exclude: patterns of images and folders to leave out, such as ``*.gif`` or ``2019/raw``.
        encoders: by kind, the new location of an encoder that has moved.
    """

    kind: str | None = None
    memory: int | None = None
    min_recall: float | None = None
    rerank: str | None = None
    prune: bool = False
    retry_failures: bool = False
    force: bool = False
    exclude: Sequence[str] = ()
    device: str | None = None
    encoders: dict[str, str | None] | None = None


def index(
    run: Run | str | Path,
    out: str | Path | None = None,
    *,
    images: str | Path | Sequence[str | Path] | None = None,
    captions: str | Path | None = None,
    split: str | None = None,
    options: IndexOptions | None = None,
    worker: str | None = None,
) -> Path:
    """Indexes a run's own images and captions, a folder's images or a file's captions, for fast search.

    Args:
        run: a run, or its folder.
        out: the folder to write; by default ``index`` in the run's folder.
        images: a folder of images, or several. captions: a text file, one caption per line. One alone may be an
            address (``s3://bucket/images``). split: only this split of the run's.
        options: the type of index, limits and more.
        worker: of a run's own images and captions, which share to encode, from 1: ``2/4``; any number of workers may
            run at once, and a call without one finishes the index. Indexes of the types ivf and ivf16 are shared.

    Returns:
        The index's folder.

    Example:
        >>> folder = onceover.index("runs/first", "drawn.index")
        >>> [(query, hits)] = onceover.search_many(None, ["a red circle"], index=folder, top_k=3)
        >>> len(hits)
        3
    """
    from onceover.base.worker import WorkerError, parse_worker
    from onceover.extract.dataset.alone import read_captions, read_folders
    from onceover.heads.checkpoint import run_at
    from onceover.heads.foreign import foreign_gallery
    from onceover.heads.provenance import check_space, read_provenance
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.index import check_origin, check_vanished, claim_index, has_grown, source_of
    from onceover.retrieval.index.galleries import GALLERIES, write_gallery

    if worker and (images or captions):
        raise WorkerError(
            "workers share the index of a run's own images and captions; for folders of images make an index of each "
            "and search them together"
        )
    folder = _folder_of(run)
    options = options or IndexOptions()
    out = folder / "index" if out is None else Path(out)
    provenance = read_provenance(folder)
    embeddings = read_embeddings(folder / EMBEDDINGS)
    check_space(folder, provenance, embeddings.space)
    origin = str(folder.resolve())
    named = [images] if isinstance(images, str | Path) or images is None else list(images)
    folders = [str(path_of(path).resolve()) for path in named if path]
    sources = folders or [str(path_of(captions or folder).resolve())]
    source = source_of(sources)
    if split:
        source += f", split {split}"
    is_grown = False
    for kind, foreign in (("image", folders), ("text", captions)):
        if foreign or not (folders or captions):
            at = out / GALLERIES[kind]
            before = check_origin(at, source, origin, embeddings.space, force=options.force, folders=folders)
            if options.rerank is None and before:
                options = replace(options, rerank="qbnorm" if before["biased"] else "none")
            is_grown = is_grown or (before is not None and has_grown(before, folders))
    claim_index(out, GALLERIES.values())  # before anything is encoded
    if folders or captions:
        if folders:
            name = GALLERIES["image"]
            dataset = read_folders([path for path in named if path], options.exclude)
        else:
            assert captions is not None, "there are images or captions"
            name = GALLERIES["text"]
            dataset = read_captions(captions)
        if not (options.prune or options.force):
            check_vanished(out / name, dataset.ids or dataset.captions, sources, options.exclude)
        gallery = foreign_gallery(
            run_at(run),
            embeddings,
            dataset,
            out / f"{name}.h5",
            rerank=options.rerank,
            device=options.device,
            encoders=options.encoders or {},
            force=options.force,
            retry_failures=options.retry_failures,
            prune=options.prune,
            has_grown=is_grown,
        )
        galleries = [gallery]
    else:
        galleries = [embeddings.gallery(kind, split, options.rerank) for kind in GALLERIES]
    for gallery in galleries:
        write_gallery(
            out,
            gallery,
            embeddings.probes(gallery.kind, gallery.biased),
            source=source,
            folders=folders,
            run=origin,
            kind=options.kind,
            memory=options.memory,
            min_recall=options.min_recall,
            force=options.force,
            prune=options.prune,
            worker=parse_worker(worker) if worker else None,
        )
    return out


def change_index(folder: str | Path, *, remove: Sequence[str] = (), run: str | Path | None = None) -> None:
    """Removes the named items from an index; without names, rewrites it without items removed earlier.

    Args:
        run: the new location of the run that the index was made with, if it has moved.
    """
    from onceover.retrieval.index.galleries import change

    for line in change(Path(folder), list(remove), Path(run) if run else None):
        say(line)


def search(run: Run | str | Path | None, query: str, *, top_k: int = 5, **options: Any) -> Hits:
    """Finds the images that match a text best, or by ``mode`` the images or captions that match a text or an image.

    Args:
        run: a run, or its folder; None where the option ``index`` names the run.
        query: a text, or the path of an image (``image2text``, ``image2image``).
        top_k: the number of hits.
        options: those of ``search_many``.

    Returns:
        The hits, a list that shows itself with images in a notebook.

    Example:
        >>> hits = onceover.search("runs/first", "a red circle above a blue star", top_k=2)
        >>> [(hit.rank, hit.path) for hit in hits]  # doctest: +ELLIPSIS
        [(1, 'images/...jpg'), (2, 'images/...jpg')]
        >>> captions = onceover.search("runs/first", "data/query.jpg", mode="image2text")
        >>> len(captions)
        5
    """
    [(_, hits)] = search_many(run, [query], top_k=top_k, **options)
    return hits


def search_many(
    run: Run | str | Path | None, queries: Iterable[str | Path], **options: Any
) -> Iterator[tuple[str, Hits]]:
    """Yields each query with its hits, batch by batch, so that memory does not grow with the number of queries.

    Args:
        run: a run, or its folder; None where ``index`` names the run.
        queries: texts, or paths of images, as the mode has it.
        options: those of ``search_batches``: ``mode``, ``top_k``, ``min_score``, ``index``, ``with_``, ``minus``,
            ``weight``, ``split``, ``rerank``, ``root``, ``figure``, ``device``, ``encoders``.

    Example:
        >>> for query, hits in onceover.search_many("runs/first", ["a red circle", "a blue star"], top_k=3):
        ...     print(query, len(hits))
        a red circle 3
        a blue star 3
    """
    from onceover.retrieval.queries import batched

    return search_batches(run, batched(map(str, queries)), **options)


def search_batches(
    run: Run | str | Path | None,
    batches: Iterable[list[str]],
    *,
    mode: str = "text2image",
    top_k: int = 5,
    min_score: float | None = None,
    index: str | Path | Sequence[str | Path] | None = None,
    with_: str | Sequence[str] = (),
    minus: str | Sequence[str] = (),
    weight: float | None = None,
    split: str | None = None,
    rerank: str | None = None,
    root: str | Path | Sequence[str | Path] = (),
    figure: str | Path | None = None,
    device: str | None = None,
    encoders: dict[str, str | None] | None = None,
) -> Iterator[tuple[str, Hits]]:
    """Yields each query with its hits; the queries of a batch are answered before the next batch is asked for.

    Args:
        run: a run, or its folder; None where ``index`` names the run.
        batches: texts (``text2…``) or paths of images (``image2…``).
        mode: what is searched by and what is found: ``text2image``, ``image2text``, ``image2image``, ``text2text``.
        top_k: the number of hits per query.
        min_score: leave out hits with a lower score; a note tells where none is left.
        index: search an index, as ``index`` writes it, instead of the run's own images or captions; or several that
            were made with one run, as if they were one.
        with_: texts or paths of images that are mixed into each query, all with the same weight.
        minus: texts or paths of images that are subtracted from each query; together they weigh 0.5.
        weight: the weight of each query against all of ``with_``, 0 to 1; by default 0.5.
        split: search only this split.
        rerank: the hubness correction, ``none`` or ``qbnorm``; by default the run's own.
        root: the folder, or folders, that the images are in now, if they have moved.
        figure: draw the hits of the first query to this .png, .svg or .pdf file, or those of all queries to this .html
            file, once the last query is answered.
        encoders: by kind, the new location of an encoder that has moved.
    """
    from onceover.analysis.hits_shown import Hits
    from onceover.heads.originals import Originals
    from onceover.heads.searching import named_indexes, open_collection
    from onceover.retrieval.gallery import NOUNS
    from onceover.retrieval.queries import checked, further_terms, mode_of, query_of
    from onceover.retrieval.search import check_min_score

    kind = mode_of(mode).gallery
    drawing = None
    if figure:
        from onceover.analysis.hits_page import HitsFile

        drawing = HitsFile(figure, kind)
    with_ = [with_] if isinstance(with_, str) else with_
    minus = [minus] if isinstance(minus, str) else minus
    check_min_score(min_score)
    share = 0.5 if weight is None else weight
    if not with_:
        share = 1.0
    further = further_terms(with_, minus, share)
    batches = checked(batches, mode)
    first = next(batches, None)  # a wrong query is refused before an encoder is loaded
    if first is None:
        return
    collection = open_collection(
        run, index, kinds=(kind,), split=split, rerank=rerank, device=device, encoders=encoders
    )
    originals = Originals(collection, kind, [root] if isinstance(root, str | Path) else root)
    searcher = collection.searcher(kind)
    gallery = collection.galleries[kind]
    source = f"the run {collection.run.folder}"
    if index:
        source = "the index " + " + ".join(map(str, named_indexes(index)))
    about = f"searched: {len(gallery):,} {NOUNS[kind]} of {source}"
    if split:
        about += f", split {split}"
    is_warned = False
    for batch in chain([first], batches):
        asked = [query_of(query, mode, share, further) for query in batch]
        results = []
        for hits in searcher.search_many(asked, top_k):
            placed = [originals.placed(hit) for hit in hits]
            results.append(Hits(_at_least(placed, min_score), kind, originals.image))
        is_warned = is_warned or _warn_of_moved(originals, list(chain.from_iterable(results)))
        if drawing:
            drawing.add(asked, results, about)
        yield from zip(batch, results, strict=True)
    if drawing:
        drawing.finish()


def _at_least(hits: list[Hit], min_score: float | None) -> list[Hit]:
    """The hits that score ``min_score`` or more; a note tells where that leaves none."""
    from onceover.retrieval.search import at_least

    if min_score is None:
        return hits
    best = at_least(hits, min_score)
    if hits and not best:
        say(f"no hit scores {min_score:g} or more; the best scores {hits[0].score:.3f}")
    return best


def _warn_of_moved(originals: Originals, hits: list[Hit]) -> bool:
    """Warns, and returns that it did, where the files of some hits are not there."""
    missing = originals.missing(hits)
    if missing:
        warn(
            f"{len(missing):,} of {len(hits):,} hits have no file: {missing[0].path} is not there; if "
            f"{originals.origin(missing[0])} has moved, name its new place: --root NEW_FOLDER"
        )
    return bool(missing)


def plot(
    out: str | Path,
    *,
    run: str | Path | None = None,
    store: str | Path | None = None,
    sweep: str | Path | None = None,
    split: str | None = None,
    memory: int | None = None,
) -> list[Path]:
    """Draws the figures of a run, a store or a sweep into the folder ``out`` and returns their files.

    Args:
        out: the folder for the figures, each as PNG, SVG and PDF.
        run, store, sweep: what to draw, one of the three.
        split: of a run, the split to draw; by default the reported one.
        memory: of a store, the memory limit in bytes; by default half of the machine's.

    Example:
        >>> files = onceover.plot("figures", store="store.h5")
        >>> sorted(path.name for path in files)
        ['features.pdf', 'features.png', 'features.svg']
    """
    from onceover.analysis.figures import plot_run, plot_store, plot_sweep

    if sweep:
        return plot_sweep(sweep, out)
    if run:
        from onceover.heads.provenance import read_provenance

        read_provenance(Path(run))
        return plot_run(run, out, split)
    if store:
        with _opened(store) as opened:
            return plot_store(opened, out, memory)
    raise WorkflowError("there is nothing to draw: name a run, a store or a sweep")


def report(
    run: str | Path,
    out: str | Path,
    *,
    compare: Sequence[str | Path] = (),
    sweep: str | Path | None = None,
    split: str | None = None,
    store: str | Path | None = None,
) -> Path:
    """Writes all that is known of a run as one HTML page, and returns its path; no model is loaded.

    Parts whose files are missing say how to make them.

    Args:
        run: its folder. out: the file to write.
        compare: folders of other runs of the same dataset, to be compared with. sweep: a sweep's folder.
        split: the split to report; by default the run's reported one.
        store: the new location of the run's feature store, if it has moved.

    Example:
        >>> page = onceover.report("runs/first", "report.html", compare=["runs/second"])
        >>> "<title>Retrieval report: runs/first</title>" in page.read_text(encoding="utf-8")
        True
    """
    from onceover.analysis.report import check_report, open_files, write_report
    from onceover.heads.provenance import read_provenance

    check_report(out)
    for folder in (run, *compare):
        read_provenance(Path(folder))
    with open_files(run, split=split, store=store, compare=compare, sweep=sweep) as files:
        return write_report(files, out)


def export(
    run: Run | str | Path,
    to: str | Path,
    *,
    kind: str = "image",
    split: str | None = None,
    neighbours: int = NEIGHBOURS,
    with_images: bool = False,
    data: str | Path | None = None,
    store: str | Path | None = None,
) -> Path:
    """Writes a run's images or captions with their embeddings to a Parquet file, which other programs open.

    Args:
        run: a run, or its folder.
        to: the .parquet file to write; one that this program wrote is replaced.
        kind: a row for each ``image``, or for each caption (``text``).
        split: only this split. neighbours: how many of the nearest others to name in each row.
        with_images: put the bytes of the images into the file; only where a row is an image.
        data, store: for ``with_images``, the new location of the dataset and of the run's store, if they have moved.

    Returns:
        The file.

    Example:
        >>> file = onceover.export("runs/first", "drawn.parquet", split="test")
        >>> import pyarrow.parquet
        >>> table = pyarrow.parquet.read_table(file)
        >>> table.num_rows, table.column_names[:5]
        (12, ['id', 'path', 'split', 'caption', 'captions'])
    """
    from onceover.analysis import export as tables
    from onceover.heads.provenance import check_space, read_provenance, store_of
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.vector_table import check_table, write_table

    folder = _folder_of(run)
    to = Path(to)
    if with_images and kind != "image":
        raise WorkflowError("a row that is a caption holds no image; take the kind image, or leave the images out")
    if data is not None and not is_address(data) and not has_magic(str(data)) and not Path(data).exists():
        raise WorkflowError(f"{data} is not there; name the dataset's folder or file")
    provenance = read_provenance(folder)
    embeddings = read_embeddings(folder / EMBEDDINGS)
    check_space(folder, provenance, embeddings.space)
    check_table(to)
    with contextlib.ExitStack() as stack:
        source = None
        if with_images:
            from onceover.extract.layouts import stored_images

            opened = stack.enter_context(_opened(store or store_of(folder, provenance)))
            source = stored_images(opened, data)
        table = tables.run_table(folder, provenance, embeddings, kind, split, neighbours)
        if source is not None:
            table = tables.with_images(table, source, table.gallery.paths)
        write_table(to, table)
    return to


def embed(
    run: Run | str | Path,
    to: str | Path,
    *,
    images: str | Path | None = None,
    captions: str | Path | None = None,
    neighbours: int = NEIGHBOURS,
    with_images: bool = False,
    exclude: Sequence[str] = (),
    device: str | None = None,
    encoders: dict[str, str | None] | None = None,
    force: bool = False,
    prune: bool = False,
    retry_failures: bool = False,
) -> Path:
    """Encodes a folder's images or a file's captions, and writes their embeddings to a Parquet file as ``export`` does.

    Their features stay beside it in the store ``TO.features.h5``, so that a call that was interrupted goes on, and a
    later one encodes only what is new.

    Args:
        run: the run, or its folder, whose encoders and heads are used.
        to: the .parquet file to write; one that this program wrote is replaced.
        images: a folder of images. captions: a text file, one caption per line. Both may be addresses.
        neighbours: how many of the nearest others to name in each row.
        with_images: put the bytes of the images into the file.
        exclude: patterns of images and folders to leave out, such as ``*.gif`` or ``2019/raw``.
        encoders: by kind, the new location of an encoder that has moved.
        force: replace features of other encoders or of another folder. prune: drop features of what is gone.
        retry_failures: retry failed images.

    Returns:
        The file.

    Example:
        >>> file = onceover.embed("runs/first", "new.parquet", images="data/images")
        >>> import pyarrow.parquet
        >>> pyarrow.parquet.read_table(file, columns=["id", "x", "y"]).shape
        (60, 3)
    """
    from onceover.analysis import export as tables
    from onceover.extract.dataset.alone import read_captions, read_images
    from onceover.heads.checkpoint import run_at
    from onceover.heads.foreign import foreign_gallery
    from onceover.heads.provenance import check_space
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.vector_table import check_table, write_table

    to = Path(to)
    if (images is None) == (captions is None):
        raise WorkflowError("name a folder of images or a file of captions, one of the two")
    if with_images and images is None:
        raise WorkflowError("a row that is a caption holds no image; name a folder of images, or leave the images out")
    run = run_at(run)
    embeddings = read_embeddings(run.folder / EMBEDDINGS)
    check_space(run.folder, run.provenance, embeddings.space)
    check_table(to)
    if images is not None:
        dataset = read_images(images, exclude)
    else:
        assert captions is not None, "there are images or captions"
        dataset = read_captions(captions)
    gallery = foreign_gallery(
        run,
        embeddings,
        dataset,
        to.with_name(f"{to.name}.features.h5"),
        rerank="none",
        device=device,
        encoders=encoders or {},
        force=force,
        retry_failures=retry_failures,
        prune=prune,
    )
    table = tables.gallery_table(run.provenance, embeddings, gallery, neighbours)
    if with_images:
        table = tables.with_images(table, dataset.images, gallery.ids)
    write_table(to, table)
    return to
