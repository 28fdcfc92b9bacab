"""Joins several fitted runs into one: their heads side by side, saved as a run like any other."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onceover.extract.store import KINDS, FeatureStore
from onceover.heads.assembling import Assembled, check_store, write_assembled
from onceover.heads.checkpoint import Run, RunError
from onceover.heads.models import DualHeads, Ensemble, members_of, weights_of
from onceover.retrieval.hubness import NO_CORRECTION


def ensemble(store: FeatureStore, runs: Sequence[Run], folder: str | Path) -> dict:
    """Joins runs that were fitted on ``store`` and writes the run folder; members may differ in all their settings.

    Where members were refitted with the validation images, these can tell nothing of the ensemble: it gets the mean of
    its members' rsum, and of the sharpness of their corrections for hubs, or none where one of them corrects nothing.

    Returns:
        The run's provenance.

    Raises:
        RunError: fewer than two runs, runs of other features, or a folder that is not empty.
    """
    if len(runs) < 2:
        raise RunError("an ensemble takes at least two runs")
    for run in runs:
        check_store(store, run, "join runs of one store")
    first = runs[0]
    refit = any(run.config.training.refit for run in runs)
    rsum = None
    betas = None
    if refit:
        rsum = float(np.mean([run.provenance["selection"]["rsum"] for run in runs]))
        betas = {kind: _common_beta([run.provenance["betas"][kind] for run in runs]) for kind in KINDS}
    provenance = first.provenance | {
        "epochs": _collected(runs, "epochs"),
        "best_epochs": _collected(runs, "best_epochs"),
        "joined": [str(run.folder.resolve()) for run in runs],
        "seconds": sum(run.provenance["seconds"] for run in runs),
    }
    return write_assembled(
        store,
        folder,
        Assembled(
            request=[run.provenance["space"] for run in runs],
            make=lambda: _side_by_side(runs),
            config=dataclasses.replace(first.config, training=dataclasses.replace(first.config.training, refit=refit)),
            tokenizer_files=first.tokenizer_files,
            provenance=provenance,
            rsum=rsum,
            betas=betas,
        ),
    )


def _side_by_side(runs: Sequence[Run]) -> Ensemble:
    """All members of all runs; each run has the same weight."""
    members: list[DualHeads] = []
    weights: list[float] = []
    for run in runs:
        members += members_of(run.heads)
        weights += [weight / len(runs) for weight in weights_of(run.heads)]
    return Ensemble(members, weights).eval()


def _common_beta(betas: Sequence[float]) -> float:
    """The mean sharpness of several corrections for hubs; none where one of them corrects nothing."""
    if NO_CORRECTION in betas:
        return NO_CORRECTION
    return float(np.mean(betas))


def _collected(runs: Sequence[Run], key: str) -> list:
    """The lists that the runs' provenances hold under a key, one after the other."""
    values: list = []
    for run in runs:
        values += run.provenance[key]
    return values
