"""The sanity check of a run: heads that are trained on shuffled pairs, which must score at chance."""

from pathlib import Path

from onceover.base.formats import CONFIG, EMBEDDINGS, SHUFFLED
from onceover.base.progress import say
from onceover.configs.schema import load_config
from onceover.extract.encoding.devices import pick_device
from onceover.extract.store import FeatureStore
from onceover.heads.provenance import RunError
from onceover.heads.replacement import run_files
from onceover.heads.training import fit
from onceover.retrieval.embeddings import Embeddings, read_embeddings

_MARK = "sanity-check.txt"  # tells a sanity check from a run of the user's that trains on shuffled pairs, too


def fit_shuffled(folder: Path, store: FeatureStore, memory: int | None, device: str | None) -> Embeddings:
    """Fits the sanity check into the folder of a run, and returns its embeddings.

    A sanity check of an earlier store or of other settings is replaced.

    Raises:
        RunError: its folder holds something else.
    """
    say("fitting the sanity check: heads of shuffled pairs")
    shuffled = folder / SHUFFLED
    if shuffled.is_symlink():
        raise RunError(f"{shuffled} is a link, and the sanity check is fitted there; move it elsewhere")
    single = {"shuffle_pairs": "true", "members": 1, "cca": "false", "refit": "false"}
    config = load_config(folder / CONFIG, [f"training.{key}={value}" for key, value in single.items()])
    try:
        fit(store, shuffled, config, memory=memory, device=pick_device(device))
    except RunError:
        if not run_files(shuffled).holds(_MARK):
            raise RunError(
                f"{shuffled} holds another run, and the sanity check is fitted there; move it elsewhere"
            ) from None
        fit(store, shuffled, config, memory=memory, device=pick_device(device), force=True)
    run_files(shuffled).write_text(_MARK, "A sanity check, made by evaluate --shuffled, which may replace it.\n")
    return read_embeddings(shuffled / EMBEDDINGS)
