"""Joins several fitted runs into one: their heads side by side, saved as a run like any other."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from onceover.extract.store import KINDS, FeatureStore
from onceover.heads.assembling import Assembled, write_assembled
from onceover.heads.checkpoint import Run, RunError
from onceover.heads.models import DualHeads, Ensemble, weights_of
from onceover.heads.padding import members_on


def ensemble(
    store: FeatureStore, runs: Sequence[Run], folder: str | Path, weights: Sequence[float] | None = None
) -> dict:
    """Joins runs that were fitted on ``store`` and writes the run folder; members may differ in all their settings.

    Of runs of several stores, such as one of fine-tuned encoders, ``store`` is the one that was joined of these.

    Where members were refitted with the validation images, these can tell nothing of the ensemble: it gets the mean of
    its members' rsum, and of the sharpness of their corrections for hubs, or none where one of them corrects nothing.

    Args:
        weights: how much each run counts, in whatever unit; by default all the same.

    Returns:
        The run's provenance.

    Raises:
        RunError: fewer than two runs, weights that are not one above 0 for each, runs of other features, or a folder
            that is not empty.
    """
    if len(runs) < 2:
        raise RunError("an ensemble takes at least two runs")
    shares = _shares(weights or [1.0] * len(runs), len(runs))
    members = [members_on(store, run) for run in runs]
    first = runs[0]
    training = dataclasses.replace(first.config.training, refit=any(run.saw_validation for run in runs))
    provenance = first.provenance | {
        "epochs": _collected(runs, "epochs"),
        "best_epochs": _collected(runs, "best_epochs"),
        "joined": [str(run.folder.resolve()) for run in runs],
        "seconds": sum(run.provenance["seconds"] for run in runs),
        "fingerprints": store.fingerprints,
        "recipes": store.recipes,
        "encoders": {kind: store.provenance[kind] for kind in KINDS},
        "extract": store.provenance["settings"],
        "dims": dict(zip(KINDS, store.dims, strict=True)),
    }
    provenance.pop("finetune", None)  # of one of them
    return write_assembled(
        store,
        folder,
        Assembled(
            request=[[run.provenance["space"] for run in runs], shares],
            parts=runs,
            make=lambda: _side_by_side(members, shares, [weights_of(run.heads) for run in runs]),
            config=dataclasses.replace(first.config, training=training),
            tokenizer_files=store.tokenizer_files,
            provenance=provenance,
        ),
    )


def _shares(weights: Sequence[float], count: int) -> list[float]:
    """Weights as shares of 1.

    Raises:
        RunError: they are not ``count`` numbers above 0.
    """
    if len(weights) != count or not all(0 < weight < math.inf for weight in weights):
        raise RunError(
            f"the weights are {', '.join(map(str, weights))}; give a number above 0 for each of {count} runs"
        )
    return [weight / sum(weights) for weight in weights]


def _side_by_side(
    members: Sequence[list[DualHeads]], shares: Sequence[float], weights: Sequence[Sequence[float]]
) -> Ensemble:
    """All members of all runs. ``shares``: of the runs. ``weights``: of the members within each."""
    of_members = []
    for share, within in zip(shares, weights, strict=True):
        of_members += [share * weight for weight in within]
    return Ensemble(list(chain(*members)), of_members).eval()


def _collected(runs: Sequence[Run], key: str) -> list:
    """The lists that the runs' provenances hold under a key, one after the other."""
    values: list = []
    for run in runs:
        values += run.provenance[key]
    return values
