"""The stored files that figures are drawn from, read and checked: runs with their evaluations, stores, sweeps."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import MAX_TEXT, read_bytes, read_record
from onceover.base.formats import EMBEDDINGS, EVALUATION, HISTORY, PROVENANCE, RESULTS
from onceover.extract.store import FeatureStore
from onceover.retrieval.embeddings import Embeddings, read_embeddings
from onceover.retrieval.metrics import DIRECTIONS, RECALL_AT

_OUTCOMES = ("finished", "dropped", "diverged")
_LONGEST = 200  # characters of a cell in a sweep's table
_BOUNDS = {  # of the numbers of a sweep's table that are drawn
    "i2t_R@1": (0, 100),
    "t2i_R@1": (0, 100),
    "i2t_R@1_sd": (0, 100),
    "t2i_R@1_sd": (0, 100),
    "i2t_R@1_low": (0, 100),
    "i2t_R@1_high": (0, 100),
    "t2i_R@1_low": (0, 100),
    "t2i_R@1_high": (0, 100),
    "rsum": (0, 600),
    "pictures": (1, 10**12),
    "captions": (1, 10**12),
    "seeds": (1, 10**6),
    "difference": (-600, 600),
    "difference_low": (-(10**6), 10**6),
    "difference_high": (-(10**6), 10**6),
}
_REQUIRED = {"i2t_R@1", "t2i_R@1", "rsum", "pictures", "captions"}


class PlotError(OnceoverError):
    """Files that hold nothing to draw or are damaged, or an image format that is not written."""


class PairSample(NamedTuple):
    """A sample of matched pairs.

    Attributes:
        images, captions: rows of the embeddings, a pair each. total: how many images have captions.
    """

    images: np.ndarray
    captions: np.ndarray
    total: int


@dataclass(frozen=True)
class RunFiles:
    """A run's folder with its embeddings, the split that is drawn, and the seed of whatever is drawn at random."""

    folder: Path
    embeddings: Embeddings
    split: str
    seed: int = 0

    @property
    def evaluation_file(self) -> Path:
        """The file with the evaluation of the split, if there is one."""
        return self.folder / f"{EVALUATION.format(self.split)}.json"

    def is_distilled(self) -> bool:
        """Whether the heads were made of an ensemble's in closed form, without a training of their own."""
        return "distilled" in read_record(self.folder / PROVENANCE, "the run's provenance", strict=False)

    def member_count(self) -> int:
        """The number of pairs of heads that were trained, each with a curve of its own."""
        file = self.folder / PROVENANCE
        epochs = read_record(file, "the run's provenance", strict=False).get("best_epochs")
        if not isinstance(epochs, list):
            raise PlotError(f"{file} is damaged, or of another version; fit again")
        return len(epochs)

    def sample_pairs(self, most: int) -> PairSample:
        """A seeded sample of the split's images that have captions, each with one caption.

        Raises:
            PlotError: there are too few to draw.
        """
        images, captions, image_index = self.embeddings.split(self.split)
        first = np.unique(image_index, return_index=True)[1]
        chosen = np.sort(np.random.default_rng(self.seed).permutation(len(first))[:most])
        if not len(chosen):
            raise PlotError(f"the split {self.split!r} has no images with captions; there is nothing to draw")
        return PairSample(images[image_index[first[chosen]]], captions[first[chosen]], len(first))


def read_run(folder: str | Path, split: str | None = None, seed: int = 0) -> RunFiles:
    """Opens a run's files for drawing; the reported split by default.

    Raises:
        EmbeddingsError: the embeddings are missing or damaged.
    """
    folder = Path(folder)
    embeddings = read_embeddings(folder / EMBEDDINGS)
    return RunFiles(folder, embeddings, split or embeddings.report_split, seed)


@dataclass(frozen=True)
class StoreFiles:
    """An open feature store, and the limit in bytes of the memory that drawing it may take."""

    store: FeatureStore
    memory: int


class Choice(NamedTuple):
    """The split that chose a run's epoch, how many images it has, and the epoch."""

    split: str
    images: int
    best_epoch: int


def read_choice(folder: Path) -> Choice:
    """Reads from ``run.json`` what chose the run's epoch.

    Raises:
        PlotError: it is damaged.
    """
    file = folder / PROVENANCE
    run = read_record(file, "the run's provenance", strict=False)
    try:
        (best_epoch,) = run["best_epochs"]
        choice = Choice(run["selection"]["split"], run["selection"]["pictures"], best_epoch)
    except (KeyError, TypeError, ValueError) as error:
        raise PlotError(f"{file} is damaged, or of another version; fit again") from error
    if not isinstance(choice.split, str) or type(choice.images) is not int or type(best_epoch) is not int:
        raise PlotError(f"{file} is damaged, or of another version; fit again")
    return choice


class History(NamedTuple):
    """A run's history: epochs, and columns of numbers by name, NaN where something was not measured."""

    epochs: np.ndarray
    columns: dict[str, np.ndarray]


def read_history(folder: Path) -> History:
    """Reads a run's history. One of a fine-tuning without validation images has no recalls: they are NaN.

    Raises:
        PlotError: it is missing, or damaged.
    """
    file = folder / HISTORY
    bounds: dict[str, tuple[float, float]] = {"rsum": (0, 600)}
    for direction in DIRECTIONS:
        for k in RECALL_AT:
            bounds[f"{direction}_R@{k}"] = (-1e9, 1e9)
    try:
        rows = read_table(file)
        epochs = np.array([number_of(row["epoch"], 1, 10**9) for row in rows])
        columns = {"loss": np.array([number_of(row["loss"], -1e30, 1e30) for row in rows])}
        is_validated = not bounds.keys().isdisjoint(rows[0])
        for name, (least, most) in bounds.items():
            columns[name] = np.full(len(rows), np.nan)
            if is_validated:
                columns[name] = np.array([number_of(row[name] or "nan", least, most) for row in rows])
    except (OSError, OnceoverError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise PlotError(f"{file} is missing or damaged; fit again") from error
    return History(epochs, columns)


def read_evaluation(file: Path, space: str) -> dict:
    """Reads an evaluation as ``retrieval.evaluation.evaluate`` gives it.

    Args:
        space: of the run; evaluations of earlier versions do not name it.

    Raises:
        PlotError: it is damaged, of another version, or of another run.
    """
    result = read_record(file, "the evaluation", strict=False)
    try:
        check_evaluation(result)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlotError(f"{file} is damaged, or of another version; evaluate again") from error
    if result.get("space", space) != space:
        raise PlotError(f"{file} is of another run; move it elsewhere and evaluate again")
    return result


def check_evaluation(result: dict) -> None:
    """Refuses a record that is no evaluation, or one that lacks a number that is drawn.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: of the first thing that is wrong.
    """
    if not isinstance(result["split"], str) or not result["models"]:
        raise ValueError("no split, or no models")
    for summary in result["models"].values():
        for direction in DIRECTIONS:
            _check_numbers(summary[direction])


def _check_numbers(numbers: dict) -> None:
    """Refuses a direction's numbers where a size or recall that is drawn is missing or out of bounds."""
    if type(numbers["queries"]) is not int or type(numbers["gallery"]) is not int:
        raise ValueError("a size is no whole number")
    for k in RECALL_AT:
        low, high = interval_of(numbers, f"R@{k}")
        for value in (low, numbers[f"R@{k}"], high):
            if not _is_percentage(value):
                raise ValueError("a recall is out of bounds")


def _is_percentage(value: object) -> bool:
    """Whether a number is a percentage, or one less or more its spread."""
    return (type(value) is int or type(value) is float) and -100 <= value <= 200


def interval_of(numbers: dict, name: str) -> tuple[float, float]:
    """A number's interval, or the spread between random maps; chance has neither, and gets the number twice."""
    value = numbers[name]
    if f"{name}_sd" in numbers:
        spread = numbers[f"{name}_sd"]
        return value - spread, value + spread
    return tuple(numbers.get(f"{name}_ci", (value, value)))


@dataclass(frozen=True)
class SweepTable:
    """A sweep's leaderboard.

    Attributes:
        rows: a setting each, best first, numbers as numbers; a number that a setting lacks is left out.
        keys: the grid's settings, each a column.
    """

    rows: list[dict]
    keys: list[str]

    def values(self, key: str) -> list:
        """The values along an axis of the grid, numbers in ascending order, then texts."""
        values = {row[key] for row in self.rows}
        return sorted(values, key=lambda value: (isinstance(value, str), value))

    def varied_keys(self) -> list[str]:
        """The settings that have more than one value."""
        return [key for key in self.keys if len(self.values(key)) > 1]

    def has_dropped(self) -> bool:
        """Whether a setting was dropped early."""
        return any(row["outcome"] == "dropped" for row in self.rows)

    def measured_on(self) -> str:
        """The split that the numbers were measured on, with the sizes of both galleries."""
        best = self.rows[0]
        return f"{best['split']}: galleries of {best['pictures']:,.0f} images, {best['captions']:,.0f} captions"


def read_sweep(folder: str | Path) -> SweepTable:
    """Reads a sweep's ``results.csv``; the grid's settings are the columns before ``outcome``.

    Raises:
        PlotError: it is missing, or damaged.
    """
    path = Path(folder) / RESULTS
    try:
        table = read_table(path)
        columns = list(table[0])
        keys = columns[: columns.index("outcome")]
        rows = [_checked_row(row, keys) for row in table]
        if rows[0]["outcome"] != "finished":
            raise ValueError("no setting came to its end")
    except (OSError, OnceoverError, ValueError, KeyError, csv.Error) as error:
        raise PlotError(f"{path} is missing or damaged; run the sweep again, which fits nothing anew") from error
    return SweepTable(rows, keys)


def _checked_row(row: dict[str, str], keys: list[str]) -> dict:
    """A row of a sweep's table without its blanks: the grid's values, text, and numbers within their bounds.

    Raises:
        ValueError, KeyError: a value that cannot be drawn, or one that is missing.
    """
    if row["outcome"] not in _OUTCOMES or not row["split"]:
        raise ValueError("an outcome or a split that is none")
    if any(len(value) > _LONGEST for value in (*row, *row.values())):
        raise ValueError("a name or value longer than any setting's")
    checked: dict = {key: _setting_value(row[key]) for key in keys}
    checked["outcome"] = row["outcome"]
    checked["split"] = row["split"]
    if row.get("verdict"):
        checked["verdict"] = row["verdict"]
    for name, (least, most) in _BOUNDS.items():
        if row.get(name):
            checked[name] = number_of(row[name], least, most)
    if row["outcome"] != "diverged" and not set(checked) >= _REQUIRED:
        raise ValueError("a number is missing")
    if any(isinstance(value, float) and math.isnan(value) for value in checked.values()):
        raise ValueError("a number is NaN")
    return checked


def _setting_value(text: str) -> float | str:
    """A value of the grid, as a number where it is a finite one."""
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def read_table(file: Path) -> list[dict[str, str]]:
    """Reads the rows of a CSV file with a header, as text.

    Raises:
        ValueError, csv.Error: no UTF-8, no rows, or rows longer or shorter than the header. OSError, FileError.
    """
    text = read_bytes(file, MAX_TEXT).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or any(None in row or None in row.values() for row in rows):
        raise ValueError("no rows, or rows of another length than the header")
    return rows


def number_of(text: str, least: float, most: float) -> float:
    """The number that a text writes; ``nan`` stays NaN.

    Raises:
        ValueError: no number, or one out of bounds.
    """
    value = float(text)
    if not math.isnan(value) and not least <= value <= most:
        raise ValueError(f"{value} is out of bounds")
    return value
