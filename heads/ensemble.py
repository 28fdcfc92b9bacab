"""Several fitted runs as one: their heads side by side, saved as a run like any other."""

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
from onceover.heads.models import DualHeads, Ensemble
from onceover.heads.replacement import claim_folder, run_files
from onceover.retrieval.metrics import quality


def ensemble(store: FeatureStore, runs: Sequence[Run], folder: str | Path) -> dict:
    """Joins runs that were fitted on ``store`` and writes the run folder; members may differ in all their settings.

    Where members were refitted with the validation images, these can tell nothing of the whole: it gets the mean of
    its members' rsum, and of their corrections' betas.

    Returns:
        The run's provenance.

    Raises:
        RunError: fewer than two runs, runs of other features, or a folder that is not empty.
    """
    folder = Path(folder)
    if len(runs) < 2:
        raise RunError("an ensemble takes at least two runs")
    for run in runs:
        if run.provenance["fingerprints"] != store.fingerprints:
            raise RunError(f"{run.folder} was not fitted on the features of {store.path}; join runs of one store")
    roles, first = store.roles(), runs[0]
    members: list[DualHeads] = []
    for run in runs:
        members += run.heads.members if isinstance(run.heads, Ensemble) else [run.heads]
    heads = Ensemble(members).eval()
    with only_writer(folder, "the run"):
        request = digest([run.provenance["space"] for run in runs])
        claim_folder(folder)
        if (folder / PROVENANCE).exists() or (folder / FINETUNED).exists():
            raise RunError(f"{folder} holds a run; name a new folder")
        try:
            checkpoint.load_resume(folder, request)
        except RunError as error:
            raise RunError(f"{folder} holds an interrupted fit of something else; name a new folder") from error
        checkpoint.save_resume(folder, {"request": request})
        refit = any(run.config.training.refit for run in runs)
        training = dataclasses.replace(first.config.training, refit=refit)
        checkpoint.save_settings(folder, dataclasses.replace(first.config, training=training), first.tokenizer_files)
        space = checkpoint.save_heads(folder, heads, store.fingerprints)
        if refit:  # the validation images cannot choose any more
            roles = roles.together()
            rsum = float(np.mean([run.provenance["selection"]["rsum"] for run in runs]))
            betas = {side: float(np.mean([run.provenance["betas"][side] for run in runs])) for side in KINDS}
        else:
            rsum, betas = quality(*embed(heads, store, roles.selection))["rsum"], None
        rerank = first.config.model.rerank
        with run_files(folder).file(EMBEDDINGS) as aside:
            betas = write_embeddings(store, heads, aside, roles, space, rerank, betas)
        made = first.provenance | {
            "request": request,
            "space": space,
            "store": str(store.path.resolve()),
            "members": [settings for run in runs for settings in run.provenance["members"]],
            **{key: [one for run in runs for one in run.provenance[key]] for key in ("epochs", "best_epochs")},
            "joined": [str(run.folder.resolve()) for run in runs],
            "betas": betas,
            "train_pictures": len(roles.train),
            "selection": first.provenance["selection"] | {"rsum": rsum},
            "seconds": sum(run.provenance["seconds"] for run in runs),
        }
        checkpoint.save_provenance(folder, made)
    return checkpoint.read_provenance(folder)
