"""Distils an ensemble of linear heads into one pair, in closed form: its recall at one pair's cost in search."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onceover.base.formats import EMBEDDINGS
from onceover.base.progress import say
from onceover.configs.schema import Config
from onceover.extract.store import KINDS, FeatureStore, row_blocks
from onceover.heads.assembling import Assembled, write_assembled
from onceover.heads.checkpoint import Run, RunError
from onceover.heads.chunks import Features, blocks
from onceover.heads.closed_form import set_linear
from onceover.heads.models import DualHeads, Projection, Standardize, members_of, weights_of
from onceover.retrieval.embeddings import Embeddings, read_embeddings


def distill(store: FeatureStore, run: Run, folder: str | Path, dim: int | None = None) -> dict:
    """Makes one pair of linear heads of a run's members, and writes the run folder.

    The members' vectors side by side lie in few directions, since all were taught the same. So the principal directions
    of the train images' and captions' vectors hold nearly all of their inner products. What leads from the
    features to these directions is linear but for the lengths of the members' vectors, in whose place their mean
    length stands.

    Args:
        store: whose features the run was fitted on.
        dim: dimensions of the new pair; by default those of the run's first member.

    Returns:
        The new run's provenance.

    Raises:
        RunError: a run of one pair already, of heads that are not linear or of other features; more dimensions than
            the run has; or a folder that is not empty.
    """
    members = members_of(run.heads)
    if len(members) < 2:
        raise RunError(f"{run.folder} has one pair of heads; distil an ensemble, as of training.members=3")
    if any(member.config.head != "linear" for member in members):
        raise RunError(f"{run.folder} has heads that are not linear, and one linear pair cannot do what they do")
    if run.provenance["fingerprints"] != store.fingerprints:
        raise RunError(f"{run.folder} was not fitted on the features of {store.path}; name its own store with --store")
    for kind in KINDS:
        if len({bool(_standardize(member, kind).root) for member in members}) > 1:
            raise RunError(
                f"{run.folder} has members that take the square roots of the {kind} features and others that do not, "
                "and no linear pair can do both; distil an ensemble of runs that were fitted on the same images"
            )
    if dim is None:
        dim = members[0].embedding_dim
    most = sum(member.embedding_dim for member in members)
    if not 1 <= dim <= most:
        raise RunError(
            f"{run.folder} has {most} dimensions, which cannot be made into {dim}; give a --dim up to {most}"
        )
    provenance = run.provenance | {"distilled": str(run.folder.resolve())}
    return write_assembled(
        store,
        folder,
        Assembled(
            request=["distilled", run.provenance["space"], dim],
            parts=[run],
            make=lambda: _distilled(store, run, dim),
            config=_config(run.config, dim),
            tokenizer_files=run.tokenizer_files,
            provenance=provenance,
        ),
    )


def _config(config: Config, dim: int) -> Config:
    """A run's settings, for one linear pair of heads of ``dim`` dimensions."""
    model = dataclasses.replace(config.model, head="linear", embedding_dim=dim)
    return dataclasses.replace(config, model=model)


def _distilled(store: FeatureStore, run: Run, dim: int) -> DualHeads:
    """The pair of heads of ``dim`` dimensions."""
    embeddings = read_embeddings(run.folder / EMBEDDINGS)
    directions, kept = principal_directions(embeddings, dim)
    say(f"{dim} dimensions hold {100 * kept:.2f} % of the squared lengths that {run.folder} has in {len(directions)}")
    train, captions, _ = embeddings.split("train")
    rows = {"image": train, "text": captions}
    features: dict[str, Features] = {"image": store.image_features, "text": store.text_features}
    members = members_of(run.heads)
    heads = DualHeads(*store.dims, _config(run.config, dim).model, members[0].loss)
    with torch.no_grad():
        for name, scalar in heads.scalars.items():
            scalar.copy_(members[0].scalars[name])
    parts = directions.split([member.embedding_dim for member in members])
    for kind in KINDS:
        common = _common_standardize(members, kind)
        heads.standardize[kind].load_state_dict(common.state_dict())
        weight = torch.zeros(common.mean.shape[0], dim)
        bias = torch.zeros(dim)
        for member, share, part in zip(members, weights_of(run.heads), parts, strict=True):
            length = _mean_length(member, kind, features[kind], rows[kind])
            own_weight, own_bias = _in_terms_of(common, member, kind)
            weight += own_weight @ part * (share**0.5 / length)
            bias += own_bias @ part * (share**0.5 / length)
        set_linear(_head(heads, kind), weight, bias)
    return heads.eval()


def principal_directions(embeddings: Embeddings, dim: int) -> tuple[Tensor, float]:
    """The leading eigenvectors, float32 (D, dim), of the train vectors' second moments, images' and captions' alike.

    Returns:
        Them, and the share of the vectors' squared lengths that they hold.
    """
    train, captions, _ = embeddings.split("train")
    moments = np.zeros((embeddings.images.shape[1],) * 2)
    for vectors, rows in ((embeddings.images, train), (embeddings.texts, captions)):
        for block in row_blocks(len(rows)):
            taken = vectors[rows[block]]
            moments += taken.T @ taken / len(rows)
    values, basis = np.linalg.eigh(moments)
    kept = float(values[-dim:].sum() / values.sum())
    return torch.from_numpy(basis[:, ::-1][:, :dim].astype(np.float32)), kept


def _head(heads: DualHeads, kind: str) -> Projection:
    """The head of a kind, ``image`` or ``text``, which is linear."""
    head = heads.image if kind == "image" else heads.text
    assert isinstance(head, Projection)
    return head


def _standardize(heads: DualHeads, kind: str) -> Standardize:
    """The layer that standardises the features of a kind."""
    layer = heads.standardize[kind]
    assert isinstance(layer, Standardize)
    return layer


def _common_standardize(members: Sequence[DualHeads], kind: str) -> Standardize:
    """A layer that standardises each feature as the first member does that takes it; one that none takes becomes 0."""
    layers = [_standardize(member, kind) for member in members]
    common = Standardize(len(layers[0].mean))
    common.root.copy_(layers[0].root)
    common.scale.zero_()
    for layer in layers:
        is_new = (common.scale == 0) & (layer.scale > 0)
        common.mean.copy_(torch.where(is_new, layer.mean, common.mean))
        common.scale.copy_(torch.where(is_new, layer.scale, common.scale))
    return common


@torch.inference_mode()
def _mean_length(member: DualHeads, kind: str, features: Features, rows: np.ndarray) -> float:
    """The mean length of a member's vectors, of views or of captions, before they are normalised."""
    total = 0.0
    count = 0
    head = _head(member, kind)
    layer = _standardize(member, kind)
    for block in blocks(features, rows):
        lengths = head(layer(block)).norm(dim=-1)
        total += float(lengths.double().sum())
        count += lengths.numel()
    return total / count


@torch.no_grad()
def _in_terms_of(common: Standardize, member: DualHeads, kind: str) -> tuple[Tensor, Tensor]:
    """A member's weight and bias for features that another layer standardises."""
    own = _standardize(member, kind)
    head = _head(member, kind)
    scale = torch.where(common.scale > 0, own.scale / common.scale, 0.0)
    shift = (common.mean - own.mean) * own.scale
    return head.weight * scale[:, None], head.bias + shift @ head.weight
