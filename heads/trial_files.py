"""The files of a sweep's trials: results of finished ones, and the state of those that wait to be continued.

Of a trial NAME there are ``NAME.json`` (how it ended), ``NAME.npz`` (the judge's ranks of its best epoch) and, while
it waits, ``NAME.pt`` (its state). Each names the trial and the features that it is of.
"""

import math
from pathlib import Path
from typing import Any

from onceover.base.errors import OnceoverError
from onceover.base.files import FileError, digest, file_sha256, read_record, remove_asides, write_record
from onceover.configs.schema import Config
from onceover.heads.checkpoint import load_state, save_state
from onceover.heads.grid import trial_name
from onceover.retrieval.leaderboard import Judge

_WAITING = ".pt"  # the state of a trial that waits


class TrialFileError(OnceoverError):
    """A file of a trial that is missing, damaged, or of another trial."""


class TrialFiles:
    """The trials in a sweep's folder; the judge remembers the ranks of whatever is read.

    Args:
        folder: of the trials.
        fingerprints: of the features.
    """

    def __init__(self, folder: Path, judge: Judge, fingerprints: dict[str, str]):
        self.folder = folder
        self._judge = judge
        self._fingerprints = fingerprints
        if folder.is_dir():
            remove_asides(folder)

    def has_result(self, name: str) -> bool:
        """Whether the result of a trial is there."""
        return self._path(name, ".json").exists()

    def is_waiting(self, config: Config) -> bool:
        """Whether the state of a trial that waits is there."""
        return self._path(trial_name(config), _WAITING).exists()

    def write_result(self, config: Config, state: dict[str, Any], outcome: str) -> dict:
        """Writes how a trial ended, and removes its state; a result that another process wrote meanwhile stays.

        Args:
            state: of the trial at its end (``Trial.state``).
            outcome: ``finished``, ``dropped`` or ``diverged``.

        Returns:
            The result.
        """
        name = trial_name(config)
        if self.has_result(name):
            return self.read_result(config)
        result = self._origin(config) | {
            "outcome": outcome,
            "epochs": state["epoch"],
            "best_epoch": state["best_epoch"],
            "seconds": sum(row["seconds"] for row in state["history"]),
            "history": [row for row in state["history"] if math.isfinite(row["loss"])],
        }
        if outcome != "diverged":
            ranks = self._path(name, ".npz")
            self._judge.save(name, ranks, digest(self._origin(config)))
            result["ranks_sha256"] = file_sha256(ranks)
        write_record(self._path(name, ".json"), result)
        self._path(name, _WAITING).unlink(missing_ok=True)
        return result

    def read_result(self, config: Config) -> dict:
        """Reads how a trial ended.

        Raises:
            TrialFileError: a file that is missing, of another trial, or not as it was written.
        """
        name = trial_name(config)
        path = self._path(name, ".json")
        ranks = self._path(name, ".npz")
        try:
            result = read_record(path, "a trial")
            if not self._is_of(config, result):
                raise FileError(f"{path} is of another trial, or of other features")
            if result["outcome"] == "diverged":
                return result
            if file_sha256(ranks) != result["ranks_sha256"]:
                raise FileError(f"{ranks} does not match the digest in its .json")
        except (OSError, FileError) as error:
            raise TrialFileError(
                f"{error}; remove all files {self.folder / name}.* and sweep again: that trial is then fitted anew"
            ) from error
        self._judge.load(name, ranks, digest(self._origin(config)))
        return result

    def write_state(self, config: Config, state: dict[str, Any]) -> None:
        """Writes the state of a trial that waits, with its ranks so far."""
        name = trial_name(config)
        self._judge.save(name, self._path(name, ".npz"), digest(self._origin(config)))
        save_state(self._path(name, _WAITING), state | self._origin(config))

    def read_state(self, config: Config) -> dict[str, Any] | None:
        """Reads the state of a trial that waits; None where there is none.

        Raises:
            TrialFileError: it is damaged, or of another trial.
        """
        name = trial_name(config)
        path = self._path(name, _WAITING)
        if not path.exists():
            return None
        self._judge.load(name, self._path(name, ".npz"), digest(self._origin(config)))
        try:
            state = load_state(path)
            if not self._is_of(config, state):
                raise ValueError("it is of another trial, or of other features")
        except ValueError as error:
            raise TrialFileError(
                f"{path} cannot be gone on with ({error}); remove all files {path.with_suffix('.*')} and sweep "
                "again: that trial is then fitted anew"
            ) from error
        return state

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}{suffix}"

    def _origin(self, config: Config) -> dict:
        """The trial and the features that a trial's files are of, by which those of another trial are refused."""
        return {"trial": trial_name(config), "fingerprints": self._fingerprints}

    def _is_of(self, config: Config, record: dict) -> bool:
        """Whether a file is of the trial that it is named after; earlier versions did not write it down."""
        return all(record.get(key, value) == value for key, value in self._origin(config).items())
