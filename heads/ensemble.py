"""Joins several fitted runs into one: their heads side by side, saved as a run like any other."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onceover.base.files import digest, only_writer
from onceover.base.formats import EMBEDDINGS, FINETUNED, PROVENANCE
from onceover.extract.store import KINDS, FeatureStore
from onceover.heads import checkpoint
from onceover.heads.checkpoint import Run, RunError
from onceover.heads.embed import embed, write_embeddings
from onceover.heads.models import DualHeads, Ensemble, members_of, weights_of
from onceover.heads.replacement import claim_folder, run_files
from onceover.retrieval.metrics import quality


def ensemble(store: FeatureStore, runs: Sequence[Run], folder: str | Path) -> dict:
    """Joins runs that were fitted on ``store`` and writes the run folder; members may differ in all their settings.

    Where members were refitted with the validation images, these can tell nothing of the ensemble: it gets the mean of
    its members' rsum, and of the sharpness of their hubness corrections.

    Returns:
        The run's provenance.

    Raises:
        RunError: fewer than two runs, runs of other features, or a folder that is not empty.
    """
    folder = Path(folder)
    _check_runs(store, runs)
    members: list[DualHeads] = []
    weights: list[float] = []
    for run in runs:
        members += members_of(run.heads)
        weights += [weight / len(runs) for weight in weights_of(run.heads)]
    heads = Ensemble(members, weights).eval()
    roles = store.roles()
    first = runs[0]
    with only_writer(folder, "the run"):
        request = digest([run.provenance["space"] for run in runs])
        _claim(folder, request)
        checkpoint.save_resume(folder, {"request": request})
        refit = any(run.config.training.refit for run in runs)
        training = dataclasses.replace(first.config.training, refit=refit)
        checkpoint.save_settings(folder, dataclasses.replace(first.config, training=training), first.tokenizer_files)
        space = checkpoint.save_heads(folder, heads, store.fingerprints)
        betas = None
        if refit:  # the validation images cannot choose any more
            roles = roles.together()
            rsum = float(np.mean([run.provenance["selection"]["rsum"] for run in runs]))
            betas = {kind: float(np.mean([run.provenance["betas"][kind] for run in runs])) for kind in KINDS}
        else:
            rsum = quality(*embed(heads, store, roles.selection))["rsum"]
        rerank = first.config.model.rerank
        with run_files(folder).file(EMBEDDINGS) as aside:
            betas = write_embeddings(store, heads, aside, roles, space, rerank, betas)
        provenance = first.provenance | {
            "request": request,
            "space": space,
            "store": str(store.path.resolve()),
            "members": checkpoint.member_settings(heads),
            "epochs": _collected(runs, "epochs"),
            "best_epochs": _collected(runs, "best_epochs"),
            "joined": [str(run.folder.resolve()) for run in runs],
            "betas": betas,
            "train_pictures": len(roles.train),
            "selection": first.provenance["selection"] | {"rsum": rsum},
            "seconds": sum(run.provenance["seconds"] for run in runs),
        }
        checkpoint.save_provenance(folder, provenance)
    return checkpoint.read_provenance(folder)


def _check_runs(store: FeatureStore, runs: Sequence[Run]) -> None:
    """Refuses runs that cannot be joined.

    Raises:
        RunError: fewer than two, or one of other features.
    """
    if len(runs) < 2:
        raise RunError("an ensemble takes at least two runs")
    for run in runs:
        if run.provenance["fingerprints"] != store.fingerprints:
            raise RunError(f"{run.folder} was not fitted on the features of {store.path}; join runs of one store")


def _claim(folder: Path, request: str) -> None:
    """Refuses a folder that holds anything but the same ensemble, interrupted.

    Raises:
        RunError: it holds something else.
    """
    claim_folder(folder)
    if (folder / PROVENANCE).exists() or (folder / FINETUNED).exists():
        raise RunError(f"{folder} holds a run; name a new folder")
    try:
        checkpoint.load_resume(folder, request)
    except RunError as error:
        raise RunError(f"{folder} holds an interrupted fit of something else; name a new folder") from error


def _collected(runs: Sequence[Run], key: str) -> list:
    """The lists that the runs' provenances hold under a key, one after the other."""
    values: list = []
    for run in runs:
        values += run.provenance[key]
    return values
