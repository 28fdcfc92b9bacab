"""Fitting one pair of heads on cached features: the run folder, choosing the epoch, and an exact resume."""

import dataclasses
import platform
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs import OnceoverError
from configs.formats import EMBEDDINGS, PROVENANCE
from configs.schema import Config
from extract.files import digest, only_writer
from extract.memory import default_memory
from extract.store import FeatureStore, Roles
from heads import checkpoint
from heads.chunks import Chunks, blocks, chunks_for, standardised
from heads.embed import CorrectHubs, check_units, embed, write_embeddings
from heads.models import DualHeads, Ensemble, Standardize, unit
from heads.seeds import seed_for
from heads.stacking import Point, advance, steps_an_epoch

SAVE_EVERY = 10.0  # seconds, at least, from one save of an unfinished fit to the next: what a kill can cost
#: images (N, D), texts (M, D), image_index (M,) -> a report with "rsum" and both directions' recalls
Quality = Callable[[np.ndarray, np.ndarray, np.ndarray], dict]
#: train and selection features with their caption maps, a step -> settings, and what has an image_map and a text_map
Align = Callable[[tuple, tuple, Callable[[], object]], tuple[dict, Any]]


class TrainingError(OnceoverError):
    """A fit that cannot start or cannot go on."""


def fit(
    store: FeatureStore,
    folder: str | Path,
    config: Config,
    *,
    quality: Quality,
    correct_hubs: CorrectHubs,
    align: Align | None = None,
    device: str | torch.device = "cpu",
    memory: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict:
    """Fits heads on the store's train pictures and writes the run folder; goes on with an interrupted fit.

    The heads kept are those of the epoch with the best rsum on the selection pictures; with ``training.members`` those
    of each seed, side by side as one space.

    Args:
        quality: measures the heads on the selection pictures: ``retrieval.metrics.quality``.
        correct_hubs: gives the embeddings their biases: ``retrieval.hubness.fit_inverted_softmax``.
        align: fits linear maps in closed form, for ``training.cca``: ``retrieval.baselines.align``.
        memory: bytes that the fit may take; where the features do not fit, they are read in shuffled chunks. By
            default half of the machine's. An interrupted fit goes on with the chunks it was begun with.

    Returns:
        The run's provenance, as in ``run.json``.

    Raises:
        RunError: the folder holds another run. TrainingError: the loss is not finite. StoreError: too few splits.
    """
    folder = Path(folder)
    roles = store.roles()
    settings = {"model": config.to_dict()["model"], "training": config.to_dict()["training"]}
    request = digest({"settings": settings, "fingerprints": store.fingerprints})
    with only_writer(folder, "the run"):
        if folder.exists() and any(folder.iterdir()) and not checkpoint.holds_run(folder):
            raise checkpoint.RunError(f"{folder} is not empty and no run; name a new folder")
        if force:
            checkpoint.clear_run(folder)
        elif (folder / PROVENANCE).exists():
            before = checkpoint.read_provenance(folder)
            if before["request"] == request:
                say(f"{folder} is fitted with these settings on this store already; --force fits again")
                return before
            raise checkpoint.RunError(
                f"{folder} holds a run of other settings or features; name another --run, or --force"
            )
        if checkpoint.load_resume(folder, request) is None:
            checkpoint.save_resume(folder, {"request": request})
        checkpoint.save_settings(folder, config, store.tokenizer_files)
        place = torch.device(device), memory or default_memory()
        measures = quality, align
        points, members, chunks, seconds = _train(store, roles, folder, config, request, *measures, *place, say)
        heads = members[0] if len(members) == 1 else Ensemble(members).eval()
        rsum = points[0].best_rsum if len(members) == 1 else quality(*embed(heads, store, roles.selection))["rsum"]
        space = checkpoint.save_heads(folder, heads, store.fingerprints)
        say("embedding everything, and choosing the correction for hubs")
        write_embeddings(store, heads, folder / EMBEDDINGS, roles, space, config.model.rerank, correct_hubs)
        provenance = {
            "request": request,
            "space": space,
            "members": [settings["model"] | {"embedding_dim": member.embedding_dim} for member in members],
            "store": str(store.path.resolve()),
            "fingerprints": store.fingerprints,
            "recipes": store.recipes,
            "encoders": {kind: store.provenance[kind] for kind in ("image", "text")},
            "extract": store.provenance["settings"],
            "dims": {"image": store.image_features.shape[2], "text": store.text_features.shape[1]},
            "selection": {"split": roles.selection_name, "pictures": len(roles.selection), "rsum": rsum},
            "report": {"split": roles.report_name, "pictures": len(roles.report)},
            "train_pictures": len(roles.train),
            "chunks": chunks,
            "epochs": [point.epoch for point in points],
            "best_epochs": [point.best_epoch for point in points],
            "seconds": seconds,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
        }
        checkpoint.save_provenance(folder, provenance)
    return checkpoint.read_provenance(folder)


class Data:
    """What fits on a store pass over: its train pictures' standardised features, in memory or in chunks.

    Args:
        memory: bytes that the features may take, ``count``: chunks, where they were counted before.

    Attributes:
        standardize: the layers, by ``image`` and ``text``, fitted on the train pictures. dims: of the features.
        count: into how many chunks the features are dealt.
    """

    def __init__(self, store: FeatureStore, roles: Roles, device: torch.device, memory: int, count: int | None = None):
        self._store, self._roles, self._device = store, roles, device
        self.captions = np.flatnonzero(np.isin(store.image_index, roles.train))
        self.count = count or chunks_for(store, roles.train, len(self.captions), memory)
        self.dims = store.image_features.shape[2], store.text_features.shape[1]
        self.standardize = {kind: Standardize(dim) for kind, dim in zip(("image", "text"), self.dims, strict=True)}
        self.standardize["image"].fit(lambda: blocks(store.image_features, roles.train))
        self.standardize["text"].fit(lambda: blocks(store.text_features, self.captions))
        self._dealt: tuple = (None, None, None)

    def point(self, config: Config) -> Point:
        """A pair of heads at its start."""
        states = {kind: layer.state_dict() for kind, layer in self.standardize.items()}
        return Point(config, self.dims, states).to(self._device)

    def dealt(self, config: Config) -> tuple[Chunks, np.ndarray]:
        """The chunks that a fit passes over, and each caption's picture; those of the last call are kept."""
        swapped = config.training.seed if config.training.shuffle_pairs else None
        if self._dealt[0] is None or self._dealt[2] != swapped:
            self._dealt = (None, None, None)  # first makes room
            image_index = self._store.image_index
            if swapped is not None:
                image_index = _swapped(image_index, self._roles.train, seed_for(swapped, "shuffle"))
            captioned = np.intersect1d(self._roles.train, image_index)
            chunks = Chunks(self._store, captioned, image_index, self.standardize, self.count, self._device)
            self._dealt = chunks, image_index, swapped
        return self._dealt[:2]

    def check(self, point: Point, quality: Quality) -> dict:
        """Measures a point on the selection pictures, and keeps its heads where they are its best.

        Raises:
            EmbedError: an embedding that is not finite or has no direction.
        """
        point.heads.eval()
        if self.count > 1:
            measured = quality(*embed(point.heads, self._store, self._roles.selection))
        else:
            images, texts, image_index = self._selection
            with torch.inference_mode():
                image_vectors, text_vectors, _ = point.heads(images, texts)
                vectors = unit(unit(image_vectors).mean(1)), unit(text_vectors)
            sides = zip(("picture", "caption"), vectors, strict=True)
            measured = quality(*(check_units(what, side.cpu().numpy()) for what, side in sides), image_index)
        point.keep(measured)
        return measured

    @cached_property
    def _selection(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """The selection pictures' features, as heads take them, and their captions' pictures."""
        images, texts, image_index = self.standardised(self._roles.selection)
        return images.to(self._device), texts.to(self._device), image_index

    def standardised(self, pictures: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """Features of pictures (N, V, D) and their captions (M, E), and the caption map counted among them."""
        captions = np.flatnonzero(np.isin(self._store.image_index, pictures))
        images = standardised(self.standardize["image"], self._store.image_features, pictures)
        texts = standardised(self.standardize["text"], self._store.text_features, captions)
        return images, texts, np.searchsorted(pictures, self._store.image_index[captions])


def _train(
    store,
    roles: Roles,
    folder: Path,
    config: Config,
    request: str,
    quality: Quality,
    align: Align | None,
    device,
    memory: int,
    say,
):
    state, training = checkpoint.load_resume(folder, request), config.training
    data = Data(store, roles, device, memory, state.get("chunks"))
    seeds = range(training.seed, training.seed + training.members)
    several = [dataclasses.replace(config, training=dataclasses.replace(training, seed=seed)) for seed in seeds]
    points = [data.point(each) for each in several]
    if training.shuffle_pairs:
        say("the control: every train picture is fitted to the captions of another one")
    if data.count > 1:
        say(f"the features do not fit {memory / 2**30:.1f} GiB: they are read in {data.count} shuffled chunks an epoch")
    if "points" in state:
        for point, before in zip(points, state["points"], strict=True):
            point.restore(before)
        said = [f"epoch {point.epoch}" for point in points if point.epoch]
        say(f"going on after {', '.join(said)}")
    trained = sum(p.numel() for point in points for p in point.heads.parameters() if p.requires_grad)
    say(
        f"fitting {trained:,} parameters on {device}: "
        f"{len(roles.train):,} pictures, {len(data.captions):,} captions, chosen on {len(roles.selection):,} "
        f"({roles.selection_name}), to be reported on {len(roles.report):,} ({roles.report_name})"
    )
    steps = steps_an_epoch(*data.dealt(config), training)
    start = saved = time.monotonic()
    size = {"total": len(points) * training.num_epochs * steps, "initial": sum(p.epoch for p in points) * steps}
    with tqdm(**size, unit=" steps", desc="fit", disable=None) as bar:
        for point in points:
            dealt = data.dealt(point.config)
            while not point.finished:
                advance([point], *dealt, point.until_check, bar.update)
                if point.diverged:
                    raise TrainingError(
                        f"the loss is not finite in epoch {point.diverged}; lower training.learning_rate or raise "
                        "model.temperature"
                    )
                measured = data.check(point, quality)
                if point.finished or time.monotonic() - saved >= SAVE_EVERY:
                    state = {"request": request, "chunks": data.count, "points": [each.state() for each in points]}
                    checkpoint.save_resume(folder, state)
                    checkpoint.save_history(folder, _history(points))
                    saved = time.monotonic()
                loss = point.history[-1]["loss"]
                bar.set_postfix(loss=f"{loss:.3f}", rsum=f"{measured['rsum']:.1f}", best=f"{point.best_rsum:.1f}")
    members = [point.best_heads() for point in points]
    if training.cca:
        members.append(_closed_form(data, roles, config, align, say))
    return points, members, data.count, round(time.monotonic() - start, 2)


def _closed_form(data: "Data", roles: Roles, config: Config, align: Align | None, say) -> DualHeads:
    """Heads whose maps are a regularised CCA of the standardised features, averaged over a picture's views."""
    if data.count > 1:
        raise TrainingError("training.cca needs the features in memory; give more --memory, or set it to false")
    say("aligning in closed form (CCA)")
    with tqdm(unit=" candidates", desc="cca", disable=None) as bar:
        parts = (data.standardised(part) for part in (roles.train, roles.selection))
        sides = ((images.mean(1).numpy(), texts.numpy(), index) for images, texts, index in parts)
        settings, maps = align(*sides, bar.update)
    say(f"the CCA's settings: {', '.join(f'{key} {value}' for key, value in settings.items())}")
    wide = dataclasses.replace(
        config, model=dataclasses.replace(config.model, head="linear", embedding_dim=maps.image_map.shape[1])
    )
    heads = data.point(wide).heads.cpu().eval()
    with torch.no_grad():
        for projection, mapping in ((heads.image, maps.image_map), (heads.text, maps.text_map)):
            projection.weight.copy_(torch.from_numpy(mapping))
            projection.bias.zero_()
    return heads


def _history(points: list[Point]) -> list[dict]:
    """The rows of all histories, which say whose they are where there are several."""
    if len(points) == 1:
        return points[0].history
    return [{"member": number, **row} for number, point in enumerate(points, 1) for row in point.history]


def _swapped(image_index: np.ndarray, pictures: np.ndarray, seed: int) -> np.ndarray:
    """``image_index`` with each of the pictures' captions moved to another one, none to its own."""
    order = np.random.default_rng(seed).permutation(pictures)
    other = np.arange(max(pictures.max(), image_index.max()) + 1)
    other[order] = np.roll(order, 1)
    return other[image_index]
