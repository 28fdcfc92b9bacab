"""Many fits for the price of a few: the points of a grid are trained together, and hopeless ones are dropped early.

A *trial* is one setting with one seed. Trials that see the same batches go through their epochs together
(``heads.stacking``), as many at a time as pay and fit the memory; what comes of each is what ``fit`` would make of it.
What a trial's heads are worth is told by a judge that is passed in, from their embeddings of the selection pictures.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from configs import OnceoverError
from configs.formats import SWEEP, TRIALS
from configs.schema import Config, ConfigError, load_config
from extract.files import digest, only_writer, read_json, whole_file, write_json
from extract.memory import default_memory
from extract.store import FeatureStore, Roles
from heads.embed import embed
from heads.stacking import Point, advance, same_batches
from heads.training import Data

RUNGS = (1 / 8, 1 / 2)  # of all epochs, after which halving drops trials
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


class Judge(Protocol):
    """Tells what heads are worth. Trials are known by their names."""

    def measure(self, trial: str, images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> dict:
        """Ranks the selection pictures' embeddings and remembers the trial's best; a report with "rsum"."""

    def save(self, trial: str, path: Path) -> None:
        """Writes what is remembered of a trial."""

    def load(self, trial: str, path: Path) -> None:
        """Remembers it again."""

    def contenders(self, trials: Sequence[str], share: float) -> list[str]:
        """The best share of the trials, and all others that cannot be told from the best one."""


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
        if key == "training.seed":
            raise ConfigError("training.seed is no axis of a grid; say how many seeds with --seeds")
        if key.startswith("extract."):
            raise ConfigError(f"{key} changes the features; make a store for each value, and sweep each")
        axes[key] = list(dict.fromkeys(values))
    if not axes:
        raise ConfigError("the grid is empty; name at least one axis: --grid model.temperature=0.03,0.05,0.07")
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
        several = (dataclasses.replace(base.training, seed=seed) for seed in range(first, first + seeds))
        settings.append(Setting(values, [dataclasses.replace(base, training=training) for training in several]))
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
    a paired comparison over the selection pictures cannot tell from the best. What is left at the end gets its other
    seeds.

    Args:
        memory: bytes that features and heads may take; by default half of the machine's.

    Returns:
        By name, of each trial that was begun: ``epochs``, ``best_epoch``, ``seconds``, ``history``, and ``outcome``:
        ``finished``, ``dropped`` or ``diverged``. The judge knows all but the diverged ones.

    Raises:
        SweepError: the folder holds another sweep, or something else.
    """
    with only_writer(Path(folder), "the sweep"):
        work = _Sweep(store, Path(folder), judge, torch.device(device), memory or default_memory(), say)
        total = sum(config.training.num_epochs for setting in settings for config in setting.configs)
        with tqdm(total=total, unit=" epochs", desc="sweep", disable=None) as work.bar:
            if not halving:
                work.run([config for setting in settings for config in setting.configs])
                return work.results
            alive = [setting.configs for setting in settings]
            for share in (*RUNGS, 1.0):
                work.run([configs[0] for configs in alive], share)
                names = [trial_name(configs[0]) for configs in alive]
                sound = [name for name in names if work.results.get(name, {}).get("outcome") != "diverged"]
                chosen = set(judge.contenders(sound, KEPT))
                for configs, name in zip(alive, names, strict=True):
                    if share < 1 and name not in chosen:
                        work.end(configs[0], "dropped")
                alive = [configs for configs, name in zip(alive, names, strict=True) if name in chosen]
                say(f"after {share:.0%} of the epochs {len(alive)} of {len(names)} settings go on")
            work.run([config for configs in alive for config in configs[1:]])
        return work.results


class _Sweep:
    """A sweep under way: what has become of which trial, in memory and in the folder."""

    def __init__(self, store: FeatureStore, folder: Path, judge: Judge, device: torch.device, memory: int, say):
        self._store, self._folder, self._judge, self._device = store, folder / TRIALS, judge, device
        self._roles: Roles = store.roles()
        self.results: dict[str, dict] = {}
        self._best = 0.0
        self.bar = tqdm(disable=True)
        request = folder / SWEEP
        if folder.exists() and any(folder.iterdir()) and not request.exists():
            raise SweepError(f"{folder} is not empty and no sweep; name a new folder")
        if request.exists() and read_json(request, "the sweep").get("fingerprints") != store.fingerprints:
            raise SweepError(f"{folder} holds a sweep of other features; name a new folder")
        write_json(request, {"fingerprints": store.fingerprints, "store": str(store.path.resolve())})
        self._data = Data(store, self._roles, device, memory)
        features = sum(array.nbytes for array in (store.image_features, store.text_features))
        self._memory = max(0, memory - (features if self._data.count == 1 else memory // 2))
        say(
            f"sweeping on {device}: {len(self._roles.train):,} train pictures, chosen on "
            f"{len(self._roles.selection):,} ({self._roles.selection_name})"
        )

    def run(self, configs: Iterable[Config], share: float = 1.0) -> None:
        """Brings trials to a share of their epochs; those that are done already stay as they are."""
        waiting = sorted((config for config in configs if not self._known(config)), key=_order)
        for _, alike in itertools.groupby(waiting, _company):
            alike = list(alike)
            while alike:
                most = self._at_once(alike[0])
                points, alike = [self._point(config) for config in alike[:most]], alike[most:]
                for _, abreast in itertools.groupby(sorted(points, key=_epoch), _epoch):
                    self._run_together(list(abreast), share)

    def end(self, config: Config, outcome: str, point: Point | None = None) -> None:
        """Writes down what has become of a trial."""
        name = trial_name(config)
        if name in self.results:
            return
        point = point or self._point(config)
        result = {"outcome": outcome, "epochs": point.epoch, "best_epoch": point.best_epoch}
        result["seconds"] = sum(row["seconds"] for row in point.history)
        result["history"] = [row for row in point.history if math.isfinite(row["loss"])]
        if outcome != "diverged":
            self._judge.save(name, self._folder / f"{name}.npz")
        write_json(self._folder / f"{name}.json", result)
        (self._folder / f"{name}{_PARKED}").unlink(missing_ok=True)
        self.results[name] = result
        self.bar.update(config.training.num_epochs - point.epoch)

    def _known(self, config: Config) -> bool:
        """Whether a trial is done, in this sweep or before it was interrupted."""
        name = trial_name(config)
        if name not in self.results and (self._folder / f"{name}.json").exists():
            self.results[name] = read_json(self._folder / f"{name}.json", "a trial")
            if self.results[name]["outcome"] != "diverged":
                self._judge.load(name, self._folder / f"{name}.npz")
            self.bar.update(config.training.num_epochs)
        return name in self.results

    def _run_together(self, points: list[Point], share: float) -> None:
        """Trains points that have come equally far, looking at them when ``fit`` would, and parks what is left."""
        training = points[0].config.training
        end = min(
            training.num_epochs, math.ceil(share * training.num_epochs / training.check_every) * training.check_every
        )
        dealt = self._data.dealt(points[0].config)
        while points and points[0].epoch < end:
            epochs = points[0].until_check
            advance(points, *dealt, epochs)
            self.bar.update(epochs * len(points))
            for point in points:
                if point.diverged:
                    self.end(point.config, "diverged", point)
                    continue
                point.heads.eval()
                found = embed(point.heads, self._store, self._roles.selection)
                point.keep(self._judge.measure(trial_name(point.config), *found))
                self._best = max(self._best, point.best_rsum)
                if point.finished:
                    self.end(point.config, "finished", point)
            points = [point for point in points if not (point.diverged or point.finished)]
            self.bar.set_postfix(trials=len(self.results), best=f"{self._best:.1f}")
        for point in points:
            self._park(point)

    def _park(self, point: Point) -> None:
        name = trial_name(point.config)
        self._judge.save(name, self._folder / f"{name}.npz")
        with whole_file(self._folder / f"{name}{_PARKED}") as aside:
            torch.save(point.state(), aside)

    def _point(self, config: Config) -> Point:
        """A trial at its start, or where it was parked."""
        point, name = self._data.point(config), trial_name(config)
        parked = self._folder / f"{name}{_PARKED}"
        if parked.exists():
            point.restore(torch.load(parked, map_location=self._device, weights_only=True))
            self._judge.load(name, self._folder / f"{name}.npz")
        return point

    def _at_once(self, config: Config) -> int:
        """How many trials of such a shape are trained together."""
        training, point = config.training, self._data.point(config)
        numbers = sum(parameter.numel() for parameter in point.heads.parameters())
        texts = training.batch_size * training.captions_per_image
        batch = (training.batch_size + texts) * config.model.embedding_dim + training.batch_size * texts
        each = 4 * (6 * numbers + 4 * batch)  # parameters, gradients, two moments, two copies; and a batch's way back
        return max(1, min(AT_ONCE.get(self._device.type, AT_ONCE_ELSEWHERE), self._memory // each))


def _company(config: Config) -> tuple:
    """What trials have to agree in to be trained together."""
    training = config.training
    return *same_batches(config), training.num_epochs, training.check_every


def _order(config: Config) -> tuple:
    """Trials that are trained together side by side, and among them those of one shape."""
    return _company(config), dataclasses.astuple(config.model), dataclasses.astuple(config.training)


def _epoch(point: Point) -> int:
    return point.epoch
