"""The tables of a sweep: results.csv, leaderboard.md and best.yaml."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from onceover.base.files import read_record
from onceover.base.formats import BEST, CONFIG, FINETUNED, LEADERBOARD, PROVENANCE, RESULTS, SWEEP, TRIALS
from onceover.base.outputs import Outputs
from onceover.configs.schema import Config, load_config
from onceover.heads.grid import Setting, trial_name
from onceover.heads.provenance import read_provenance
from onceover.heads.sweep import SweepError
from onceover.retrieval.leaderboard import Judge, leaderboard, leaderboard_table, notes, results_csv
from onceover.retrieval.tables import markdown_table


def write_tables(
    out: Path, settings: Sequence[Setting], judge: Judge, results: dict[str, dict], split: str
) -> list[dict[str, Any]]:
    """Ranks the settings of a sweep, writes its tables into ``out``, and returns the leaderboard, best first.

    Args:
        results: of each trial, by its name, as ``heads.sweep.sweep`` gives them. split: that the trials are ranked on.

    Raises:
        OutputError: a file of somebody else's is in the place of one.
    """
    trials = []
    for setting in settings:
        names = [trial_name(config) for config in setting.configs]
        trials.append((setting.values, names))
    rows = leaderboard(judge, trials, results, split)
    keys = list(settings[0].values)
    texts = {
        RESULTS: results_csv(rows),
        LEADERBOARD: markdown_table(leaderboard_table(rows, keys), notes(rows)),
        BEST: yaml.safe_dump(_config_of(settings, rows[0]).to_dict(), sort_keys=False),
    }
    Outputs(out, "move it elsewhere and sweep again: finished trials are not fitted again").write_texts(texts)
    return rows


def _config_of(settings: Sequence[Setting], row: dict[str, Any]) -> Config:
    """The configuration of a row of the leaderboard."""
    matching = [setting for setting in settings if all(row[key] == value for key, value in setting.values.items())]
    return matching[0].configs[0]


def claim_best(out: Path) -> tuple[Path, Config, bool]:
    """The folder for the run of a sweep's best setting, that setting, and whether a run of another one lies there.

    Raises:
        SweepError: it holds a run that is not of this sweep.
    """
    folder = out / "best"
    best = load_config(out / BEST)
    if not (folder / CONFIG).is_file():
        return folder, best, False
    there = load_config(folder / CONFIG)
    if there == best:
        return folder, best, False
    is_tried = (out / TRIALS / f"{trial_name(there)}.json").is_file()
    if not is_tried or not _is_fit_of(folder, read_record(out / SWEEP, "the sweep")["fingerprints"]):
        raise SweepError(f"{folder} holds a run that this sweep has not made; move it elsewhere")
    return folder, best, True


def _is_fit_of(folder: Path, fingerprints: dict[str, str]) -> bool:
    """Whether a folder holds a finished fit on features of these fingerprints, and no fine-tuning or ensemble."""
    if not (folder / PROVENANCE).is_file() or (folder / FINETUNED).exists():
        return False
    provenance = read_provenance(folder)
    return provenance["fingerprints"] == fingerprints and not {"finetune", "joined", "distilled"} & provenance.keys()
