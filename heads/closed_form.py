"""Heads without training, a CCA in closed form or the features' own space, and their weight beside trained heads."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from onceover.base.progress import ProgressBar, say
from onceover.configs.schema import Config
from onceover.extract.store import FeatureStore, Roles, row_blocks
from onceover.heads.embed import embed
from onceover.heads.models import DualHeads, Projection, ResidualMLP
from onceover.heads.training_data import TrainingData
from onceover.retrieval.closed_form import CCA_CANDIDATES, Linear, align
from onceover.retrieval.metrics import RankPair, clearly_best, is_mostly_noise, quality, report
from onceover.retrieval.ranks import rank
from onceover.retrieval.store_pairs import MIN_TRAIN, has_own_space, most_images, sample

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # weights beside trained heads; 0: left out
CCA_SHARE = 0.4  # a CCA's, beside trained heads that are better; measured (docs/notes/few-images.md)
OWN_SHARE = 0.9  # the own space's, in which nothing was fitted; measured (the same)

Vectors = tuple[np.ndarray, np.ndarray, np.ndarray]  # of images (P, D) and captions (T, D), and the caption map (T,)


class ClosedForm(NamedTuple):
    """Heads that stand beside trained ones.

    Attributes:
        heads: as they are where the validation images choose.
        share: their usual weight.
        again: fits them once more, on the validation images as well, which may take a while.
    """

    heads: DualHeads
    share: float
    again: Callable[[], DualHeads]


def best_closed_form(store: FeatureStore, data: TrainingData, roles: Roles, config: Config, memory: int) -> ClosedForm:
    """The heads without training that are best on the validation images: a CCA, or the features' own space.

    Args:
        data: of the pass that chose the epochs; its chunks are freed.
        memory: bytes; where it is short, the CCA is fitted on a sample of the train images.
    """
    cca = _fitted_cca(store, data, roles, config, memory)
    if not has_own_space(store) or config.training.shuffle_pairs:
        return cca
    if not _all_have_directions(store):
        say("some features are all zeros and have no direction: the features' own space is left out")
        return cca
    own = _own_space(store, config)
    rsums = {}
    for name, heads in (("the CCA", cca.heads), ("the features' own space", own)):
        rsums[name] = quality(*embed(heads, store, roles.selection))["rsum"]
    say(f"rsum on the validation images: {', '.join(f'{rsum:.1f} of {name}' for name, rsum in rsums.items())}")
    if rsums["the CCA"] > rsums["the features' own space"]:
        return cca
    return ClosedForm(own, OWN_SHARE, lambda: own)


def _fitted_cca(store: FeatureStore, data: TrainingData, roles: Roles, config: Config, memory: int) -> ClosedForm:
    """A regularised CCA of the standardised features, averaged over an image's views."""
    say("aligning in closed form (CCA)")
    _, image_index = data.chunks_of(config)
    data.release()
    most = max(MIN_TRAIN, most_images(store, len(roles.selection), memory))
    if most < len(roles.train):
        say(f"the CCA is fitted on {most:,} of {len(roles.train):,} images, as many as fit the memory")
    with ProgressBar("cca", "candidates", total=CCA_CANDIDATES) as bar:
        train = data.averaged(sample(roles.train, most), image_index).numpy()
        validation = data.averaged(roles.selection, image_index).numpy()
        aligned = align(train, validation, bar.update)
    settings = dict(aligned.settings)
    rsum = settings.pop("selection_rsum")
    chosen = ", ".join(f"{key} {value}" for key, value in settings.items())
    say(f"the CCA's settings: {chosen} (rsum {rsum} on the validation images)")
    heads = _cca_heads(store, data, config, aligned.linear)

    def again() -> DualHeads:
        if config.training.shuffle_pairs:  # the validation images have their own captions
            return heads
        return _cca_heads(store, data, config, aligned.fit_both())

    return ClosedForm(heads, CCA_SHARE, again)


def _cca_heads(store: FeatureStore, data: TrainingData, config: Config, linear: Linear) -> DualHeads:
    """A CCA's maps as heads, which standardise features first."""
    assert linear.image_map is not None, "a CCA has two maps"
    assert linear.text_map is not None, "a CCA has two maps"
    maps = (torch.from_numpy(linear.image_map), torch.from_numpy(linear.text_map))
    heads = _linear_heads(store, config, *maps)
    for kind, layer in data.standardize.items():
        heads.standardize[kind].load_state_dict(layer.state_dict())
    return heads


def _own_space(store: FeatureStore, config: Config) -> DualHeads:
    """Heads that compare features as they are: they standardise nothing, and their maps are identities.

    An image's vector is the mean of its views' unit vectors, as everywhere in heads; ``zero_shot`` among the baselines
    takes the mean of the views' features.
    """
    image_dim, text_dim = store.dims
    return _linear_heads(store, config, torch.eye(image_dim), torch.eye(text_dim))


def _all_have_directions(store: FeatureStore) -> bool:
    """Whether no row of the store's features is all zeros, those of all views of an image included."""
    for features in (store.image_features, store.text_features):
        for rows in row_blocks(len(features)):
            if not np.any(features[rows], axis=-1).all():
                return False
    return True


def _linear_heads(store: FeatureStore, config: Config, image_map: Tensor, text_map: Tensor) -> DualHeads:
    """Linear heads of two matrices, (image_dim, embedding_dim) and (text_dim, embedding_dim), on plain features."""
    model = dataclasses.replace(config.model, head="linear", embedding_dim=image_map.shape[1])
    heads = DualHeads(*store.dims, model, config.training.loss).eval()
    set_linear(heads.image, image_map, torch.zeros(image_map.shape[1]))
    set_linear(heads.text, text_map, torch.zeros(text_map.shape[1]))
    return heads


@torch.no_grad()
def set_linear(projection: Projection | ResidualMLP, weight: Tensor, bias: Tensor) -> None:
    """Makes a linear head the map of a matrix, (in_dim, out_dim), and a vector, (out_dim,)."""
    assert isinstance(projection, Projection)
    projection.weight.copy_(weight)
    projection.bias.copy_(bias)


def chosen_share(trained: Vectors, closed_form: Vectors, usual: float) -> float:
    """The weight of a closed form beside trained heads, chosen on the validation images; 0 where it does harm.

    It is the usual weight, or the one of ``SHARES`` with the best rsum where that is clearly better. Where the closed
    form is the better one of both, the usual weight is its part of the sum of their rsums, to the nearest tenth, if
    that is more. Where both have learned next to nothing it is the highest one, since trained heads would add noise.

    Args:
        trained, closed_form: the validation images' and captions' unit vectors.
        usual: one of ``SHARES``.
    """
    trained_ranks = rank(*trained)
    closed_ranks = rank(*closed_form)
    trained_rsum = report([trained_ranks], draws=0)["rsum"]
    closed_rsum = report([closed_ranks], draws=0)["rsum"]
    if is_mostly_noise(trained_ranks, closed_ranks):
        say(
            "next to nothing was learned: on the validation images a caption ranks its image before another one little "
            "more often than by chance"
        )
        usual = SHARES[-1]
    elif closed_rsum > trained_rsum:
        part = closed_rsum / (closed_rsum + trained_rsum)
        usual = max(usual, min(SHARES, key=lambda share: abs(share - part)))
    ranks = {share: _mixed_ranks(trained, closed_form, share) for share in SHARES}
    chosen = clearly_best(ranks, usual)
    rsum = report([ranks[chosen]], draws=0)["rsum"]
    say(
        f"rsum on the validation images: {trained_rsum:.1f} of the trained heads, {closed_rsum:.1f} of the heads "
        f"without training, {rsum:.1f} of both together, with a weight of {chosen:g} for those without training"
    )
    if chosen == 0:
        say("the heads without training do harm beside the trained ones there, and are left out")
    elif closed_rsum >= rsum:
        say("the trained heads add nothing to those without there: more images, or other settings, may change that")
    return chosen


def _mixed_ranks(trained: Vectors, closed_form: Vectors, share: float) -> RankPair:
    """The ranks by weighted means of two models' scores. ``share``: of the second one."""
    images = np.concatenate([trained[0] * (1 - share) ** 0.5, closed_form[0] * share**0.5], axis=1)
    texts = np.concatenate([trained[1] * (1 - share) ** 0.5, closed_form[1] * share**0.5], axis=1)
    return rank(images, texts, trained[2])
