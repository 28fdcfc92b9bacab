"""The leaderboard of a sweep: trials ranked on the validation images, those that stay in the race, and the table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import write_bytes
from onceover.base.npz import npz_bytes, read_npz
from onceover.base.terminal import Table
from onceover.retrieval.metrics import DIRECTIONS, RECALL_AT, RankPair, compare, report
from onceover.retrieval.ranks import Ranks, rank
from onceover.retrieval.tables import csv_text

_FIELDS = ("query", "above", "level", "gallery", "group")
_OUTCOMES = ("diverged", "dropped", "finished")  # of a setting's trials the first of these says most about it
_SHORT = {"image_to_text": "i2t", "text_to_image": "t2i"}
_MAX_GALLERY = 2**40


class LeaderboardError(OnceoverError):
    """A sweep in which nothing came to an end, or whose files are damaged."""


class Judge:
    """Remembers each trial's ranks on the validation images, those of its best epoch."""

    def __init__(self) -> None:
        self._ranks: dict[str, RankPair] = {}
        self._rsum: dict[str, float] = {}

    def measure(self, trial: str, images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> dict:
        """Ranks unit vectors (N, D) and (M, D); a report without intervals. The best one of a trial is remembered.

        Raises:
            MetricsError: embeddings that are not finite.
        """
        ranks = rank(images, texts, image_index)
        measured = report([ranks], draws=0)
        if measured["rsum"] > self._rsum.get(trial, -1.0):
            self._remember(trial, ranks, measured["rsum"])
        return measured

    def save(self, trial: str, path: Path, origin: str) -> None:
        """Writes a trial's ranks as arrays in a .npz file, whole or not at all; ``origin`` names trial and features."""
        arrays = {}
        for direction, ranks in zip(_SHORT.values(), self._ranks[trial], strict=True):
            for field in _FIELDS:
                arrays[f"{direction}_{field}"] = getattr(ranks, field)
        write_bytes(path, npz_bytes({"origin": np.array(origin), **arrays}))

    def load(self, trial: str, path: Path, origin: str) -> None:
        """Remembers a trial's ranks again.

        Raises:
            LeaderboardError: the file is missing, damaged, or of another origin.
        """
        try:
            ranks = _read_ranks(path, origin)
        except Exception as error:  # the parsers of NumPy and zipfile raise errors of many kinds
            raise LeaderboardError(
                f"{path} is missing, damaged or of another trial; remove all files {path.with_suffix('.*')} and sweep "
                "again: that trial is then fitted anew"
            ) from error
        self._remember(trial, ranks, report([ranks], draws=0)["rsum"])

    def best(self, trials: Sequence[str], most: int) -> list[str]:
        """At most so many of the trials, those with the highest rsum, the best first."""
        return sorted(trials, key=lambda trial: -self._rsum[trial])[:most]

    def contenders(self, trials: Sequence[str], share: float) -> list[str]:
        """The best share of the trials by rsum, and all others that cannot be told from the best one (``_behind``)."""
        order = self.best(trials, len(trials))
        certain = max(1, math.ceil(share * len(order)))
        staying = order[:certain]
        for trial in order[certain:]:
            if _behind(self.of(order[:1]), self.of([trial]), len(order)).high >= 0:
                staying.append(trial)
        return staying

    def of(self, trials: Sequence[str]) -> list[RankPair]:
        """The ranks of several trials, as ``report`` and ``compare`` take them."""
        return [self._ranks[trial] for trial in trials]

    def _remember(self, trial: str, ranks: RankPair, rsum: float) -> None:
        self._ranks[trial] = ranks
        self._rsum[trial] = rsum


def _read_ranks(path: Path, origin: str) -> RankPair:
    """A trial's ranks, both ways; files of earlier versions do not name their origin.

    Raises:
        Exception: of whatever kind, where the file is missing, damaged, or holds no ranks.
    """
    arrays = read_npz(path)
    if "origin" in arrays and str(arrays["origin"]) != origin:
        raise ValueError("the ranks of another trial")
    pair = []
    for direction in _SHORT.values():
        pair.append(_checked_ranks({field: arrays[f"{direction}_{field}"] for field in _FIELDS}))
    image_to_text, text_to_image = pair
    if max(image_to_text.group.max(), text_to_image.group.max()) >= text_to_image.gallery:
        raise ValueError("images that are not in the gallery")
    return image_to_text, text_to_image


def _checked_ranks(arrays: dict[str, np.ndarray]) -> Ranks:
    """Ranks made of arrays, once these are such that ``retrieval.metrics`` can count with them."""
    gallery = arrays.pop("gallery")
    if gallery.shape != () or gallery.dtype.kind != "i" or not 1 <= gallery < _MAX_GALLERY:
        raise ValueError("the gallery has no size")
    if any(array.dtype != np.int64 or array.ndim != 1 for array in arrays.values()):
        raise ValueError("ranks are whole numbers in a row")
    ranks = Ranks(gallery=int(gallery), **arrays)
    pairs = len(ranks.query)
    if not pairs or ranks.above.shape != (pairs,) or ranks.level.shape != (pairs,):
        raise ValueError("not as many ranks as pairs")
    is_in_order = np.array_equal(np.unique(ranks.query), np.arange(len(ranks.group)))
    is_in_gallery = ranks.above.min() >= 0 and ranks.level.min() >= 1 and (ranks.above + ranks.level).max() <= gallery
    if not is_in_order or not is_in_gallery or ranks.group.min() < 0:
        raise ValueError("ranks that point outside the gallery")
    return ranks


@dataclass(frozen=True)
class _Behind:
    """The difference in rsum to the best of several, and its interval."""

    difference: float
    low: float
    high: float


def _behind(best: list[RankPair], other: list[RankPair], among: int) -> _Behind:
    """Compares with the best of so many.

    The intervals of all hold together with 95 %: the best of many is the best by luck, too, and comparing each with it
    at 95 % would lose one in four that are as good (Bonferroni's bound, with the paired bootstrap's standard error).
    """
    difference = compare(best, other)
    margin = NormalDist().inv_cdf(1 - 0.025 / max(1, among - 1)) * difference["rsum_se"]
    rsum = difference["rsum"]
    return _Behind(rsum, rsum - margin, rsum + margin)


def leaderboard(
    judge: Judge, settings: Sequence[tuple[dict, list[str]]], results: dict[str, dict], split: str
) -> list[dict]:
    """A row for each setting, best first: those that ran to their end with most seeds, then with fewer, then the rest.

    Args:
        settings: the values that a setting stands for, by key, and its trials' names, a seed each.
        results: of each trial that was begun, the record that ``heads.sweep.sweep`` returns.
        split: that the judge measured on.

    Returns:
        Rows with the setting's values, ``outcome``, ``seeds`` (those that ran), ``epochs`` (the mean), ``seconds`` (the
        sum), ``split``, and, but for diverged ones, the galleries' sizes (``pictures``, ``captions``), both directions'
        recalls in percent as means over seeds with their spread
        (``_sd``, of several seeds), ``rsum`` with its spread and its 95 % interval over images, ``difference`` to the
        best over the seeds that both have, with an interval that holds for all rows together, and ``verdict``: best,
        tie, worse or dropped. Numbers of dropped ones are from where they were dropped.

    Raises:
        LeaderboardError: no setting came to its end, or a trial's record is damaged.
    """
    _check_results(results)
    entries = []
    for values, names in settings:
        trials = [name for name in names if name in results]
        entries.append((_row(judge, values, trials, results, split), trials))
    entries.sort(key=lambda entry: _sort_key(entry[0]))
    best, best_trials = entries[0]
    if best["outcome"] != "finished":
        raise LeaderboardError("no setting came to its end: all diverged; lower training.learning_rate")
    for row, trials in entries:
        if row["outcome"] == "diverged":
            del row["rsum"]
            continue
        behind = _behind(judge.of(best_trials[: len(trials)]), judge.of(trials), len(entries))
        row["difference"] = behind.difference
        row["difference_low"] = behind.low
        row["difference_high"] = behind.high
        row["verdict"] = _verdict(row, row is best)
    return [row for row, _ in entries]


def _row(judge: Judge, values: dict, trials: list[str], results: dict[str, dict], split: str) -> dict:
    """The row of a setting, but for its difference to the best one."""
    records = [results[trial] for trial in trials]
    outcome = min((record["outcome"] for record in records), key=_OUTCOMES.index)
    row = {
        **values,
        "outcome": outcome,
        "split": split,
        "seeds": len(trials),
        "rsum": -1.0,
        "epochs": float(np.mean([record["epochs"] for record in records])),
        "seconds": sum(record["seconds"] for record in records),
    }
    if outcome != "diverged":
        row |= _measured(judge, trials)
    return row


def _sort_key(row: dict) -> tuple:
    return (-_OUTCOMES.index(row["outcome"]), -row["seeds"], -row["rsum"])


def _verdict(row: dict, is_best: bool) -> str:
    if is_best:
        return "best"
    if row["outcome"] != "finished":
        return "dropped"
    return "tie" if row["difference_high"] >= 0 else "worse"


def _check_results(results: dict[str, dict]) -> None:
    """Refuses records of trials that lack a number that the table needs."""
    for name, result in results.items():
        is_record = isinstance(result, dict) and result.get("outcome") in _OUTCOMES
        if not is_record or any(type(result.get(key)) not in (int, float) for key in ("epochs", "seconds")):
            raise LeaderboardError(
                f"the record of trial {name} is damaged; remove all files of that name from trials/ and sweep again"
            )


def _measured(judge: Judge, trials: list[str]) -> dict:
    """The numbers of a setting as columns."""
    measured = report(judge.of(trials))
    row: dict = {
        "pictures": measured["text_to_image"]["gallery"],
        "captions": measured["image_to_text"]["gallery"],
    }
    has_spread = len(trials) > 1
    for direction in DIRECTIONS:
        numbers = measured[direction]
        for k in RECALL_AT:
            name = f"{_SHORT[direction]}_R@{k}"
            row[name] = numbers[f"R@{k}"]
            row[f"{name}_low"], row[f"{name}_high"] = numbers[f"R@{k}_ci"]
            if has_spread:
                row[f"{name}_sd"] = numbers[f"R@{k}_sd"]
    row["rsum"] = measured["rsum"]
    row["rsum_low"], row["rsum_high"] = measured["rsum_ci"]
    if has_spread:
        row["rsum_sd"] = measured["rsum_sd"]
    return row


def notes(rows: list[dict], *, has_short_names: bool = True) -> list[str]:
    """Notes that a reader of the leaderboard needs.

    Args:
        rows: those that are shown. has_short_names: directions are written i2t and t2i.
    """
    best = rows[0]
    directions = "i2t: image → caption, t2i: caption → image; " if has_short_names else ""
    verdicts = [row.get("verdict") for row in rows]
    lines = [
        f"measured on {best['split']}, {best['pictures']:,} images, {best['captions']:,} captions, which chose the "
        "best one: its own numbers here flatter it",
        f"R@K: hit@K in percent; {directions}means over the seeds",
        "intervals: 95 %, images resampled; vs best: paired, over the seeds that both have, holding for all rows "
        "together. tie: these images cannot tell the setting from the best one. Chance between seeds is left out",
    ]
    if "worse" in verdicts and "tie" in verdicts[verdicts.index("worse") :]:
        lines.append(
            "a setting can tie below one that is worse: its difference to the best varies more from image to image, "
            "and so its interval is wider"
        )
    if any(row["outcome"] == "dropped" for row in rows):
        lines.append("dropped: measured when it was dropped, against the best one at its end")
    return lines


def results_csv(rows: list[dict]) -> str:
    """The leaderboard as CSV, every number in full, a row for each setting; a number that a setting lacks is blank."""
    return csv_text(rows)


def leaderboard_table(rows: list[dict], keys: Sequence[str]) -> list[list[str]]:
    """Header and rows, as text; ``keys``: the grid's."""
    recalls = []
    for direction in _SHORT.values():
        recalls += [f"{direction}_R@{k}" for k in RECALL_AT]
    table = [["", *keys, *recalls, "rsum", "vs best [simultaneous 95 %]", "seeds", "epochs", "verdict"]]
    for number, row in enumerate(rows, 1):
        values = [str(row[key]) for key in keys]
        effort = [str(row["seeds"]), f"{row['epochs']:g}"]
        if row["outcome"] == "diverged":
            dashes = ["–"] * (len(recalls) + 2)
            table.append([str(number), *values, *dashes, *effort, "diverged"])
            continue
        measured = [f"{row[name]:.1f}" for name in recalls]
        rsum = f"{row['rsum']:.1f} [{row['rsum_low']:.1f}, {row['rsum_high']:.1f}]"
        table.append([str(number), *values, *measured, rsum, _difference(row), *effort, row["verdict"]])
    return table


def leaderboard_tables(rows: list[dict], keys: Sequence[str], most: int) -> list[Table]:
    """The first rows of the leaderboard for the terminal: each setting in one column, and the numbers that rank it."""
    table = [["", "setting", "i2t R@1", "t2i R@1", "rsum", "vs best [simultaneous 95 %]", "seeds", "verdict"]]
    for number, row in enumerate(rows[:most], 1):
        setting = " ".join(f"{key.rpartition('.')[2]}={row[key]}" for key in keys)
        measured = ["–"] * 4
        if row["outcome"] != "diverged":
            measured = [f"{row[name]:.1f}" for name in ("i2t_R@1", "t2i_R@1", "rsum")]
            measured.append(_difference(row))
        table.append([str(number), setting, *measured, str(row["seeds"]), row.get("verdict", "diverged")])
    return [Table("", table)]


def _difference(row: dict) -> str:
    """The difference in rsum to the best one, with its interval."""
    return f"{row['difference']:+.1f} [{row['difference_low']:+.1f}, {row['difference_high']:+.1f}]"
