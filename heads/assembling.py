"""Writes a run whose heads are put together from those of other runs: an ensemble, or one distilled pair."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from onceover.base.files import digest, only_writer
from onceover.base.formats import EMBEDDINGS, FINETUNED, PROVENANCE
from onceover.configs.schema import Config
from onceover.extract.store import FeatureStore
from onceover.heads import checkpoint
from onceover.heads.checkpoint import Run, RunError
from onceover.heads.embed import embed, write_embeddings
from onceover.heads.models import DualHeads, Ensemble
from onceover.heads.replacement import claim_folder, run_files
from onceover.retrieval.hubness import inherited_betas
from onceover.retrieval.metrics import quality


@dataclasses.dataclass(frozen=True, eq=False)
class Assembled:
    """What a run is to be made of.

    Attributes:
        request: all that it is made from, so that an interrupted call is told from another one.
        parts: the runs that it is made from.
        make: gives the heads.
        config: the run's settings; ``training.refit`` where one of the parts was fitted on the validation images.
        tokenizer_files: the text encoder's, by name.
        provenance: ``run.json`` but for what is known once the heads are made.
    """

    request: Sequence
    parts: Sequence[Run]
    make: Callable[[], DualHeads | Ensemble]
    config: Config
    tokenizer_files: dict[str, bytes]
    provenance: dict


def write_assembled(store: FeatureStore, folder: str | Path, assembled: Assembled) -> dict:
    """Writes the run folder; returns the run's provenance.

    Raises:
        RunError: a folder that is not empty.
    """
    folder = Path(folder)
    roles = store.roles()
    request = digest(assembled.request)
    with only_writer(folder, "the run"):
        _claim(folder, request)
        checkpoint.save_resume(folder, {"request": request})
        heads = assembled.make()
        checkpoint.save_settings(folder, assembled.config, assembled.tokenizer_files)
        space = checkpoint.save_heads(folder, heads, store.fingerprints)
        inherited = None
        if assembled.config.training.refit:  # the validation images cannot tell any more
            roles = roles.together()
            rsum = _mean_rsum(assembled.parts)
            inherited = inherited_betas(*(run.provenance["betas"] for run in assembled.parts))
        else:
            rsum = quality(*embed(heads, store, roles.selection))["rsum"]
        rerank = assembled.config.model.rerank
        with run_files(folder).file(EMBEDDINGS) as aside:
            betas = write_embeddings(store, heads, aside, roles, space, rerank, inherited)
        provenance = assembled.provenance | {
            "request": request,
            "space": space,
            "store": str(store.path.resolve()),
            "members": checkpoint.member_settings(heads),
            "betas": betas,
            "train_pictures": len(roles.train),
            "selection": assembled.provenance["selection"] | {"rsum": rsum},
        }
        checkpoint.save_provenance(folder, provenance)
    return checkpoint.read_provenance(folder)


def _mean_rsum(runs: Sequence[Run]) -> float | None:
    """The mean of the runs' rsums on the validation images; None where one was not measured."""
    rsums = [run.provenance["selection"]["rsum"] for run in runs]
    return None if None in rsums else sum(rsums) / len(rsums)


def _claim(folder: Path, request: str) -> None:
    """Refuses a folder that holds anything but the same run, interrupted.

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
