"""Fits heads on cached features, one pair or an ensemble: writes the run folder, chooses the epoch, resumes exactly."""

import dataclasses
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from onceover.base.errors import OnceoverError
from onceover.base.files import digest, only_writer
from onceover.base.formats import EMBEDDINGS, PROVENANCE
from onceover.base.memory import default_memory
from onceover.base.progress import ProgressBar, say, timed, warn
from onceover.configs.schema import Config
from onceover.extract.encoding.devices import log_device
from onceover.extract.store import KINDS, FeatureStore, Roles
from onceover.heads import checkpoint, replacement
from onceover.heads.chunks import MIN_MEMORY, memory_on
from onceover.heads.closed_form import best_closed_form, chosen_share
from onceover.heads.embed import embed, write_embeddings
from onceover.heads.losses import LOSSES
from onceover.heads.models import DualHeads, Ensemble, as_one, members_of
from onceover.heads.schedule import scheduled
from onceover.heads.stacking import steps_per_epoch, train_epochs
from onceover.heads.training_data import TrainingData
from onceover.heads.trials import Trial, trial_memory
from onceover.retrieval.hubness import bank_rows, betas_text, fit_inverted_softmax
from onceover.retrieval.metrics import quality

SAVE_EVERY = 10.0  # seconds between two saves of an unfinished fit, at least: what a kill can cost


class TrainingError(OnceoverError):
    """A fit that cannot start or cannot be continued."""


def fit(
    store: FeatureStore,
    folder: str | Path,
    config: Config,
    *,
    device: str | torch.device = "cpu",
    memory: int | None = None,
    force: bool = False,
) -> dict:
    """Fits heads on the store's train images and writes the run folder; continues an interrupted fit.

    The heads are those of the epoch with the best rsum on the validation images; with ``training.members`` those of
    each member, side by side as one space. With ``training.refit`` this first fit only chooses: the number of epochs,
    the heads without training that stand beside the trained ones and their weight, the sharpness of the correction for
    hubs. The heads are then fitted anew, with these settings, on train and validation images together.

    Args:
        device: ``cpu``, or a GPU.
        memory: bytes that the fit may take; where the features do not fit, they are read in shuffled chunks. By
            default half of the machine's; no more than a GPU has free. An interrupted fit keeps its first limit.
        force: replace the run that is there.

    Returns:
        The run's provenance, as in ``run.json``.

    Raises:
        RunError: the folder holds another run. TrainingError: the loss is not finite. StoreError: too few splits.
    """
    folder = Path(folder)
    device = torch.device(device)
    LOSSES.load(config.training.loss)  # an unknown one is refused before anything is written
    log_device(device)
    roles = store.roles()
    complete = scheduled(config, len(roles.train))
    settings = {"model": complete.to_dict()["model"], "training": complete.to_dict()["training"]}
    request = digest({"settings": settings, "fingerprints": store.fingerprints})
    with only_writer(folder, "the run"):
        replacement.claim_folder(folder)
        if (folder / PROVENANCE).exists() and not force:
            return _finished(folder, request)
        work = replacement.working_folder(folder, force)
        state = checkpoint.load_begun(work, request, force)
        if state is None or "points" not in state:
            state = {"request": request, "memory": memory_on(device, memory or default_memory())}
            checkpoint.begin(work, state)
        checkpoint.save_settings(work, config, store.tokenizer_files)
        if not store.is_checked:
            warn(f"{store.path} was made by an earlier version, and its features cannot be checked as they are read")
        result = _fit_heads(_Fit(store, work, complete, state, device), store, roles, complete)
        space = checkpoint.save_heads(work, result.heads, store.fingerprints)
        say("embedding all images and captions, and choosing the correction for hubs")
        with timed("embedding"), replacement.run_files(work).file(EMBEDDINGS) as aside:
            betas = write_embeddings(
                store,
                result.heads,
                aside,
                result.roles,
                space,
                config.model.rerank,
                result.betas,
                result.closed_form_dims,
            )
        say(f"correction for hubs: {betas_text(betas)}")
        provenance = _provenance(store, result._replace(betas=betas), device)
        checkpoint.save_provenance(work, {"request": request, "space": space} | provenance)
        replacement.take_over(work, folder)
    return checkpoint.read_provenance(folder)


def _finished(folder: Path, request: str) -> dict:
    """The provenance of the finished run in a folder.

    Raises:
        RunError: it is of another request.
    """
    provenance = checkpoint.read_provenance(folder)
    if provenance["request"] != request:
        raise checkpoint.RunError(f"{folder} holds a run of other settings or features; name another --run, or --force")
    say(f"{folder} is fitted with these settings on this store already; --force fits again")
    return provenance


class _FitResult(NamedTuple):
    """Fitted heads.

    Attributes:
        roles: the images that they were fitted on. betas: None where they are yet to be chosen.
        closed_form_dims: how many of the last dimensions are those of heads in closed form.
    """

    heads: DualHeads | Ensemble
    closed_form_dims: int
    roles: Roles
    betas: dict[str, float] | None
    rsum: float
    trials: list[Trial]
    chunk_count: int
    seconds: float


def _fit_heads(fit: "_Fit", store: FeatureStore, roles: Roles, config: Config) -> _FitResult:
    """Chooses epochs and settings on the validation images, and fits again where ``training.refit`` asks for it."""
    training = config.training
    start = time.monotonic()
    with timed("fitting, and choosing the epoch"):
        data, trials = fit.choose(roles)
    trained = as_one([trial.best_heads() for trial in trials])
    heads = trained
    weights = None
    closed_form: list[DualHeads] = []
    rsum = trials[0].best_rsum
    if training.cca:
        form = best_closed_form(store, data, roles, config, fit.memory)
        trained_vectors = embed(trained, store, roles.selection)
        share = chosen_share(trained_vectors, embed(form.heads, store, roles.selection), form.share)
        if share:
            weights = [(1 - share) / len(trials)] * len(trials) + [share]
            heads = as_one([*members_of(trained), form.heads], weights)
            closed_form = [form.again() if training.refit else form.heads]
        del form  # frees memory
    if isinstance(heads, Ensemble):
        rsum = quality(*embed(heads, store, roles.selection))["rsum"]
    chunk_count = data.chunk_count
    del data  # frees memory
    betas = None
    if training.refit:
        betas = _betas(heads, store, roles)
        roles = roles.together()
        with timed("fitting again"):
            heads = as_one(fit.refit(roles, [trial.best_epoch for trial in trials]) + closed_form, weights)
    seconds = round(time.monotonic() - start, 2)
    closed_form_dims = closed_form[0].embedding_dim if closed_form else 0
    return _FitResult(heads, closed_form_dims, roles, betas, rsum, trials, chunk_count, seconds)


def _provenance(store: FeatureStore, result: _FitResult, device: torch.device) -> dict:
    """The part of ``run.json`` that describes the features, the images and the fit."""
    roles = result.roles
    training = result.trials[0].config.training
    validation = {"split": roles.selection_name, "pictures": len(roles.selection), "rsum": result.rsum}
    return {
        "members": checkpoint.member_settings(result.heads),
        "store": str(store.path.resolve()),
        "fingerprints": store.fingerprints,
        "recipes": store.recipes,
        "encoders": {kind: store.provenance[kind] for kind in KINDS},
        "extract": store.provenance["settings"],
        "dims": dict(zip(KINDS, store.dims, strict=True)),
        "selection": validation,
        "report": {"split": roles.report_name, "pictures": len(roles.report)},
        "betas": result.betas,
        "train_pictures": len(roles.train),
        "chunks": result.chunk_count,
        "schedule": {"num_epochs": training.epochs, "batch_size": training.images_per_step},
        "epochs": [trial.epoch for trial in result.trials],
        "best_epochs": [trial.best_epoch for trial in result.trials],
        "seconds": result.seconds,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")},
    }


class _Fit:
    """A fit in progress: passes over the data, whose trials are saved while they are trained.

    Args:
        folder: the run folder. state: what ``resume.pt`` holds, with the trials of each pass under ``points`` (the
            pass that chooses) and ``again`` (the one on all images).
    """

    def __init__(self, store: FeatureStore, folder: Path, config: Config, state: dict[str, Any], device: torch.device):
        self._store = store
        self._folder = folder
        self._config = config
        self._state = state
        self._device = device
        self._saved = time.monotonic()

    def choose(self, roles: Roles) -> tuple[TrainingData, list[Trial]]:
        """Trains the members, and chooses the epoch of each on the validation images."""
        training = self._config.training
        if training.shuffle_pairs:
            say("a sanity check: every train image is fitted to the captions of another one")
        data, trials = self._start("points", roles)
        parameters = 0
        for trial in trials:
            parameters += sum(parameter.numel() for parameter in trial.heads.parameters() if parameter.requires_grad)
        say(
            f"fitting {parameters:,} parameters on {self._device}: {len(roles.train):,} images, "
            f"{len(data.captions):,} captions, chosen on {len(roles.selection):,} ({roles.selection_name}), to be "
            f"reported on {len(roles.report):,} ({roles.report_name})"
        )
        rest = len(self._store.image_ids) - len(roles.train) - len(roles.selection) - len(roles.report)
        if rest:
            say(f"images in no split, which take no part in the fit and can be searched: {rest:,}")
        self._train("points", data, trials, [training.epochs] * len(trials), validate=True)
        return data, trials

    def refit(self, roles: Roles, epochs: list[int]) -> list[DualHeads]:
        """The members' heads after so many epochs over all of ``roles.train``, without validation."""
        say(f"fitting again, on {len(roles.train):,} images, those of the validation split among them")
        data, trials = self._start("again", roles)
        self._train("again", data, trials, epochs, validate=False)
        return [trial.heads.cpu().eval() for trial in trials]

    @property
    def memory(self) -> int:
        """Bytes that the fit may take."""
        return self._state["memory"]

    def _start(self, name: str, roles: Roles) -> tuple[TrainingData, list[Trial]]:
        """The data and the trials of a pass, as they were saved or new. ``name``: ``points`` or ``again``."""
        training = self._config.training
        memory = self._feature_memory()
        data = TrainingData(self._store, roles, self._device, memory)
        if data.chunk_count > 1:
            size = f"{memory / 2**30:.1f} GiB"
            say(f"the features do not fit {size}: they are read in {data.chunk_count} shuffled chunks an epoch")
        if name == "again":  # its number of epochs is known
            training = dataclasses.replace(training, patience=0)
        config = dataclasses.replace(self._config, training=training)
        trials = [data.new_trial(config, member) for member in range(training.members)]
        if name in self._state:
            for trial, saved in zip(trials, self._state[name], strict=True):
                trial.restore(saved)
            epochs = sorted({trial.epoch for trial in trials})
            say(f"going on after {', '.join(f'epoch {epoch}' for epoch in epochs)}")
        return data, trials

    def _feature_memory(self) -> int:
        """Bytes that are left for features; ``base.memory.OVERHEAD`` has room for one member."""
        memory = self._state["memory"]
        members = self._config.training.members
        if members == 1:
            return memory
        other_members = (members - 1) * trial_memory(self._config, self._store.dims)
        if memory - other_members < MIN_MEMORY:
            raise TrainingError(
                f"{members} members take {(other_members + MIN_MEMORY) / 2**30:.1f} GiB at least; give so much "
                "--memory, or fit fewer (training.members)"
            )
        return memory - other_members

    def _train(self, name: str, data: TrainingData, trials: list[Trial], epochs: list[int], validate: bool) -> None:
        """Trains trials together up to their last epochs; ``validate``: as they go, which can end them early."""
        chunks, image_index = data.chunks_of(self._config)
        steps = steps_per_epoch(chunks, image_index, self._config.training)
        initial = sum(trial.epoch for trial in trials) * steps

        def is_unfinished(trial: Trial, last_epoch: int) -> bool:
            return trial.epoch < last_epoch and not (validate and trial.finished)

        unfinished = [pair for pair in zip(trials, epochs, strict=True) if is_unfinished(*pair)]
        if len({trial.epoch for trial, _ in unfinished}) > 1:
            raise TrainingError(
                f"{self._folder} holds a fit that was begun by a version which fitted members one after another; "
                "fit again with --force"
            )
        with ProgressBar("fit", "steps", total=sum(epochs) * steps, initial=initial) as bar:
            while unfinished:
                trained = [trial for trial, _ in unfinished]
                train_epochs(trained, chunks, image_index, trained[0].until_validation, bar.update)
                _check_finite(trained)
                shown = {"loss": f"{np.mean([trial.history[-1]['loss'] for trial in trained]):.3f}"}
                if validate:
                    rsums = [data.validate(trial, quality)["rsum"] for trial in trained]
                    shown["rsum"] = f"{np.mean(rsums):.1f}"
                    shown["best"] = f"{max(trial.best_rsum for trial in trials):.1f}"
                bar.show(**shown)
                unfinished = [pair for pair in unfinished if is_unfinished(*pair)]
                if len(unfinished) < len(trained) or time.monotonic() - self._saved >= SAVE_EVERY:
                    self._save(name, trials)

    def _save(self, name: str, trials: list[Trial]) -> None:
        self._state[name] = [trial.state() for trial in trials]
        checkpoint.save_resume(self._folder, self._state)
        if name == "points":
            checkpoint.save_history(self._folder, _history(trials))
        self._saved = time.monotonic()


def _check_finite(trials: Sequence[Trial]) -> None:
    """Refuses to go on with a loss that is not finite.

    Raises:
        TrainingError: there is one.
    """
    epochs = [trial.diverged for trial in trials if trial.diverged]
    if epochs:
        raise TrainingError(
            f"the loss is not finite in epoch {epochs[0]}; lower training.learning_rate or raise model.temperature"
        )


def _betas(heads: DualHeads | Ensemble, store: FeatureStore, roles: Roles) -> dict[str, float]:
    """The sharpness of the hubness correction, by ``image`` and ``text``, chosen on the validation images."""
    bank = bank_rows(roles.train)
    images = np.union1d(bank, roles.selection)
    bank_positions = np.searchsorted(images, bank)
    validation_positions = np.searchsorted(images, roles.selection)
    return fit_inverted_softmax(*embed(heads, store, images), bank_positions, validation_positions).betas


def _history(trials: Sequence[Trial]) -> list[dict]:
    """The rows of all histories, with the number of the member where there are several."""
    if len(trials) == 1:
        return trials[0].history
    rows = []
    for number, trial in enumerate(trials, 1):
        rows += [{"member": number, **row} for row in trial.history]
    return rows
