"""Sweeps: trains the trials of a grid together, many for the price of a few, and drops hopeless ones early.

A *trial* is a setting with a seed. Trials that see the same batches go through their epochs together
(``heads.stacking``), as many at a time as is fast and fits the memory. Each becomes what ``fit`` would make of it,
given half of the memory where features have to be read in chunks. A judge (``retrieval.leaderboard``) ranks the trials
by their embeddings of the validation images.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from onceover.base.errors import OnceoverError
from onceover.base.files import (
    FileError,
    digest,
    json_text,
    link_target,
    only_writer,
    read_record,
    sealed,
    visible_names,
    write_once,
    write_record,
)
from onceover.base.formats import SWEEP, SWEEP_FORMAT, SWEEP_VERSION, TRIALS, WORKERS
from onceover.base.memory import default_memory
from onceover.base.progress import ProgressBar, say, warn
from onceover.base.worker import Worker, WorkerError
from onceover.configs.schema import Config
from onceover.extract.encoding.devices import log_device
from onceover.extract.store import FeatureStore
from onceover.heads.chunks import MIN_MEMORY, memory_on
from onceover.heads.grid import Setting, trial_name
from onceover.heads.losses import LOSSES
from onceover.heads.stacking import train_epochs
from onceover.heads.training_data import TrainingData
from onceover.heads.trial_files import TrialFiles
from onceover.heads.trials import Trial, same_batches, trial_memory
from onceover.retrieval.leaderboard import Judge

RUNGS = (1 / 8, 1 / 4, 1 / 2)  # of all epochs, after which halving drops trials
KEPT = 1 / 4  # share of the settings that goes on from a rung, with all that cannot be told from the best
AT_ONCE = {"cpu": 8}  # trials; more in a stack are no faster there, and a kill costs those that are being trained
AT_ONCE_ELSEWHERE = 64


class SweepError(OnceoverError):
    """A grid that cannot be swept, or a folder that holds something else."""


def sweep(
    store: FeatureStore,
    folder: str | Path,
    settings: Sequence[Setting],
    judge: Judge,
    *,
    halving: bool = False,
    device: str | torch.device = "cpu",
    memory: int | None = None,
    cluster: "Cluster | None" = None,
) -> dict[str, dict]:
    """Trains every trial, or with ``halving`` those that stay promising; continues an interrupted sweep.

    With ``halving`` the first seed of each setting runs until a rung (``RUNGS``); the best share goes on, with all that
    cannot be told from the best. Of those that reach the end the best share, two at least, gets its other seeds; the
    others are ranked by their one seed. Each rung's decision is written down.

    Args:
        settings: complete, as ``heads.grid.schedule_all`` makes them.
        memory: bytes that features and heads may take, half each; by default half of the machine's. An interrupted
            sweep keeps its first limit.
        cluster: where the stacks of trials are trained; by default here.

    Returns:
        By name, of each trial that was begun: ``epochs``, ``best_epoch``, ``seconds``, ``history``, and ``outcome``:
        ``finished``, ``dropped`` or ``diverged``. The judge knows all but the diverged ones.

    Raises:
        SweepError: the folder holds another sweep, or something else; or settings that halving cannot compare.
    """
    folder = link_target(folder)
    trainings = [config.training for config in _all_configs(settings)]
    schedules = {(training.num_epochs, training.check_every, training.warmup) for training in trainings}
    grid = ""
    if halving:
        if len(schedules) > 1:
            raise SweepError(
                "--halving compares settings half-way; all need the same num_epochs, check_every and warmup: set "
                "training.num_epochs, which follows the batch size otherwise"
            )
        names = []
        for setting in settings:
            names.append([trial_name(config) for config in setting.configs])
        grid = digest(names)
    with only_writer(folder, "the sweep"):
        plan = _SweepPlan(folder, store, torch.device(device), memory or default_memory(), grid)
        elsewhere = None
        if cluster is not None:
            elsewhere = _Elsewhere(cluster, store.path.resolve(), folder.resolve(), torch.device(device), grid)
        work = _Sweep(store, plan, judge, torch.device(device), elsewhere)
        with work.bar:
            if halving:
                _halve(work, plan, settings)
            else:
                configs = _all_configs(settings)
                work.add_epochs(configs)
                work.run(configs)
        work.check_files()
        _end_sharing(folder)
        return work.results


@dataclasses.dataclass(frozen=True)
class SweepShare:
    """The outcome of a worker of a sweep.

    Attributes:
        worker: which one. trained: how many trials this call trained.
        left: how many trials are not done yet, by the number of the worker; only of workers that have some.
    """

    worker: Worker
    trained: int
    left: dict[int, int]


def sweep_share(
    store: FeatureStore,
    folder: str | Path,
    settings: Sequence[Setting],
    worker: Worker,
    *,
    device: str | torch.device = "cpu",
    memory: int | None = None,
) -> SweepShare:
    """Trains a worker's share of a sweep's trials: every N-th stack of those that are trained together.

    All workers are given the same grid. Any number of them may run at once, on machines that share the folder, and
    again after they were killed; ``sweep`` ends the sweep. As in an extraction, no lock is needed.

    Args:
        settings: as for ``sweep``.
        memory: as for it, too; the first worker's limit holds for all.

    Raises:
        SweepError: the folder holds another sweep, or something else. WorkerError: other workers share it.
    """
    folder = link_target(folder)
    configs = _all_configs(settings)
    plan = _SweepPlan(folder, store, torch.device(device), memory or default_memory(), "")
    names = sorted(map(trial_name, configs))
    if not all((folder / TRIALS / f"{name}.json").exists() for name in names):
        _share(folder, worker, digest(names))
    work = _Sweep(store, plan, Judge(), torch.device(device))
    stacks = list(work.stacks(configs, worker.count))
    known = sum(map(work.has_result, configs))
    say(f"worker {worker}: {len(worker.own(stacks)):,} of {len(stacks):,} stacks of trials; {known:,} trials are there")
    trained = 0
    with work.bar:
        for stack in worker.own(stacks):
            trained += sum(not work.has_result(config) for config in stack)
            work.add_epochs(stack)
            work.run(stack)
    left = {}
    for number in range(1, worker.count + 1):
        of_worker = itertools.chain.from_iterable(Worker(number, worker.count).own(stacks))
        missing = sum(not work.has_result(config) for config in of_worker)
        if missing:
            left[number] = missing
    return SweepShare(worker, trained, left)


def _share(folder: Path, worker: Worker, grid: str) -> None:
    """Writes down, where nobody has yet, how many workers share a sweep of which grid; refuses another one.

    Raises:
        WorkerError: the sweep is shared by another number of workers, or by workers of another grid.
    """
    record = {"workers": worker.count, "grid": grid}
    write_once(folder / WORKERS, json_text(sealed(record)).encode())
    shared = read_record(folder / WORKERS, "the number of workers")
    if shared["workers"] != worker.count:
        raise WorkerError(
            f"{folder} is shared by {shared['workers']} workers, and this is worker {worker}; start workers "
            f"1/{shared['workers']} to {shared['workers']}/{shared['workers']}, or go on without --worker"
        )
    if shared != record:
        raise WorkerError(
            f"{folder} is shared by workers of another grid; give this one the command of the others, go on without "
            "--worker, or name a new folder"
        )


def _end_sharing(folder: Path) -> None:
    """Removes what ``_share`` wrote down, so that other workers may share another grid; no file of somebody else's."""
    path = folder / WORKERS
    if not path.exists():
        return
    try:
        is_own = read_record(path, "the number of workers").keys() == {"workers", "grid"}
    except FileError:
        is_own = False
    if is_own:
        path.unlink(missing_ok=True)
    else:
        warn(
            f"{path} is damaged, or not this program's, and is left as it is; remove it before workers share a sweep "
            "here"
        )


def _all_configs(settings: Sequence[Setting]) -> list[Config]:
    """The configurations of all trials.

    Raises:
        RegistryError: one has an unknown loss.
    """
    configs = [config for setting in settings for config in setting.configs]
    for name in sorted({config.training.loss for config in configs}):
        LOSSES.load(name)
    return configs


def _halve(work: "_Sweep", plan: "_SweepPlan", settings: Sequence[Setting]) -> None:
    """Trains the first seed of each setting from rung to rung, then the other seeds of the best ones."""
    configs = [setting.configs[0] for setting in settings]
    work.add_epochs(configs)
    for number, end in enumerate(_rungs(configs[0])):
        configs = work.rung(configs, plan, number, end)
    finished = [name for name in map(trial_name, configs) if work.results[name]["outcome"] == "finished"]
    best = set(work.judge.best(finished, max(2, math.ceil(KEPT * len(finished)))))
    other_seeds: list[Config] = []
    for setting in settings:
        if trial_name(setting.configs[0]) in best:
            other_seeds += setting.configs[1:]
    work.add_epochs(other_seeds)
    work.run(other_seeds)


class Cluster(Protocol):
    """Machines to which work is handed, as ``extract.engines.ray`` has them."""

    def actors(self, device: torch.device) -> int:
        """How many of its processes work at a time."""

    def spread(
        self, work: Callable[[tuple[list[Config], int | None]], list[Config]], units: Sequence, device: torch.device
    ) -> Iterator[list[Config]]:
        """The results of some work, which can be pickled, on each unit, in whatever order."""


class _Elsewhere:
    """Has stacks of trials trained by a cluster, whose nodes share the store and the folder of the sweep."""

    def __init__(self, cluster: Cluster, store: Path, folder: Path, device: torch.device, grid: str):
        self._cluster = cluster
        self._train = _Training(store, folder, device.type, grid)
        self._device = device

    @property
    def processes(self) -> int:
        """How many stacks are trained at a time."""
        return self._cluster.actors(self._device)

    def train(self, stacks: Sequence[list[Config]], end: int | None) -> Iterator[list[Config]]:
        """Has stacks trained up to the epoch ``end``, or to their end; gives each when it is done."""
        return self._cluster.spread(self._train, [(stack, end) for stack in stacks], self._device)


class _Training:
    """Trains stacks of trials of a sweep that another process began. It can be pickled."""

    def __init__(self, store: Path, folder: Path, device: str, grid: str):
        self._store = store
        self._folder = folder
        self._device = device
        self._grid = grid
        self._sweep: _Sweep | None = None

    def __call__(self, task: tuple[list[Config], int | None]) -> list[Config]:
        if self._sweep is None:
            store = FeatureStore(self._store)
            device = torch.device(self._device)
            plan = _SweepPlan(self._folder, store, device, default_memory(), self._grid)
            self._sweep = _Sweep(store, plan, Judge(), device)
        stack, end = task
        self._sweep.run(stack, end)
        return stack


class _SweepPlan:
    """``sweep.json``: the features and the grid that a sweep's folder is of, and the decisions of halving so far.

    Args:
        memory: the limit of a new sweep, in bytes.
        grid: digest of the grid with halving; empty without.

    Attributes:
        folder: of the sweep.
        fingerprints: of the features.
        memory: the limit that the sweep was begun with.
        rungs: the names of the trials that went on from each rung.

    Raises:
        SweepError: the folder holds another sweep, or something else.
    """

    def __init__(self, folder: Path, store: FeatureStore, device: torch.device, memory: int, grid: str):
        self.folder = folder
        self._path = folder / SWEEP
        record = {
            "format": SWEEP_FORMAT,
            "format_version": SWEEP_VERSION,
            "fingerprints": store.fingerprints,
            "halving": grid,
        }
        if self._path.exists():
            self._record = self._read(record)
        else:
            memory = memory_on(device, memory)
            self._begin(record | {"store": str(store.path.resolve()), "memory": memory, "rungs": []})
            self._record = self._read(record)
        self.fingerprints: dict[str, str] = self._record["fingerprints"]
        self.memory: int = self._record["memory"]
        self.rungs: list[list[str]] = self._record["rungs"]

    def _begin(self, record: dict) -> None:
        """Writes the record into the folder, which is made or empty, unless another worker was first.

        Raises:
            SweepError: something else is in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if visible_names(self.folder) and not self._path.exists():
            raise SweepError(f"{self.folder} is not empty and no sweep; name a new folder")
        write_once(self._path, json_text(sealed(record)).encode())

    def _read(self, expected: dict) -> dict:
        """Reads the record of a sweep that goes on.

        Raises:
            SweepError: it is not as expected.
        """
        record = read_record(self._path, "the sweep", strict=False)
        if any(record.get(key) != expected[key] for key in ("format", "format_version", "fingerprints")):
            raise SweepError(f"{self.folder} holds a sweep of other features or of another version; name a new folder")
        record = read_record(self._path, "the sweep")
        if record["halving"] != expected["halving"]:
            raise SweepError(
                f"{self.folder} holds a sweep of another grid with --halving, or without; settings that were dropped "
                "cannot be taken up again: name a new folder"
            )
        return record

    def add_rung(self, names: list[str]) -> None:
        """Writes down the trials that go on from a rung."""
        self.rungs.append(names)
        write_record(self._path, self._record)


class _Sweep:
    """A sweep in progress.

    Attributes:
        results: how each trial ended, by name.
        bar: the progress, in epochs.
    """

    def __init__(
        self,
        store: FeatureStore,
        plan: _SweepPlan,
        judge: Judge,
        device: torch.device,
        elsewhere: _Elsewhere | None = None,
    ):
        self.judge = judge
        self._elsewhere = elsewhere
        self.results: dict[str, dict] = {}
        self.bar = ProgressBar("sweep", "epochs", total=0)
        self._device = device
        log_device(device)
        self._best_rsum = 0.0
        self._files = TrialFiles(plan.folder / TRIALS, judge, plan.fingerprints)
        roles = store.roles()
        feature_memory = max(MIN_MEMORY, plan.memory // 2)
        self._data = TrainingData(store, roles, device, feature_memory)
        self._trial_memory = plan.memory - feature_memory
        say(
            f"sweeping on {device}: {len(roles.train):,} train images, chosen on "
            f"{len(roles.selection):,} ({roles.selection_name})"
        )

    def add_epochs(self, configs: Sequence[Config]) -> None:
        """Adds the epochs of trials to the total of the progress bar."""
        self.bar.add_total(sum(config.training.epochs for config in configs))

    def check_files(self) -> None:
        """Checks that the results of all trials are still in the folder.

        Raises:
            SweepError: somebody removed some.
        """
        missing = [name for name in self.results if not self._files.has_result(name)]
        if missing:
            raise SweepError(
                f"{self._files.folder} lost the results of {len(missing)} trials while others were fitted; run the "
                "same sweep again, and they are fitted anew"
            )

    def rung(self, configs: list[Config], plan: _SweepPlan, number: int, end: int) -> list[Config]:
        """Trains trials up to a rung and drops those that are behind; a decision that was written down stands.

        Args:
            number: of the rung, from 0. end: its epoch.

        Returns:
            The trials that go on.
        """
        if not configs:  # all have diverged
            return []
        names = [trial_name(config) for config in configs]
        if number == len(plan.rungs):
            self.run(configs, end)
            sound = [name for name in names if self.results.get(name, {}).get("outcome") != "diverged"]
            plan.add_rung(self.judge.contenders(sound, KEPT))
            say(f"after {end} epochs {len(plan.rungs[-1])} of {len(names)} settings are still in the race")
        contenders = set(plan.rungs[number])
        if end < configs[0].training.epochs:
            self._drop([config for config in configs if trial_name(config) not in contenders], end)
        else:
            self.run(configs)  # known results stay; those that somebody removed are fitted again
        return [config for config in configs if trial_name(config) in contenders]

    def _drop(self, configs: list[Config], end: int) -> None:
        """Gives trials up that are behind at the epoch ``end``."""
        behind = [config for config in configs if not self._is_known(config)]
        self.run([config for config in behind if not self._files.is_waiting(config)], end)  # removed by someone
        for config in behind:
            if trial_name(config) not in self.results:
                state = self._files.read_state(config)
                assert state is not None, "the trial was trained up to the rung"
                self._end(config, state, "dropped")

    def run(self, configs: Iterable[Config], end: int | None = None) -> None:
        """Trains trials up to the epoch ``end``, or to their end; those with a result already stay as they are."""
        unknown = [config for config in configs if not self._is_known(config)]
        if self._elsewhere is not None:
            self._run_elsewhere(self._elsewhere, unknown, end)
            return
        for stack in self.stacks(unknown):
            trials = sorted((self._load_trial(config) for config in stack), key=_epoch)
            for _, equally_far in itertools.groupby(trials, _epoch):
                self._train_together(list(equally_far), end)

    def _run_elsewhere(self, elsewhere: _Elsewhere, configs: Sequence[Config], end: int | None) -> None:
        """Has trials trained by a cluster, and reads what became of them."""
        stacks = list(self.stacks(configs, elsewhere.processes))
        say(f"{len(configs):,} trials in {len(stacks):,} stacks, {elsewhere.processes} at a time")
        for stack in elsewhere.train(stacks, end):
            for config in stack:
                if not self._is_known(config):
                    self._files.read_state(config)  # of a trial that waits the judge needs the ranks
            self.bar.show(trials=len(self.results))

    def stacks(self, configs: Sequence[Config], workers: int = 1) -> Iterator[list[Config]]:
        """The trials in stacks that are trained together, not larger than what each of so many workers has to do."""
        share = math.ceil(len(configs) / workers)
        for _, group in itertools.groupby(sorted(configs, key=_training_order), _company):
            waiting = list(group)
            while waiting:
                count = min(share, self._at_once(waiting))
                yield waiting[:count]
                waiting = waiting[count:]

    def has_result(self, config: Config) -> bool:
        """Whether the result of a trial is in the folder."""
        return self._files.has_result(trial_name(config))

    def _train_together(self, trials: list[Trial], end: int | None) -> None:
        """Trains trials that are equally far, validates them when ``fit`` would, and saves those that are to wait."""
        chunks, image_index = self._data.chunks_of(trials[0].config)
        end = end or trials[0].config.training.epochs
        while trials and trials[0].epoch < end:
            epochs = trials[0].until_validation
            train_epochs(trials, chunks, image_index, epochs)
            self.bar.update(epochs * len(trials))
            for trial in trials:
                if not self._validate(trial):
                    self._end(trial.config, trial.state(), "diverged")
                elif trial.finished:
                    self._end(trial.config, trial.state(), "finished")
                self._best_rsum = max(self._best_rsum, trial.best_rsum)
            trials = [trial for trial in trials if trial_name(trial.config) not in self.results]
            self.bar.show(trials=len(self.results), best=f"{self._best_rsum:.1f}")
        for trial in trials:
            self._files.write_state(trial.config, trial.state())

    def _validate(self, trial: Trial) -> bool:
        """Validates a trial; False where it has diverged."""
        if trial.diverged:
            return False
        measure = partial(self.judge.measure, trial_name(trial.config))
        try:
            self._data.validate(trial, measure)
        except OnceoverError as error:  # embeddings without direction, or not finite
            warn(f"a setting is given up: {error}")
            return False
        return True

    def _end(self, config: Config, state: dict, outcome: str) -> None:
        """Writes down how a trial ended."""
        self.results[trial_name(config)] = self._files.write_result(config, state, outcome)
        self.bar.update(config.training.epochs - state["epoch"])

    def _is_known(self, config: Config) -> bool:
        """Whether a trial has a result, of this call or of one that was interrupted."""
        name = trial_name(config)
        if name not in self.results and self._files.has_result(name):
            self.results[name] = self._files.read_result(config)
            self.bar.update(config.training.epochs)
        return name in self.results

    def _load_trial(self, config: Config) -> Trial:
        """A trial at its start, or as it was saved."""
        trial = self._data.new_trial(config)
        state = self._files.read_state(config)
        if state:
            trial.restore(state)
        return trial

    def _at_once(self, configs: Sequence[Config]) -> int:
        """How many of the trials, in their order, are trained together: as many as is fast and fits the memory."""
        limit = AT_ONCE.get(self._device.type, AT_ONCE_ELSEWHERE)
        used = 0
        for number, config in enumerate(configs[:limit]):
            used += trial_memory(config, self._data.dims)
            if used > self._trial_memory:
                return max(1, number)
        return min(limit, len(configs))


def _rungs(config: Config) -> list[int]:
    """The epochs at which halving decides, which are epochs with a validation; the last one is the end.

    With 20 epochs and a validation every 3: 3, 6, 12, 20.
    """
    total = config.training.epochs
    every = config.training.check_every
    return sorted({min(total, math.ceil(share * total / every) * every) for share in (*RUNGS, 1)})


def _company(config: Config) -> tuple:
    """The settings in which trials must agree to be trained together."""
    training = config.training
    return *same_batches(config), training.num_epochs, training.check_every


def _training_order(config: Config) -> tuple:
    """Sorts trials that are trained together side by side, and among them those of one shape."""
    return _company(config), dataclasses.astuple(config.model), dataclasses.astuple(config.training)


def _epoch(trial: Trial) -> int:
    return trial.epoch
