"""Heads that were fitted on one store's features, made into heads on a joined store that has these among others."""

import torch
from torch import Tensor

from onceover.base.files import digest
from onceover.extract.joined import is_joined
from onceover.extract.store import KINDS, FeatureStore
from onceover.heads.checkpoint import Run, RunError
from onceover.heads.models import DualHeads, members_of


def members_on(store: FeatureStore, run: Run) -> list[DualHeads]:
    """A run's pairs of heads, for the features of a store: the run's own, or joined ones that have them among others.

    Numbers of other encoders are multiplied by 0, so that the vectors are the run's own.

    Raises:
        RunError: the store has other features, or is of another dataset.
    """
    fingerprints = run.provenance["fingerprints"]
    if fingerprints == store.fingerprints:
        return members_of(run.heads)
    columns = {kind: _columns(store, kind, fingerprints[kind]) for kind in KINDS}
    image = columns["image"]
    text = columns["text"]
    if image is None or text is None or fingerprints["dataset"] != store.fingerprints["dataset"]:
        raise RunError(
            f"{run.folder} was not fitted on the features of {store.path}; join runs of one store, or name with "
            "--store the one that onceover join made of theirs"
        )
    return [_padded(member, store.dims, {"image": image, "text": text}) for member in members_of(run.heads)]


def _columns(store: FeatureStore, kind: str, fingerprint: str) -> slice | None:
    """Where the features with a fingerprint lie in the store's; None where they do not."""
    if store.fingerprints[kind] == fingerprint:
        return slice(0, store.features(kind).shape[-1])
    if not is_joined(store.recipes[kind]):
        return None
    start = 0
    for recipe, record in zip(store.recipes[kind]["parts"], store.provenance[kind]["parts"], strict=True):
        stop = start + record["dim"]
        if digest(recipe) == fingerprint:
            return slice(start, stop)
        start = stop
    return None


def _padded(member: DualHeads, dims: tuple[int, int], columns: dict[str, slice]) -> DualHeads:
    """The same heads on features of ``dims`` numbers, of which they take some columns."""
    state = member.state_dict()
    for kind, dim in zip(KINDS, dims, strict=True):
        taken = (f"standardize.{kind}.mean", f"standardize.{kind}.scale", f"{kind}.weight", f"{kind}.project.weight")
        for name in taken:
            if name in state:
                state[name] = _with_zeros(state[name], dim, columns[kind])
    heads = DualHeads(*dims, member.config, member.loss)
    heads.load_state_dict(state)
    return heads.eval()


def _with_zeros(tensor: Tensor, size: int, columns: slice) -> Tensor:
    """A tensor's rows at some places of a larger one, (size, …), which is 0 elsewhere."""
    padded = torch.zeros((size, *tensor.shape[1:]), dtype=tensor.dtype)
    padded[columns] = tensor
    return padded
