"""Saves fine-tuned encoders and heads, and makes them a run once the new features are extracted."""

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from onceover.base.files import aside_folder, files_within, read_record
from onceover.base.formats import ENCODERS, FINETUNED
from onceover.configs.schema import FinetuneConfig
from onceover.extract.encoding.stored import repeated_settings
from onceover.extract.store import KINDS
from onceover.heads import checkpoint, replacement
from onceover.heads.checkpoint import Run, RunError
from onceover.heads.finetune_loop import FinetuneError, Training
from onceover.heads.towers import Tower, TunedTower

TOLERANCES = {"float32": 1e-3}  # of the largest number, by which an encoder that is loaded again may differ
HALF_TOLERANCE = 0.05  # the same in half precision

_RECORD = "the record of a fine-tuning"  # finetune.json


class SavedEncoder(NamedTuple):
    """A saved encoder. ``spec``: where it is; ``weights``: the hash of its weights."""

    spec: str
    weights: str


def save_finetuned(
    work: Path,
    folder: Path,
    run: Run,
    training: Training,
    settings: FinetuneConfig,
    specs: Mapping[str, str],
    request: str,
    unfreeze: str,
) -> dict:
    """Writes encoders and heads of the best epoch, or of the last one, history and settings, then ``finetune.json``.

    Args:
        work: the folder to write to. folder: where all of it will lie in the end.
        run: that was fine-tuned. specs: of its encoders.
        request: digest of what was asked for. unfreeze: as it was asked for.

    Returns:
        What ``finetune.json`` says.

    Raises:
        FinetuneError: an encoder cannot be saved.
    """
    training.take_best()
    encoders = {kind: SavedEncoder(specs[kind], run.provenance["recipes"][kind]["weights"]) for kind in KINDS}
    for kind, tower in training.towers.items():
        if isinstance(tower, TunedTower) and training.best_epoch:
            encoders[kind] = _save_encoder(work, folder, tower, run)
    if training.history:
        checkpoint.save_history(work, training.history)
    settings_before = repeated_settings(run.provenance["extract"], run.provenance["recipes"]["text"])
    extract = replace(run.config.extract, **settings_before)
    extract = replace(extract, image_encoder=encoders["image"].spec, text_encoder=encoders["text"].spec)
    checkpoint.save_settings(work, replace(run.config, extract=extract, finetune=settings), run.tokenizer_files)
    checkpoint.save_heads(work, training.heads.cpu(), run.provenance["fingerprints"])
    record = {
        "request": request,
        "encoders": {kind: encoders[kind].spec for kind in specs},
        "weights": {kind: encoders[kind].weights for kind in KINDS},
        "unfreeze": unfreeze,
        "best_epoch": training.best_epoch,
        "epochs": training.epoch,
        "start": training.start,
        "rsum": training.best_rsum,
        "seconds": round(sum(row["seconds"] for row in training.history), 2),
        "base": run.provenance | {"run": str(run.folder.resolve())},
        "device": str(training.towers["image"].device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")},
        "files": checkpoint.files_of_run(work),
    }
    replacement.run_files(work).write_record(FINETUNED, record)
    checkpoint.save_resume(work, {"request": request})
    return record


def try_saving(folder: Path, towers: Mapping[str, Tower], run: Run) -> None:
    """Saves the encoders once before anything is trained, to find those that cannot be saved, and removes them again.

    Raises:
        FinetuneError: one cannot be saved.
    """
    for kind, tower in towers.items():
        if isinstance(tower, TunedTower):
            with aside_folder(folder / kind) as aside:
                _save_checked(aside, tower, run)


def _save_encoder(work: Path, folder: Path, tower: TunedTower, run: Run) -> SavedEncoder:
    """Writes a fine-tuned encoder into the run in ``work``; its spec is that in ``folder``, where the run will lie.

    Raises:
        FinetuneError: loaded again it is another one.
    """
    name = f"{ENCODERS}/{tower.kind}"
    with aside_folder(work / tower.kind) as aside:
        saved = _save_checked(aside, tower, run)
        for file in files_within(aside):
            replacement.run_files(work).move_in(aside / file, f"{name}/{file}")
    spec = saved.spec.replace(str(aside.resolve()), str((folder / name).resolve()))
    return saved._replace(spec=spec)


def _save_checked(aside: Path, tower: TunedTower, run: Run) -> SavedEncoder:
    """Writes a fine-tuned encoder into an empty folder and loads it again, to check that it gives the same features.

    Raises:
        FinetuneError: it does not.
    """
    cannot = (
        f"the {tower.kind} encoder cannot be saved, so that nothing could be kept: unfreeze the other encoder alone"
    )
    try:
        spec = tower.encoder.save(aside).replace(str(aside), str(aside.resolve()))
    except RuntimeError as error:  # weights that do not fit the architecture as it is built
        raise FinetuneError(f"{cannot} ({str(error).splitlines()[0]})") from error
    loaded = run.load_encoder(tower.kind, spec, str(tower.device))
    expected = tower.sample_features(tower.encoder)
    features = tower.sample_features(loaded)
    tolerance = TOLERANCES.get(run.provenance["recipes"][tower.kind]["dtype"], HALF_TOLERANCE)
    if np.abs(features - expected).max() > tolerance * np.abs(expected).max():
        raise FinetuneError(f"{cannot} (loaded again it gives other features)")
    return SavedEncoder(spec, loaded.recipe["weights"])


def read_finetuned(folder: Path) -> dict:
    """Reads ``finetune.json``."""
    return read_record(folder / FINETUNED, _RECORD)


def check_encoder(folder: Path, kind: str, recipe: dict) -> None:
    """Refuses features of an encoder that is not the one that ``finetune`` left in ``folder``.

    Raises:
        RunError: its weights differ.
    """
    if recipe["weights"] != read_finetuned(folder)["weights"][kind]:
        raise RunError(
            f"the {kind} features are not those of the encoder that {folder} was fine-tuned with; "
            "run the same finetune command again with --re-extract"
        )
