"""What the trials of a sweep are worth: ranks on the validation images, who stays in the race, and the final table."""

import csv
import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import MAX_TEXT, read_bytes, write_bytes
from onceover.retrieval.metrics import DIRECTIONS, RECALL_AT, Ranks, compare, rank, report

_FIELDS = ("query", "above", "level", "gallery", "group")
_SURE = ("diverged", "dropped", "finished")  # outcomes, the one that says most of a setting first
_SHORT = {"image_to_text": "i2t", "text_to_image": "t2i"}


class LeaderboardError(OnceoverError):
    """A sweep in which nothing came to an end, or whose files are damaged."""


class Judge:
    """Remembers each trial's ranks on the validation images, those of its best epoch (``heads.sweep.Judge``)."""

    def __init__(self) -> None:
        self._ranks: dict[str, tuple[Ranks, Ranks]] = {}
        self._rsum: dict[str, float] = {}

    def measure(self, trial: str, images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> dict:
        """Ranks unit vectors (N, D) and (M, D); a report without intervals. The best one of a trial is remembered.

        Raises:
            MetricsError: embeddings that are not finite.
        """
        found = rank(images, texts, image_index)
        measured = report([found], draws=0)
        if measured["rsum"] > self._rsum.get(trial, -1.0):
            self._remember(trial, found, measured["rsum"])
        return measured

    def save(self, trial: str, path: Path, origin: str) -> None:
        """Writes a trial's ranks as arrays in a .npz file, whole or not at all; ``origin`` names trial and features."""
        sides = zip(_SHORT.values(), self._ranks[trial], strict=True)
        arrays = {f"{side}_{field}": getattr(ranks, field) for side, ranks in sides for field in _FIELDS}
        data = io.BytesIO()
        np.savez(data, origin=np.array(origin), **arrays)
        write_bytes(path, data.getbuffer())

    def load(self, trial: str, path: Path, origin: str) -> None:
        """Remembers a trial's ranks again.

        Raises:
            LeaderboardError: the file is missing, damaged, or of another origin.
        """
        try:
            ranks = _read_ranks(path, origin)
        except Exception as error:  # of NumPy's and zipfile's parsers anything
            raise LeaderboardError(
                f"{path} is missing, damaged or of another trial; remove all files {path.with_suffix('.*')} and sweep "
                "again: that trial is then fitted anew"
            ) from error
        self._remember(trial, ranks, report([ranks], draws=0)["rsum"])

    def best(self, trials: Sequence[str], most: int) -> list[str]:
        """So many of the trials, those with the highest rsum, the best first."""
        return sorted(trials, key=lambda trial: -self._rsum[trial])[:most]

    def contenders(self, trials: Sequence[str], share: float) -> list[str]:
        """The best share of the trials by rsum, and all others that cannot be told from the best one (``_behind``)."""
        order = self.best(trials, len(trials))
        sure = max(1, math.ceil(share * len(order)))
        best = [self._ranks[order[0]]] if order else []
        rest = (trial for trial in order[sure:] if _behind(best, [self._ranks[trial]], len(order))["high"] >= 0)
        return order[:sure] + list(rest)

    def of(self, trials: Sequence[str]) -> list[tuple[Ranks, Ranks]]:
        """The ranks of several trials, as ``report`` and ``compare`` take them."""
        return [self._ranks[trial] for trial in trials]

    def _remember(self, trial: str, found: tuple[Ranks, Ranks], rsum: float) -> None:
        self._ranks[trial], self._rsum[trial] = found, rsum


def _read_ranks(path: Path, origin: str) -> tuple[Ranks, Ranks]:
    """A trial's ranks, both ways; files of earlier versions do not name their origin.

    Raises:
        Exception: of whatever kind, where the file is missing, damaged, or holds no ranks.
    """
    data = io.BytesIO(read_bytes(path, MAX_TEXT))
    with zipfile.ZipFile(data) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed arrays, which are not written here")
    with np.load(data, allow_pickle=False) as arrays:
        if "origin" in arrays and str(arrays["origin"]) != origin:
            raise ValueError("the ranks of another trial")
        image_to_text, text_to_image = (
            _checked_ranks({field: arrays[f"{side}_{field}"] for field in _FIELDS}) for side in _SHORT.values()
        )
    images = text_to_image.gallery
    if max(image_to_text.group.max(), text_to_image.group.max()) >= images:
        raise ValueError("images that are not in the gallery")
    return image_to_text, text_to_image


def _checked_ranks(arrays: dict[str, np.ndarray]) -> Ranks:
    """Ranks out of arrays, if these are such that ``retrieval.metrics`` can count with them."""
    gallery = arrays.pop("gallery")
    if gallery.shape != () or gallery.dtype.kind != "i" or not 1 <= gallery < 2**40:
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


def _behind(best: list[tuple[Ranks, Ranks]], other: list[tuple[Ranks, Ranks]], among: int) -> dict[str, float]:
    """The difference in rsum to the best of so many, and its interval: low, high.

    The intervals of all hold together with 95 %: the best of many is the best by luck, too, and comparing each with it
    at 95 % would lose one in four that are as good (Bonferroni's bound, with the paired bootstrap's standard error).
    """
    found = compare(best, other)
    margin = NormalDist().inv_cdf(1 - 0.025 / max(1, among - 1)) * found["rsum_se"]
    return {"difference": found["rsum"], "low": found["rsum"] - margin, "high": found["rsum"] + margin}


def leaderboard(
    judge: Judge, settings: Sequence[tuple[dict, list[str]]], results: dict[str, dict], split: str
) -> list[dict]:
    """A row for each setting, best first: those that ran to their end with most seeds, then with fewer, then the rest.

    Args:
        settings: the values that a setting stands for, by key, and its trials' names, a seed each.
        results: of each trial that was begun, what ``heads.sweep.sweep`` says of it.
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
    rows = []
    for values, names in settings:
        ran = [name for name in names if name in results]
        outcomes = {results[name]["outcome"] for name in ran}
        outcome = next(each for each in _SURE if each in outcomes)
        row = {**values, "outcome": outcome, "split": split, "seeds": len(ran), "rsum": -1.0}
        row |= {"epochs": float(np.mean([results[name]["epochs"] for name in ran]))}
        row |= {"seconds": sum(results[name]["seconds"] for name in ran)}
        if outcome != "diverged":
            row |= _measured(judge, ran)
        rows.append((row, ran))
    rows.sort(key=lambda pair: (-_SURE.index(pair[0]["outcome"]), -pair[0]["seeds"], -pair[0]["rsum"]))
    if rows[0][0]["outcome"] != "finished":
        raise LeaderboardError("no setting came to its end: all diverged; lower training.learning_rate")
    for number, (row, ran) in enumerate(rows):
        if row["outcome"] == "diverged":
            del row["rsum"]
            continue
        behind = _behind(judge.of(rows[0][1][: len(ran)]), judge.of(ran), len(rows))
        row["difference"], row["difference_low"], row["difference_high"] = behind.values()
        tied = "tie" if row["difference_high"] >= 0 else "worse"
        row["verdict"] = "best" if number == 0 else tied if row["outcome"] == "finished" else "dropped"
    return [row for row, _ in rows]


def _check_results(results: dict[str, dict]) -> None:
    """Refuses records of trials that lack what the table says of each."""
    for name, result in results.items():
        is_record = isinstance(result, dict) and result.get("outcome") in _SURE
        if not is_record or any(type(result.get(key)) not in (int, float) for key in ("epochs", "seconds")):
            raise LeaderboardError(
                f"the record of trial {name} is damaged; remove all files of that name from trials/ and sweep again"
            )


def _measured(judge: Judge, trials: list[str]) -> dict:
    found = report(judge.of(trials))
    row: dict = {"pictures": found["text_to_image"]["gallery"], "captions": found["image_to_text"]["gallery"]}
    for direction in DIRECTIONS:
        for k in RECALL_AT:
            name = f"{_SHORT[direction]}_R@{k}"
            row[name] = found[direction][f"R@{k}"]
            row[f"{name}_low"], row[f"{name}_high"] = found[direction][f"R@{k}_ci"]
            if len(trials) > 1:
                row[f"{name}_sd"] = found[direction][f"R@{k}_sd"]
    row |= {"rsum": found["rsum"], "rsum_low": found["rsum_ci"][0], "rsum_high": found["rsum_ci"][1]}
    if len(trials) > 1:
        row["rsum_sd"] = found["rsum_sd"]
    return row


def notes(rows: list[dict]) -> list[str]:
    """What a reader of the leaderboard has to know."""
    split, pictures, captions = (rows[0][key] for key in ("split", "pictures", "captions"))
    return [
        f"measured on {split}, {pictures:,} images, {captions:,} captions, which chose the best one: its own numbers "
        "here flatter it",
        "R@K: hit@K in percent, i2t: image → caption, t2i: caption → image; means over the seeds",
        "intervals: 95 %, images resampled; to the best: paired, over the seeds that both have, holding for all rows "
        "together. tie: these images cannot tell the setting from the best one. Chance between seeds is left out",
        "dropped: measured when it was dropped, against the best one at its end",
    ]


def results_csv(rows: list[dict]) -> str:
    """Every number in full, a row for each setting; what a setting has not is blank."""
    buffer = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def leaderboard_table(rows: list[dict], keys: Sequence[str], most: int | None = None) -> list[list[str]]:
    """Header and the first ``most`` rows, as text; ``keys``: the grid's."""
    recalls = [f"{side}_R@{k}" for side in _SHORT.values() for k in RECALL_AT]
    table = [["", *keys, *recalls, "rsum", "to the best [95 % together]", "seeds", "epochs", "verdict"]]
    for place, row in enumerate(rows[:most], 1):
        cells = [str(place), *(str(row[key]) for key in keys)]
        if row["outcome"] == "diverged":
            table.append(
                [*cells, *("–" for _ in recalls), "–", "–", str(row["seeds"]), f"{row['epochs']:g}", "diverged"]
            )
            continue
        cells += [f"{row[name]:.1f}" for name in recalls] + [
            f"{row['rsum']:.1f} [{row['rsum_low']:.1f}, {row['rsum_high']:.1f}]"
        ]
        cells.append(f"{row['difference']:+.1f} [{row['difference_low']:+.1f}, {row['difference_high']:+.1f}]")
        table.append([*cells, str(row["seeds"]), f"{row['epochs']:g}", row["verdict"]])
    return table
