"""Writes a run whose heads are put together from those of other runs: an ensemble, or one distilled pair."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from onceover.base.files import digest, only_writer
from onceover.base.formats import EMBEDDINGS, FINETUNED, PROVENANCE
from onceover.configs.schema import Config
from onceover.extract.store import FeatureStore
from onceover.heads import checkpoint
from onceover.heads.checkpoint import RunError
from onceover.heads.embed import embed, write_embeddings
from onceover.heads.models import DualHeads, Ensemble
from onceover.heads.replacement import claim_folder, run_files
from onceover.retrieval.metrics import quality


@dataclasses.dataclass(frozen=True, eq=False)
class Assembled:
    """What a run is to be made of.

    Attributes:
        request: all that it is made from, so that an interrupted call is told from another one.
        make: gives the heads.
        config: the run's settings.
        tokenizer_files: the text encoder's, by name.
        provenance: ``run.json`` but for what is known once the heads are made.
        saw_validation: whether the heads were fitted on the validation images, which cannot tell any more then.
        rsum, betas: of what they are made of, where they were; ``rsum`` is None where it was not measured.
    """

    request: Sequence
    make: Callable[[], DualHeads | Ensemble]
    config: Config
    tokenizer_files: dict[str, bytes]
    provenance: dict
    saw_validation: bool
    rsum: float | None
    betas: dict[str, float | None] | None


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
        rsum = assembled.rsum
        if assembled.saw_validation:
            roles = roles.together()
        else:
            rsum = quality(*embed(heads, store, roles.selection))["rsum"]
        rerank = assembled.config.model.rerank
        with run_files(folder).file(EMBEDDINGS) as aside:
            betas = write_embeddings(store, heads, aside, roles, space, rerank, assembled.betas)
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
