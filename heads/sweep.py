"""Many fits for the price of a few: the points of a grid are trained together, and hopeless ones are dropped early.

A *trial* is one setting with one seed. Trials that see the same batches go through their epochs together
(``heads.stacking``), as many at a time as pay and fit the memory; what comes of each is what ``fit`` would make of it,
given half of the memory where features have to be read in chunks.
A judge (``retrieval.leaderboard``) ranks the trials by their embeddings of the validation images.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from onceover.base.errors import OnceoverError
from onceover.base.files import FileError, digest, file_sha256, only_writer, read_record, remove_asides, write_record
from onceover.base.formats import SWEEP, SWEEP_FORMAT, SWEEP_VERSION, TRIALS
from onceover.base.memory import default_memory
from onceover.configs.schema import Config, ConfigError, load_config
from onceover.extract.store import FeatureStore
from onceover.heads.checkpoint import load_state, save_state
from onceover.heads.chunks import MIN_MEMORY, memory_on
from onceover.heads.losses import LOSSES
from onceover.heads.stacking import Point, advance, bytes_of_point, same_steps
from onceover.heads.training import Data
from onceover.retrieval.leaderboard import Judge

_NO_AXES = {
    "training.seed": "say how many seeds with --seeds",
    "training.members": "a sweep ranks single pairs of heads",
    "training.cca": "a sweep ranks single pairs of heads",
    "training.refit": "the validation images rank the settings, so no trial is fitted with them; set it for fit",
    "model.rerank": "it changes nothing in the heads; evaluate compares the ways with --rerank",
}
MAX_SETTINGS = 100_000
RUNGS = (1 / 8, 1 / 4, 1 / 2)  # of all epochs, after which halving drops trials
KEPT = 1 / 4  # of the settings, at a rung; and whatever cannot be told from the best
AT_ONCE = {"cpu": 8}  # trials; more in a stack bring nothing there, and a kill costs those that are under way
AT_ONCE_ELSEWHERE = 64
_PARKED = ".pt"  # the state of a trial that waits


class SweepError(OnceoverError):
    """A grid that cannot be swept, or a folder that holds something else."""


class Setting(NamedTuple):
    """A point of the grid: the values that it stands for, by key, and a configuration for each seed."""

    values: dict[str, object]
    configs: list[Config]


def expand(
    config_file: Path | None, overrides: Sequence[str], grid: Sequence[str], seeds: int, sample: int | None = None
) -> list[Setting]:
    """The settings of a grid, in its order.

    Args:
        grid: ``key=v1,v2,…``, each key once. seeds: of each setting, counted up from ``training.seed``.
        sample: how many settings to draw of all, at random, the same ones each time.

    Raises:
        ConfigError: a key or value that does not exist, a key given twice, or one that a grid cannot hold.
    """
    axes: dict[str, list[str]] = {}
    for axis in grid:
        key, separator, text = axis.partition("=")
        key, values = key.strip(), [value.strip() for value in text.split(",")]
        if not separator or not all(values):
            raise ConfigError(f"{axis!r} is no axis of a grid; write key=v1,v2, for example model.temperature=0.05,0.1")
        if key in axes:
            raise ConfigError(f"{key} stands in the grid twice; give it all its values at once")
        if key in _NO_AXES:
            raise ConfigError(f"{key} is no axis of a grid; {_NO_AXES[key]}")
        if key.startswith("extract."):
            raise ConfigError(f"{key} changes the features; make a store for each value, and sweep each")
        if key.startswith("finetune."):
            raise ConfigError(f"{key} changes nothing in heads that a sweep fits; use settings of model or training")
        axes[key] = values
    if not axes:
        raise ConfigError("the grid is empty; name at least one axis: --grid model.temperature=0.03,0.05,0.07")
    size = math.prod(len(values) for values in axes.values())
    if size > MAX_SETTINGS:
        raise ConfigError(f"the grid has {size:,} settings; at most {MAX_SETTINGS:,} are swept: name fewer values")
    points = list(itertools.product(*axes.values()))
    if sample is not None and sample < len(points):
        points = [points[number] for number in sorted(np.random.default_rng(0).permutation(len(points))[:sample])]
    settings = []
    for point in points:
        base = load_config(
            config_file, [*overrides, *(f"{key}={value}" for key, value in zip(axes, point, strict=True))]
        )
        plain = base.to_dict()
        values = {key: plain[key.partition(".")[0]][key.partition(".")[2]] for key in axes}
        first = base.training.seed
        if base.training.members > 1 or base.training.cca:
            raise ConfigError("a sweep ranks single pairs of heads; leave training.members at 1 and training.cca false")
        several = (dataclasses.replace(base.training, seed=seed) for seed in range(first, first + seeds))
        setting = Setting(values, [dataclasses.replace(base, training=training) for training in several])
        if setting not in settings:  # 0.1 and 0.10 are one
            settings.append(setting)
    return settings


def trial_name(config: Config) -> str:
    """What a trial goes by: a digest of the settings that heads depend on."""
    plain = config.to_dict()
    return digest([plain["model"], plain["training"]])[:16]


def sweep(
    store: FeatureStore,
    folder: str | Path,
    settings: Sequence[Setting],
    judge: Judge,
    *,
    halving: bool = False,
    device: str | torch.device = "cpu",
    memory: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, dict]:
    """Trains every trial, or with ``halving`` those that stay promising; goes on where an interrupted sweep stopped.

    With ``halving`` the first seed of each setting runs until a rung (``RUNGS``); the best share goes on, with all that
    cannot be told from the best. Of those that reach the end the best share, two at least, gets its other seeds; the
    others stand as what one seed showed. Each rung's decision is written down.

    Args:
        memory: bytes that features and heads may take, half each; by default half of the machine's. An interrupted
            sweep goes on with what it was begun with.

    Returns:
        By name, of each trial that was begun: ``epochs``, ``best_epoch``, ``seconds``, ``history``, and ``outcome``:
        ``finished``, ``dropped`` or ``diverged``. The judge knows all but the diverged ones.

    Raises:
        SweepError: the folder holds another sweep, or something else; or settings that halving cannot compare.
    """
    trainings = [config.training for setting in settings for config in setting.configs]
    for name in sorted({training.loss for training in trainings}):
        LOSSES.load(name)  # an unknown one is refused before anything is written
    if halving and len({(one.num_epochs, one.check_every, one.warmup) for one in trainings}) > 1:
        raise SweepError("--halving compares settings half-way; all need the same num_epochs, check_every and warmup")
    grid = digest([[trial_name(config) for config in setting.configs] for setting in settings]) if halving else ""
    with only_writer(Path(folder), "the sweep"):
        work = _Sweep(store, Path(folder), judge, torch.device(device), memory or default_memory(), grid, say)
        first = [setting.configs[0] for setting in settings]
        total = sum(config.training.num_epochs for config in first) * (1 if halving else len(settings[0].configs))
        with tqdm(total=total, unit=" epochs", desc="sweep", disable=None) as work.bar:
            if not halving:
                work.run([config for setting in settings for config in setting.configs])
                work.check_files()
                return work.results
            for number, end in enumerate(_rungs(first[0])):
                first = work.rung(first, number, end)
            sound = [name for config in first if work.results[name := trial_name(config)]["outcome"] == "finished"]
            chosen = set(judge.best(sound, max(2, math.ceil(KEPT * len(sound)))))
            others = [one for each in settings if trial_name(each.configs[0]) in chosen for one in each.configs[1:]]
            work.bar.total += sum(config.training.num_epochs for config in others)
            work.run(others)
        work.check_files()
        return work.results


class _Sweep:
    """A sweep under way: what has become of which trial, in memory and in the folder."""

    def __init__(
        self, store: FeatureStore, folder: Path, judge: Judge, device: torch.device, memory: int, grid: str, say
    ):
        self._folder, self._judge, self._device, self._say = folder / TRIALS, judge, device, say
        roles = store.roles()
        self.results: dict[str, dict] = {}
        self._best = 0.0
        self.bar = tqdm(disable=True)
        self._path, made = folder / SWEEP, {"format": SWEEP_FORMAT, "format_version": SWEEP_VERSION}
        made |= {"fingerprints": store.fingerprints, "halving": grid}
        if self._path.exists():
            self._request = read_record(self._path, "the sweep", strict=False)
            if any(self._request.get(key) != made[key] for key in ("format", "format_version", "fingerprints")):
                raise SweepError(f"{folder} holds a sweep of other features or of another version; name a new folder")
            self._request = read_record(self._path, "the sweep")
            if self._request["halving"] != grid:
                raise SweepError(
                    f"{folder} holds a sweep of another grid with --halving, or without; settings that were dropped "
                    "cannot be taken up again: name a new folder"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise SweepError(f"{folder} is not empty and no sweep; name a new folder")
        else:
            memory = memory_on(device, memory)
            self._request = made | {"store": str(store.path.resolve()), "memory": memory, "rungs": []}
            write_record(self._path, self._request)
        if self._folder.is_dir():
            remove_asides(self._folder)
        memory = self._request["memory"]
        for_features = max(MIN_MEMORY, memory // 2)
        self._data, self._memory = Data(store, roles, device, for_features), memory - for_features
        say(
            f"sweeping on {device}: {len(roles.train):,} train images, chosen on "
            f"{len(roles.selection):,} ({roles.selection_name})"
        )

    def check_files(self) -> None:
        """Sees that the results of all trials are still in the folder.

        Raises:
            SweepError: somebody removed some.
        """
        missing = [name for name in self.results if not (self._folder / f"{name}.json").is_file()]
        if missing:
            raise SweepError(
                f"{self._folder} lost the results of {len(missing)} trials while others were fitted; run the same "
                "sweep again, and they are fitted anew"
            )

    def rung(self, configs: list[Config], number: int, end: int) -> list[Config]:
        """Brings trials to an epoch, and drops what is behind; what was decided before stands."""
        if not configs:  # all have diverged
            return []
        decided, names = self._request["rungs"], [trial_name(config) for config in configs]
        if number == len(decided):
            self.run(configs, end)
            sound = [name for name in names if self.results.get(name, {}).get("outcome") != "diverged"]
            decided.append(self._judge.contenders(sound, KEPT))
            write_record(self._path, self._request)
            self._say(f"after {end} epochs {len(decided[-1])} of {len(names)} settings are still in the race")
        chosen = set(decided[number])
        if end < configs[0].training.num_epochs:
            behind = [one for one, name in zip(configs, names, strict=True) if name not in chosen]
            behind = [config for config in behind if not self._known(config)]
            self.run([config for config in behind if not self._file(config).exists()], end)  # removed by someone
            for config in behind:
                self._end(config, "dropped")
        else:
            self.run(configs)  # what is known stays as it is; results that somebody removed are made again
        return [config for config, name in zip(configs, names, strict=True) if name in chosen]

    def run(self, configs: Iterable[Config], end: int | None = None) -> None:
        """Brings trials to an epoch, or to their end; those that are done already stay as they are."""
        waiting = sorted((config for config in configs if not self._known(config)), key=_order)
        for _, alike in itertools.groupby(waiting, _company):
            alike = list(alike)
            while alike:
                most = self._at_once(alike)
                points, alike = [self._point(config) for config in alike[:most]], alike[most:]
                for _, abreast in itertools.groupby(sorted(points, key=_epoch), _epoch):
                    self._run_together(list(abreast), end)

    def _end(self, config: Config, outcome: str, point: Point | None = None) -> None:
        """Writes down what has become of a trial."""
        name = trial_name(config)
        if name in self.results:
            return
        last = point.state() if point else self._parked(config)
        result = self._origin(config) | {"outcome": outcome, "epochs": last["epoch"], "best_epoch": last["best_epoch"]}
        result["seconds"] = sum(row["seconds"] for row in last["history"])
        result["history"] = [row for row in last["history"] if math.isfinite(row["loss"])]
        if outcome != "diverged":
            ranks = self._folder / f"{name}.npz"
            self._judge.save(name, ranks, digest(self._origin(config)))
            result["ranks_sha256"] = file_sha256(ranks)
        write_record(self._folder / f"{name}.json", result)
        self._file(config).unlink(missing_ok=True)
        self.results[name] = result
        self.bar.update(config.training.num_epochs - last["epoch"])

    def _known(self, config: Config) -> bool:
        """Whether a trial is done, in this sweep or before it was interrupted."""
        name = trial_name(config)
        if name not in self.results and (self._folder / f"{name}.json").exists():
            self.results[name] = self._finished(config)
            self.bar.update(config.training.num_epochs)
        return name in self.results

    def _origin(self, config: Config) -> dict:
        """The trial and the features that a trial's files are of, by which files of another one are refused."""
        return {"trial": trial_name(config), "fingerprints": self._request["fingerprints"]}

    def _is_of(self, config: Config, record: dict) -> bool:
        """Whether a trial's file is of the trial that it is named after; earlier versions did not write it down."""
        return all(record.get(key, value) == value for key, value in self._origin(config).items())

    def _finished(self, config: Config) -> dict:
        """The result of a trial that is done, whose ranks the judge remembers again.

        Raises:
            SweepError: a file that is missing, of another trial, or not as it was written.
        """
        name = trial_name(config)
        ranks = self._folder / f"{name}.npz"
        try:
            result = read_record(self._folder / f"{name}.json", "a trial")
            if not self._is_of(config, result):
                raise FileError(f"{self._folder / name}.json is of another trial, or of other features")
            if result["outcome"] == "diverged":
                return result
            if file_sha256(ranks) != result["ranks_sha256"]:
                raise FileError(f"{ranks} does not match the digest in its .json")
        except (OSError, FileError) as error:
            raise SweepError(
                f"{error}; remove all files {self._folder / name}.* and sweep again: that trial is then fitted anew"
            ) from error
        self._judge.load(name, ranks, digest(self._origin(config)))
        return result

    def _run_together(self, points: list[Point], end: int | None) -> None:
        """Trains points that have come equally far, looking at them when ``fit`` would, and parks what is left."""
        dealt, end = self._data.dealt(points[0].config), end or points[0].config.training.num_epochs
        while points and points[0].epoch < end:
            epochs = points[0].until_check
            advance(points, *dealt, epochs)
            self.bar.update(epochs * len(points))
            for point in points:
                measure = partial(self._judge.measure, trial_name(point.config))
                try:
                    sound = not point.diverged and bool(self._data.check(point, measure))
                except OnceoverError as error:  # embeddings without direction, or not finite
                    self._say(f"a setting is given up: {error}")
                    sound = False
                if not sound:
                    self._end(point.config, "diverged", point)
                elif point.finished:
                    self._end(point.config, "finished", point)
                self._best = max(self._best, point.best_rsum)
            points = [point for point in points if trial_name(point.config) not in self.results]
            self.bar.set_postfix(trials=len(self.results), best=f"{self._best:.1f}")
        for point in points:
            self._park(point)

    def _park(self, point: Point) -> None:
        name = trial_name(point.config)
        self._judge.save(name, self._folder / f"{name}.npz", digest(self._origin(point.config)))
        save_state(self._file(point.config), point.state() | self._origin(point.config))

    def _point(self, config: Config) -> Point:
        """A trial at its start, or where it was parked."""
        point, state = self._data.point(config), self._parked(config)
        if state:
            point.restore(state)
        return point

    def _parked(self, config: Config) -> dict | None:
        """The state of a trial that waits, whose worth is remembered again."""
        name, parked = trial_name(config), self._file(config)
        if not parked.exists():
            return None
        self._judge.load(name, self._folder / f"{name}.npz", digest(self._origin(config)))
        try:
            state = load_state(parked)
            if not self._is_of(config, state):
                raise ValueError("it is of another trial, or of other features")
        except ValueError as error:
            raise SweepError(
                f"{parked} cannot be gone on with ({error}); remove all files {parked.with_suffix('.*')} and sweep "
                "again: that trial is then fitted anew"
            ) from error
        return state

    def _file(self, config: Config) -> Path:
        return self._folder / f"{trial_name(config)}{_PARKED}"

    def _at_once(self, configs: Sequence[Config]) -> int:
        """How many of the trials, in their order, are trained together: as many as pay and fit the memory."""
        most, taken = AT_ONCE.get(self._device.type, AT_ONCE_ELSEWHERE), 0
        for number, config in enumerate(configs[:most]):
            taken += bytes_of_point(config, self._data.dims)
            if taken > self._memory:
                return max(1, number)
        return min(most, len(configs))


def _rungs(config: Config) -> list[int]:
    """The epochs at which halving decides, at which heads are looked at anyway; the last one is the end."""
    whole, every = config.training.num_epochs, config.training.check_every
    return sorted({min(whole, math.ceil(share * whole / every) * every) for share in (*RUNGS, 1)})


def _company(config: Config) -> tuple:
    """What trials have to agree in to be trained together."""
    training = config.training
    return *same_steps(config), training.num_epochs, training.check_every


def _order(config: Config) -> tuple:
    """Trials that are trained together side by side, and among them those of one shape."""
    return _company(config), dataclasses.astuple(config.model), dataclasses.astuple(config.training)


def _epoch(point: Point) -> int:
    return point.epoch
