"""Fitting heads on cached features, one pair or an ensemble: the run folder, choosing the epoch, an exact resume."""

import dataclasses
import platform
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from onceover.base.errors import OnceoverError
from onceover.base.files import digest, only_writer
from onceover.base.formats import EMBEDDINGS, PROVENANCE
from onceover.base.memory import default_memory, keep_freed_memory
from onceover.configs.schema import Config
from onceover.extract.store import FeatureStore, Roles
from onceover.heads import checkpoint, replacement
from onceover.heads.chunks import MIN_MEMORY, Chunks, blocks, chunks_for, memory_on, standardised
from onceover.heads.embed import check_units, embed, write_embeddings
from onceover.heads.losses import LOSSES
from onceover.heads.models import DualHeads, Ensemble, Standardize, unit
from onceover.heads.seeds import seed_for
from onceover.heads.stacking import Point, advance, bytes_of_point, steps_an_epoch
from onceover.retrieval.closed_form import align
from onceover.retrieval.hubness import bank_rows, fit_inverted_softmax
from onceover.retrieval.metrics import quality

SAVE_EVERY = 10.0  # seconds, at least, from one save of an unfinished fit to the next: what a kill can cost


#: image vectors (N, D), text vectors (M, D), image_index (M,) -> a report with "rsum" and both directions' recalls
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], dict]


class TrainingError(OnceoverError):
    """A fit that cannot start or cannot go on."""


def fit(
    store: FeatureStore,
    folder: str | Path,
    config: Config,
    *,
    device: str | torch.device = "cpu",
    memory: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict:
    """Fits heads on the store's train images and writes the run folder; goes on with an interrupted fit.

    The heads kept are those of the epoch with the best rsum on the validation images; with ``training.members`` those
    of each member, side by side as one space. With ``training.refit`` this only chooses: the number of epochs, a CCA's
    settings, the sharpness of the correction for hubs. The heads kept are then fitted anew, with what was chosen, on
    train and validation images together.

    Args:
        memory: bytes that the fit may take; where the features do not fit, they are read in shuffled chunks. By
            default half of the machine's; no more than a card has free. A fit that was interrupted in training goes
            on with what it was begun with.

    Returns:
        The run's provenance, as in ``run.json``.

    Raises:
        RunError: the folder holds another run. TrainingError: the loss is not finite. StoreError: too few splits.
    """
    folder, training = Path(folder), config.training
    LOSSES.load(training.loss)  # an unknown one is refused before anything is written
    roles = store.roles()
    settings = {"model": config.to_dict()["model"], "training": config.to_dict()["training"]}
    request = digest({"settings": settings, "fingerprints": store.fingerprints})
    with only_writer(folder, "the run"):
        replacement.claim_folder(folder)
        if (folder / PROVENANCE).exists() and not force:
            before = checkpoint.read_provenance(folder)
            if before["request"] == request:
                say(f"{folder} is fitted with these settings on this store already; --force fits again")
                return before
            raise checkpoint.RunError(
                f"{folder} holds a run of other settings or features; name another --run, or --force"
            )
        work = replacement.place_to_work(folder, force)
        state = checkpoint.load_begun(work, request, force)
        if state is None or "points" not in state:
            state = {"request": request, "memory": memory_on(torch.device(device), memory or default_memory())}
            checkpoint.begin(work, state)
        checkpoint.save_settings(work, config, store.tokenizer_files)
        if not store.is_checked:
            say(f"{store.path} was made by an earlier version, and its features cannot be checked as they are read")
        job = _Fit(store, work, config, state, torch.device(device), say)
        start = time.monotonic()
        data, points = job.choose(roles)
        closed = job.closed_form(data, roles) if training.cca else []
        members = [*(point.best_heads() for point in points), *closed[:1]]
        heads = members[0] if len(members) == 1 else Ensemble(members).eval()
        rsum = points[0].best_rsum if len(members) == 1 else quality(*embed(heads, store, roles.selection))["rsum"]
        betas, kept, chunks = None, roles, data.count
        del data  # makes room
        if training.refit:
            betas = _betas(heads, store, roles)
            kept = roles.together()
            members = [*job.refit(kept, [point.best_epoch for point in points]), *closed[1:]]
            heads = members[0] if len(members) == 1 else Ensemble(members).eval()
        seconds = round(time.monotonic() - start, 2)
        space = checkpoint.save_heads(work, heads, store.fingerprints)
        say("embedding everything, and choosing the correction for hubs")
        rerank = config.model.rerank
        with replacement.run_files(work).file(EMBEDDINGS) as aside:
            betas = write_embeddings(store, heads, aside, kept, space, rerank, betas)
        provenance = {
            "request": request,
            "space": space,
            "members": [dataclasses.asdict(member.config) | {"loss": member.loss} for member in members],
            "store": str(store.path.resolve()),
            "fingerprints": store.fingerprints,
            "recipes": store.recipes,
            "encoders": {kind: store.provenance[kind] for kind in ("image", "text")},
            "extract": store.provenance["settings"],
            "dims": dict(zip(("image", "text"), store.dims, strict=True)),
            "selection": {"split": roles.selection_name, "pictures": len(roles.selection), "rsum": rsum},
            "report": {"split": roles.report_name, "pictures": len(roles.report)},
            "betas": betas,
            "train_pictures": len(kept.train),
            "chunks": chunks,
            "epochs": [point.epoch for point in points],
            "best_epochs": [point.best_epoch for point in points],
            "seconds": seconds,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
        }
        checkpoint.save_provenance(work, provenance)
        replacement.take_place(work, folder)
    return checkpoint.read_provenance(folder)


class Data:
    """What fits on a store pass over: its train images' standardised features, in memory or in chunks.

    Args:
        memory: bytes that the features may take.

    Attributes:
        standardize: the layers, by ``image`` and ``text``, fitted on the train images. dims: of the features.
        count: into how many chunks the features are dealt.
    """

    def __init__(self, store: FeatureStore, roles: Roles, device: torch.device, memory: int):
        self._store, self._roles, self._device = store, roles, device
        self.captions = np.flatnonzero(np.isin(store.image_index, roles.train))
        self.count = chunks_for(store, roles.train, roles.selection, memory)
        keep_freed_memory()
        self.dims = store.dims
        self.standardize = {kind: Standardize(dim) for kind, dim in zip(("image", "text"), self.dims, strict=True)}
        self.standardize["image"].fit(lambda: blocks(store.image_features, roles.train))
        self.standardize["text"].fit(lambda: blocks(store.text_features, self.captions))
        for kind, layer in self.standardize.items():
            if not bool(torch.isfinite(layer.mean).all()):
                raise TrainingError(
                    f"the {kind} features of {store.path} hold numbers that are not finite; onceover verify "
                    f"{store.path} tells which, and extract makes them anew"
                )
        self.release()

    def point(self, config: Config, member: int = 0) -> Point:
        """A pair of heads at its start, one of an ensemble or the only one."""
        states = {kind: layer.state_dict() for kind, layer in self.standardize.items()}
        return Point(config, self.dims, states, member).to(self._device)

    def dealt(self, config: Config) -> tuple[Chunks, np.ndarray]:
        """The chunks that a fit passes over, and each caption's image; those of the last call are kept."""
        swapped = config.training.seed if config.training.shuffle_pairs else None
        if self._dealt[0] is None or self._dealt[2] != swapped:
            self.release()
            image_index = self._store.image_index
            if swapped is not None:
                image_index = _swapped(image_index, self._roles.train, seed_for(swapped, "shuffle"))
            captioned = np.intersect1d(self._roles.train, image_index)
            chunks = Chunks(self._store, captioned, image_index, self.standardize, self.count, self._device)
            self._dealt = chunks, image_index, swapped
        return self._dealt[:2]

    def release(self) -> None:
        """Makes room: the chunks of the last call of ``dealt`` are no longer kept."""
        self._dealt: tuple = (None, None, None)

    def check(self, point: Point, measure: Measure | None = None) -> dict:
        """Measures a point on the validation images, and keeps its heads where they are its best.

        Args:
            measure: how; by default ``retrieval.metrics.quality``.

        Raises:
            EmbedError: an embedding that is not finite or has no direction.
        """
        point.heads.eval()
        measure = measure or quality
        if self.count > 1:
            measured = measure(*embed(point.heads, self._store, self._roles.selection))
        else:
            images, texts, image_index = self._selection
            with torch.inference_mode():
                image_vectors, text_vectors, _ = point.heads(images, texts)
                vectors = unit(unit(image_vectors).mean(1)), unit(text_vectors)
            sides = zip(("image", "caption"), vectors, strict=True)
            measured = measure(*(check_units(what, side.cpu().numpy()) for what, side in sides), image_index)
        point.keep(measured)
        return measured

    @cached_property
    def _selection(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """The validation images' features, as heads take them, and their captions' images."""
        images, texts, image_index = self.standardised(self._roles.selection)
        return images.to(self._device), texts.to(self._device), image_index

    def standardised(self, pictures: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """Features of images (N, V, D) and their captions (M, E), and the caption map counted among them."""
        images = standardised(self.standardize["image"], self._store.image_features, pictures)
        return images, *self._captions_of(pictures)

    def averaged(self, pictures: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """As ``standardised``, with the mean of an image's views in their place: (N, D)."""
        layer = self.standardize["image"]
        images = torch.cat([layer(block).mean(1) for block in blocks(self._store.image_features, pictures)])
        return images, *self._captions_of(pictures)

    def _captions_of(self, pictures: np.ndarray) -> tuple[Tensor, np.ndarray]:
        captions = np.flatnonzero(np.isin(self._store.image_index, pictures))
        texts = standardised(self.standardize["text"], self._store.text_features, captions)
        return texts, np.searchsorted(pictures, self._store.image_index[captions])


class _Fit:
    """A fit under way: passes over the data, whose points are saved while they go on."""

    def __init__(self, store: FeatureStore, folder: Path, config: Config, state: dict, device: torch.device, say):
        self._store, self._folder, self._config, self._state = store, folder, config, state
        self._device = device
        self._say = say
        self._saved = time.monotonic()

    def choose(self, roles: Roles) -> tuple["Data", list[Point]]:
        """The members' points, each with the epoch that is best on the validation images."""
        training = self._config.training
        if training.shuffle_pairs:
            self._say("the control: every train image is fitted to the captions of another one")
        data, points = self._begin("points", roles)
        if training.cca and data.count > 1:
            raise TrainingError(
                "training.cca needs the features in memory; give more --memory, or --device cpu where it is a card "
                "that has no room for them, or set it to false"
            )
        trained = sum(p.numel() for point in points for p in point.heads.parameters() if p.requires_grad)
        self._say(
            f"fitting {trained:,} parameters on {self._device}: {len(roles.train):,} images, "
            f"{len(data.captions):,} captions, chosen on {len(roles.selection):,} ({roles.selection_name}), to be "
            f"reported on {len(roles.report):,} ({roles.report_name})"
        )
        self._advance("points", data, points, [training.num_epochs] * len(points), look=True)
        return data, points

    def refit(self, roles: Roles, epochs: list[int]) -> list[DualHeads]:
        """The members' heads after so many epochs over all of ``roles.train``; nothing is looked at."""
        self._say(f"fitting again, on {len(roles.train):,} images, those of the selection among them")
        data, points = self._begin("again", roles)
        self._advance("again", data, points, epochs, look=False)
        return [point.heads.cpu().eval() for point in points]

    def closed_form(self, data: "Data", roles: Roles) -> list[DualHeads]:
        """Heads whose maps are a regularised CCA of the standardised features, averaged over an image's views.

        With ``training.refit`` two of them: as it was chosen, and fitted on the validation images as well.
        """
        self._say("aligning in closed form (CCA)")
        data.release()
        with tqdm(unit=" candidates", desc="cca", disable=None) as bar:
            parts = (data.averaged(part) for part in (roles.train, roles.selection))
            sides = ((images.numpy(), texts.numpy(), index) for images, texts, index in parts)
            settings, maps = align(*sides, self._config.training.refit, bar.update)
        self._say(f"the CCA's settings: {', '.join(f'{key} {value}' for key, value in settings.items())}")
        return [self._linear(data, each.image_map, each.text_map) for each in maps]

    def _linear(self, data: "Data", image_map: np.ndarray, text_map: np.ndarray) -> DualHeads:
        model = dataclasses.replace(self._config.model, head="linear", embedding_dim=image_map.shape[1])
        heads = data.point(dataclasses.replace(self._config, model=model)).heads.cpu().eval()
        with torch.no_grad():
            for projection, mapping in ((heads.image, image_map), (heads.text, text_map)):
                projection.weight.copy_(torch.from_numpy(mapping))
                projection.bias.zero_()
        return heads

    def _begin(self, name: str, roles: Roles) -> tuple["Data", list[Point]]:
        """The data and the points of a pass, which go on from where they were saved."""
        training = self._config.training
        memory = self._for_features()
        data = Data(self._store, roles, self._device, memory)
        if data.count > 1:
            size = f"{memory / 2**30:.1f} GiB"
            self._say(f"the features do not fit {size}: they are read in {data.count} shuffled chunks an epoch")
        if name == "again":  # their epochs are known
            training = dataclasses.replace(training, patience=0)
        config = dataclasses.replace(self._config, training=training)
        points = [data.point(config, member) for member in range(training.members)]
        if name in self._state:
            for point, saved in zip(points, self._state[name], strict=True):
                point.restore(saved)
            self._say(f"going on after {', '.join(f'epoch {epoch}' for epoch in sorted({p.epoch for p in points}))}")
        return data, points

    def _for_features(self) -> int:
        """Bytes that are left for features; ``extract.memory.OVERHEAD`` has room for one member."""
        memory, members = self._state["memory"], self._config.training.members
        if members == 1:
            return memory
        others = (members - 1) * bytes_of_point(self._config, self._store.dims)
        if memory - others < MIN_MEMORY:
            raise TrainingError(
                f"{members} members take {(others + MIN_MEMORY) / 2**30:.1f} GiB at least; give so much --memory, or "
                "fit fewer (training.members)"
            )
        return memory - others

    def _advance(self, name: str, data: "Data", points: list[Point], epochs: list[int], look: bool) -> None:
        """Trains the points together; ``look``: measured as they go, which can end them early."""
        dealt = data.dealt(self._config)
        steps = steps_an_epoch(*dealt, self._config.training)
        size = {"total": sum(epochs) * steps, "initial": sum(point.epoch for point in points) * steps}

        def left(point: Point, last: int) -> int:
            return 0 if look and point.finished else last - point.epoch

        under_way = [pair for pair in zip(points, epochs, strict=True) if left(*pair)]
        if len({point.epoch for point, _ in under_way}) > 1:
            raise TrainingError(
                f"{self._folder} holds a fit that was begun by a version which fitted members one after another; "
                "fit again with --force"
            )
        with tqdm(**size, unit=" steps", desc="fit", disable=None) as bar:
            while under_way:
                going = [point for point, _ in under_way]
                advance(going, *dealt, going[0].until_check, bar.update)
                if diverged := [point.diverged for point in going if point.diverged]:
                    raise TrainingError(
                        f"the loss is not finite in epoch {diverged[0]}; lower training.learning_rate or raise "
                        "model.temperature"
                    )
                shown = {"loss": f"{np.mean([point.history[-1]['loss'] for point in going]):.3f}"}
                if look:
                    measured = [data.check(point)["rsum"] for point in going]
                    shown |= {"rsum": f"{np.mean(measured):.1f}", "best": f"{max(p.best_rsum for p in points):.1f}"}
                bar.set_postfix(shown)
                under_way = [pair for pair in under_way if left(*pair)]
                if len(under_way) < len(going) or time.monotonic() - self._saved >= SAVE_EVERY:
                    self._save(name, points)

    def _save(self, name: str, points: list[Point]) -> None:
        self._state |= {name: [point.state() for point in points]}
        checkpoint.save_resume(self._folder, self._state)
        if name == "points":
            checkpoint.save_history(self._folder, _history(points))
        self._saved = time.monotonic()


def _betas(heads: DualHeads | Ensemble, store: FeatureStore, roles: Roles) -> dict:
    """The correction for hubs that heads, chosen on the validation images, choose there."""
    bank = bank_rows(roles.train)
    pictures = np.union1d(bank, roles.selection)
    rows = (np.searchsorted(pictures, part) for part in (bank, roles.selection))
    return fit_inverted_softmax(*embed(heads, store, pictures), *rows).betas


def _history(points: list[Point]) -> list[dict]:
    """The rows of all histories, which say whose they are where there are several."""
    if len(points) == 1:
        return points[0].history
    return [{"member": number, **row} for number, point in enumerate(points, 1) for row in point.history]


def _swapped(image_index: np.ndarray, pictures: np.ndarray, seed: int) -> np.ndarray:
    """``image_index`` with each of the images' captions moved to another one, none to its own."""
    order = np.random.default_rng(seed).permutation(pictures)
    other = np.arange(max(pictures.max(), image_index.max()) + 1)
    other[order] = np.roll(order, 1)
    return other[image_index]
