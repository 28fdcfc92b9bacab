"""The settings of a sweep: the product of a grid's axes, with a configuration for each seed."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onceover.base.files import digest
from onceover.configs.schema import Config, ConfigError, load_config
from onceover.heads.schedule import scheduled

MAX_SETTINGS = 100_000
_NO_AXES = {
    "training.seed": "say how many seeds with --seeds",
    "training.members": "a sweep ranks single pairs of heads",
    "training.cca": "a sweep ranks the heads that are trained; set it for fit",
    "training.refit": "the validation images rank the settings, so no trial is fitted with them; set it for fit",
    "model.rerank": "it changes nothing in the heads; evaluate compares the ways with --rerank",
}


class Setting(NamedTuple):
    """One combination of a grid's values.

    Attributes:
        values: by key.
        configs: the whole configuration, for each seed.
    """

    values: dict[str, object]
    configs: list[Config]


def expand(
    config_file: Path | None, overrides: Sequence[str], grid: Sequence[str], seeds: int, sample: int | None = None
) -> list[Setting]:
    """The settings of a grid, in its order; equal ones once.

    Args:
        config_file, overrides: what is not in the grid, as ``load_config`` takes it.
        grid: axes as ``key=v1,v2,…``, each key once.
        seeds: how many for each setting, counted up from ``training.seed``.
        sample: how many settings to draw of all, at random, the same ones each time.

    Raises:
        ConfigError: a key or value that does not exist, a key given twice, or one that a grid cannot hold.
    """
    axes = _axes(grid)
    size = math.prod(len(values) for values in axes.values())
    if size > MAX_SETTINGS:
        raise ConfigError(f"the grid has {size:,} settings; at most {MAX_SETTINGS:,} are swept: name fewer values")
    combinations = list(itertools.product(*axes.values()))
    if sample is not None and sample < len(combinations):
        drawn = np.random.default_rng(0).permutation(len(combinations))[:sample]
        combinations = [combinations[number] for number in sorted(drawn)]
    settings: list[Setting] = []
    for combination in combinations:
        assignments = [f"{key}={value}" for key, value in zip(axes, combination, strict=True)]
        setting = _setting(load_config(config_file, [*overrides, *assignments]), list(axes), seeds)
        if setting not in settings:  # 0.1 and 0.10 are one
            settings.append(setting)
    return settings


def schedule_all(settings: Sequence[Setting], images: int) -> list[Setting]:
    """The settings with batch sizes and numbers of epochs for so many train images, where they name none.

    Settings that are equal then, such as a batch size that is named and the same one that is chosen, come once.
    """
    known: list[Setting] = []
    for setting in settings:
        configs = [scheduled(config, images) for config in setting.configs]
        chosen = _values(configs[0], [key for key, value in setting.values.items() if value is None])
        complete = Setting(setting.values | chosen, configs)
        if complete not in known:
            known.append(complete)
    return known


def _axes(grid: Sequence[str]) -> dict[str, list[str]]:
    """The axes ``key=v1,v2,…`` as texts by key.

    Raises:
        ConfigError: as ``expand``.
    """
    axes: dict[str, list[str]] = {}
    for axis in grid:
        key, separator, text = axis.partition("=")
        key = key.strip()
        values = [value.strip() for value in text.split(",")]
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
    return axes


def _setting(config: Config, keys: Sequence[str], seeds: int) -> Setting:
    """A setting with its configurations. ``keys``: of the grid.

    Raises:
        ConfigError: an ensemble.
    """
    training = config.training
    if training.members > 1:
        raise ConfigError("a sweep ranks single pairs of heads; leave training.members at 1")
    configs = []
    for seed in range(training.seed, training.seed + seeds):
        configs.append(dataclasses.replace(config, training=dataclasses.replace(training, seed=seed)))
    return Setting(_values(config, keys), configs)


def _values(config: Config, keys: Iterable[str]) -> dict[str, object]:
    """The values of some settings, by their keys."""
    plain = config.to_dict()
    values = {}
    for key in keys:
        section, _, name = key.partition(".")
        values[key] = plain[section][name]
    return values


def trial_name(config: Config) -> str:
    """The name of a trial: a digest of the settings that heads depend on, its seed included."""
    plain = config.to_dict()
    return digest([plain["model"], plain["training"]])[:16]
