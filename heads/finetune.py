"""Fine-tuning: thawed layers of the encoders and the heads, trained on together from a fitted run.

Linear probing, then fine-tuning (Kumar et al. 2022): the heads start from a fit on the frozen features, so that the
encoders are not pulled about by random ones. What lies below the lowest thawed layer is run once and its activations
are cached (``heads.sides``); a step then costs the thawed part's forward and backward. Rates fall from layer to layer
below (as in ELECTRA, Clark et al. 2020, and BEiT, Bao et al. 2022); BatchNorm keeps its statistics, and the encoders'
own dropout is off. Where a batch does not fit the memory, its gradient is taken in two passes (GradCache, Gao et al.
2021).
"""

import contextlib
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from onceover.base.errors import OnceoverError
from onceover.base.files import aside_folder, digest, only_writer, read_record
from onceover.base.formats import CONFIG, EMBEDDINGS, ENCODERS, FINETUNED, NEXT, PROVENANCE
from onceover.configs.schema import FinetuneConfig, load_config
from onceover.extract.dataset import Dataset
from onceover.extract.encoding.devices import native_bfloat16
from onceover.extract.encoding.image import image_encoder_of
from onceover.extract.encoding.text import text_encoder_of
from onceover.extract.layouts import images_of
from onceover.extract.store import KINDS, FeatureStore
from onceover.heads import checkpoint, replacement
from onceover.heads.checkpoint import Run, RunError
from onceover.heads.embed import check_units, embed, write_embeddings
from onceover.heads.losses import LOSSES
from onceover.heads.models import Ensemble
from onceover.heads.noise import Noise, draw_noise, noisy
from onceover.heads.seeds import seed_for
from onceover.heads.sides import CAPTIONS, Captions, Part, Pictures, Side
from onceover.heads.stacking import Batches, learning_rate, with_recalls
from onceover.heads.thaw import parse_unfreeze
from onceover.heads.workers import Workers
from onceover.retrieval.metrics import quality

SAVE_EVERY = 60.0  # seconds, at least, from one save to the next within an epoch: what a kill can cost
CLIP_NORM = 1.0  # of the whole gradient
RELOADED, HALF = 1e-3, 0.05  # of the largest number, by which a loaded encoder may differ in float32, and in half


class FinetuneError(OnceoverError):
    """A fine-tuning that cannot start or cannot go on."""


def finetune(
    store: FeatureStore,
    run: Run,
    data: str | Path,
    folder: str | Path,
    settings: FinetuneConfig,
    *,
    unfreeze: str = "image",
    cached: bool = True,
    activations: str | Path | None = None,
    encoders: dict[str, str | None] | None = None,
    device: str | torch.device = "cpu",
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict | None:
    """Trains a run's heads and encoders on and writes them to ``folder``; goes on with an interrupted training.

    Kept is the epoch with the best rsum on the validation images, the run as it was among them. ``folder`` is no run
    yet: the new encoders' features are to be extracted (``dataset_of``), and ``finish`` makes it one.

    Args:
        store: the features that ``run`` was fitted on. data: the dataset's folder, which has the images.
        unfreeze: which layers thaw (``heads.thaw.parse_unfreeze``).
        cached: whether what lies below the lowest thawed layers is run once and kept in ``activations``, by default a
            folder of that name beside ``folder``. Without, images are read and passed whole in every epoch.
        encoders: by kind, where an encoder is now, if it has moved.

    Returns:
        What ``finetune.json`` says: ``encoders`` (specs by kind), ``weights``, ``best_epoch``, ``rsum``, ``start``…
        Of several processes only the first one gets it.

    Raises:
        RunError: the run is an ensemble, or of other features or encoders; or the folder holds something else.
        FinetuneError: the loss is not finite. ThawError: no such layers, or activations that cannot be cached.
    """
    folder, workers = Path(folder), Workers(torch.device(device))
    first = workers.rank == 0
    say = say if first else lambda _: None
    if isinstance(run.heads, Ensemble):
        raise RunError(
            f"{run.folder} is an ensemble; fine-tuning starts from one pair of heads: "
            "fit with training.members=1 and training.cca=false"
        )
    if run.provenance["fingerprints"] != store.fingerprints:
        raise RunError(
            f"{run.folder} was not fitted on the features of {store.path}; name the store that it was fitted on, "
            "or fit again"
        )
    if folder.resolve() == run.folder.resolve():
        raise RunError(f"--out is {folder}, the run to start from; name a new folder")
    if run.config.training.refit:
        raise RunError(
            f"{run.folder} was fitted on the validation images as well, which are to choose here; fit one that was "
            "not: --set training.refit=false"
        )
    chosen = parse_unfreeze(unfreeze)
    request = digest(
        {"settings": asdict(settings), "space": run.provenance["space"], "unfreeze": chosen, "cached": cached}
    )
    with only_writer(folder, "the run") if first else contextlib.nullcontext():
        if first:
            _prepare(folder, request, force)
        workers.wait()
        is_done = (folder / PROVENANCE).exists() or (folder / FINETUNED).exists()
        if is_done and not force:
            made = read_record(folder / FINETUNED, "what fine-tuning made")
            workers.leave()
            say(f"{folder} is fine-tuned with these settings already; --force trains again")
            return made if first else None
        work = folder / NEXT if is_done else folder
        specs = {kind: (encoders or {}).get(kind) or run.provenance["encoders"][kind]["encoder"] for kind in KINDS}
        sides = sides_of(store, run, Path(data), settings, chosen, specs, workers.device)
        if first:
            _try_saving(work, sides, run)
        if cached:
            place = Path(activations) if activations else folder.parent / "activations"
            if first:
                cache(sides, place, say)
            workers.wait()
            if not first:
                cache(sides, place, say)
        training = Training(store, run, sides, settings, workers)
        if "epoch" in (state := checkpoint.load_resume(work, request)):
            training.restore(state)
            say(f"going on in epoch {training.epoch + 1}, after {training.step} of its {training.batches.steps} steps")
        counts = [sum(each.numel() for each in side.thawed().values()) for side in sides.values()]
        say(
            f"fine-tuning on {workers.device}: {counts[0]:,} parameters of the image encoder and {counts[1]:,} of the "
            f"text encoder, with the heads; {training.batches.steps} steps an epoch"
        )
        training.run(lambda state: checkpoint.save_resume(work, {"request": request} | state))
        workers.leave()
        if not first:
            return None
        made = _save(work, folder, run, sides, training, settings, specs, request, unfreeze)
        replacement.take_over(work, folder)
        return made


def _prepare(folder: Path, request: str, force: bool) -> None:
    """Sees that the folder is empty, or of this very request, and marks where it is made as an unfinished run.

    Raises:
        RunError: it holds something else.
    """
    replacement.claim_folder(folder)
    if (folder / PROVENANCE).exists() and not force:
        if checkpoint.read_provenance(folder)["request"] != request:
            raise RunError(f"{folder} holds another run; name another --out, or --force")
        return
    work = replacement.working_folder(folder, force)
    if checkpoint.load_begun(work, request, force) is None:
        checkpoint.begin(work, {"request": request})


def sides_of(
    store: FeatureStore,
    run: Run,
    data: Path,
    settings: FinetuneConfig,
    chosen: dict[str, list[str]],
    specs: dict[str, str],
    device: torch.device,
) -> dict[str, Side]:
    """Both sides; the encoder of one that thaws is loaded, and has to be the run's."""
    made, roles = run.provenance, store.roles()
    pictures = np.sort(np.concatenate([roles.train, roles.selection]))
    if settings.dtype == "bfloat16" and not native_bfloat16(device):
        raise FinetuneError(f"{device} does not multiply in bfloat16 itself; set finetune.dtype to float32")
    common = settings.dtype != "float32" and native_bfloat16(device)
    size = max(1, min(CAPTIONS, settings.micro_batch * settings.captions_per_image))
    sides: dict[str, Side] = {
        "image": Side(store.image_features, settings.micro_batch, device),
        "text": Side(store.text_features, size, device),
    }
    for kind, names in chosen.items():
        given = made["encoders"][kind], made["recipes"][kind], made["extract"]
        if kind == "image":
            encoder = image_encoder_of(*given, str(device), specs[kind], plain=True)
            run.check_encoder(kind, encoder.recipe)
            images = images_of(data, store.image_paths)
            options = settings.micro_batch, common, names, settings.augment
            side = Pictures(store, images, pictures, encoder, *options)
        else:
            encoder = text_encoder_of(*given, run.tokenizer_files, str(device), specs[kind], plain=True)
            run.check_encoder(kind, encoder.recipe)
            captions = np.flatnonzero(np.isin(store.image_index, pictures))
            side = Captions(store, captions, encoder, size, common, names, settings.word_dropout)
        if settings.checkpoint:
            side.stages.checkpoint(side.lowest)
        sides[kind] = side
    return sides


def cache(sides: dict[str, Side], place: Path, say: Callable[[str], None]) -> None:
    """Caches the activations of the sides that thaw, below their cuts, in a folder."""
    for side in sides.values():
        if side.encoder is not None:
            side.cache(place, say)


class _Step(NamedTuple):
    """A process's share of a batch, loaded, and what it has to know of the whole.

    By kind: ``parts``; their ``noise``, and the stored features of the rows that it names, ``ends``, where heads want
    variation; ``bounds``: which rows of the batch each process has. ``image_of_text``: (T,), of the whole batch.
    """

    parts: dict[str, list[Part]]
    noise: dict[str, Noise]
    ends: dict[str, tuple[Tensor, Tensor]]
    bounds: dict[str, np.ndarray]
    image_of_text: Tensor


class Training:
    """A fine-tuning under way.

    Attributes:
        heads, sides: what is trained. batches: of an epoch.
        epoch: how many are done; step: how many steps of the next. history: a row for each epoch.
        start: the rsum before the first step; best_epoch, best_rsum: 0 and that one, until an epoch is better.
    """

    def __init__(
        self,
        store: FeatureStore,
        run: Run,
        sides: dict[str, Side],
        settings: FinetuneConfig,
        workers: Workers,
    ):
        self.heads, self._model = run.heads.to(workers.device), run.config.model
        self._loss = LOSSES.load(self.heads.loss)
        self.sides, self._settings = sides, settings
        self._workers, self._store, self._roles = workers, store, store.roles()
        views = store.image_features.shape[1]
        self.batches = Batches(self._roles.train, store.image_index, views, settings)
        self.epoch, self.step, self._losses, self._seconds = 0, 0, [], 0.0
        self.history: list[dict] = []
        self.start, self.best_epoch, self.best_rsum, self._best = None, 0, -1.0, {}
        self._trained = {f"heads.{name}": each for name, each in self.heads.named_parameters() if each.requires_grad}
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for each in self._trained.values():
            groups.setdefault((settings.heads_factor, each.ndim > 1), []).append(each)
        for kind, side in sides.items():
            for name, each in side.thawed().items():
                self._trained[f"{kind}.{name}"] = each
                scale = settings.layer_decay ** side.depths[name]
                groups.setdefault((scale, each.ndim > 1), []).append(each)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "scale": scale, "weight_decay": settings.weight_decay if matrices else 0.0}
                for (scale, matrices), parameters in groups.items()
            ],
            lr=settings.learning_rate,
            fused=True,
        )

    def state(self) -> dict:
        """All that is needed to go on to the same result, in tensors and plain values."""
        plain = ("epoch", "step", "history", "start", "best_epoch", "best_rsum")
        return {name: getattr(self, name) for name in plain} | {
            "losses": self._losses,
            "seconds": self._seconds,
            "parameters": {name: each.detach() for name, each in self._trained.items()},
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        """Goes on from ``state``."""
        for name in ("epoch", "step", "history", "start", "best_epoch", "best_rsum"):
            setattr(self, name, state[name])
        self._losses, self._seconds, self._best = state["losses"], state["seconds"], state["best"]
        self._take(state["parameters"])
        self._optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def _take(self, parameters: dict[str, Tensor]) -> None:
        for name, value in parameters.items():
            self._trained[name].copy_(value)

    def take_best(self) -> None:
        """Sets heads and encoders to what they were after the best epoch; where none was better, the heads alone."""
        self._take(self._best)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or ``patience`` is at its end."""
        waited = self.epoch - self.best_epoch
        return self.epoch >= self._settings.num_epochs or (0 < self._settings.patience <= waited)

    def run(self, save: Callable[[dict], None]) -> None:
        """Trains to the end; ``save`` is given the state now and then.

        Raises:
            FinetuneError: a loss that is not finite.
        """
        settings, first = self._settings, self._workers.rank == 0
        total = settings.num_epochs * self.batches.steps
        if self.start is None:
            self._check()
        size = {"total": total, "initial": self.epoch * self.batches.steps + self.step}
        with tqdm(**size, unit=" steps", desc="finetune", disable=None if first else True) as bar:
            while not self.finished:
                begun = saved = time.monotonic()
                for step in self._steps():
                    number = self.epoch * self.batches.steps + self.step
                    loss = self.train(step, learning_rate(number, total, settings))
                    self._losses.append(loss)
                    self.step += 1
                    bar.set_postfix(loss=f"{loss:.3f}", start=f"{self.start:.1f}", best=f"{self.best_rsum:.1f}")
                    bar.update()
                    if first and self.step < self.batches.steps and time.monotonic() - saved >= SAVE_EVERY:
                        saved = time.monotonic()
                        save(self.state() | {"seconds": self._seconds + saved - begun})
                self._end_epoch(self._seconds + time.monotonic() - begun)
                if first:
                    save(self.state())

    def _end_epoch(self, seconds: float) -> None:
        rate = max(group["lr"] for group in self._optimizer.param_groups)
        row = {"epoch": self.epoch + 1, "loss": sum(self._losses) / len(self._losses), "learning_rate": rate}
        scalars = {name: value.detach() for name, value in self.heads.scalars.items()}
        row |= {name: float(value) for name, value in self._loss.shown(scalars).items()}
        row["seconds"] = seconds
        self.history.append(row)
        self.epoch, self.step, self._losses, self._seconds = self.epoch + 1, 0, [], 0.0
        self._check()

    def _check(self) -> None:
        """Measures the validation images; the state after the best epoch is kept."""
        measured = self._measure() if self._workers.rank == 0 else {"rsum": 0.0}
        rsum = self._workers.agree(measured["rsum"])
        if self.start is None:
            self.start = self.best_rsum = rsum
            self._best = {name: self._trained[name].detach().clone() for name in self._trained if name[:6] == "heads."}
            return
        if self._workers.rank == 0:
            self.history[-1] = with_recalls(self.history[-1], measured)
        if rsum > self.best_rsum:
            self.best_epoch, self.best_rsum = self.epoch, rsum
            self._best = {name: each.detach().clone() for name, each in self._trained.items()}

    @torch.inference_mode()
    def _measure(self) -> dict:
        pictures = self._roles.selection
        captions = np.flatnonzero(np.isin(self._store.image_index, pictures))
        views = range(self._store.image_features.shape[1])
        whole = [self._all_features("image", pictures, np.full(len(pictures), view)) for view in views]
        images = self.heads.embed_pictures(torch.stack(whole, 1)).cpu().numpy()
        texts = self.heads.embed_texts(self._all_features("text", captions)).cpu().numpy()
        index = np.searchsorted(pictures, self._store.image_index[captions])
        return quality(check_units("image", images), check_units("caption", texts), index)

    def _all_features(self, kind: str, rows: np.ndarray, views: np.ndarray | None = None) -> Tensor:
        side, block = self.sides[kind], 4 * CAPTIONS
        features = []
        for start in range(0, len(rows), block):
            mine = slice(start, start + block)
            parts = side.parts(rows[mine], None if views is None else views[mine])
            features.append(_in_place([side.forward(part) for part in parts], parts))
        return torch.cat(features)

    def _steps(self) -> Iterator[_Step]:
        """What is left of the epoch's batches, each loaded while the one before it is in use."""
        generator = np.random.default_rng(seed_for(self._settings.seed, "order", self.epoch))
        numbered = itertools.islice(enumerate(self.batches.epoch(generator)), self.step, None)
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for number, batch in numbered:
                ready, coming = coming, reader.submit(self.load, number, *batch)
                if ready:
                    yield ready.result()
            if coming:
                yield coming.result()

    def load(self, number: int, pictures, views, captions, image_of_text) -> _Step:
        """This process's share of a batch: its images, all their captions, and the noise that is theirs."""
        shares = self._workers.shares(len(pictures))
        bounds = {"image": shares, "text": np.searchsorted(image_of_text, shares)}
        mine = {kind: slice(*each[self._workers.rank :][:2]) for kind, each in bounds.items()}
        seeds = {purpose: seed_for(self._settings.seed, purpose, self.epoch) for purpose in ("noise", "crops", "words")}
        generators = {purpose: np.random.default_rng([seed, number]) for purpose, seed in seeds.items()}
        views_each, dims = self._store.image_features.shape[1], self._store.dims
        drawn = draw_noise(generators["noise"], pictures, views, captions, image_of_text, views_each, dims)
        noise = {kind: each.part(mine[kind]) for kind, each in zip(KINDS, drawn, strict=True)}
        ends = {}
        if self._model.variation:
            ends = {kind: tuple(self._frozen(kind, rows) for rows in (n.first, n.second)) for kind, n in noise.items()}
        crops = generators["crops"].random((len(pictures), 5))[mine["image"]]
        longest = getattr(self.sides["text"], "longest", 0)
        words = generators["words"].random((len(captions), longest), np.float32)[mine["text"]]
        parts = {
            "image": self.sides["image"].parts(pictures[mine["image"]], views[mine["image"]], crops),
            "text": self.sides["text"].parts(captions[mine["text"]], None, words),
        }
        return _Step(parts, noise, ends, bounds, torch.from_numpy(image_of_text).to(self._workers.device))

    def _frozen(self, kind: str, rows: np.ndarray) -> Tensor:
        """The store's features of rows that noise names, float32 (n, D)."""
        if kind == "text":
            chosen = self._store.text_features[rows]
        else:
            count = self._store.image_features.shape[1]
            chosen = self._store.image_features[rows // count, rows % count]
        return torch.from_numpy(np.asarray(chosen, np.float32))

    def train(self, step: _Step, rate: float) -> float:
        """One step; returns its loss.

        The gradient by the embeddings comes first; it then goes back through the passes that gave them, or, where the
        batch is larger than ``micro_batch``, through a second pass of one part after the other.
        """
        whole = int(np.diff(step.bounds["image"]).max()) <= self._settings.micro_batch
        with torch.set_grad_enabled(whole):
            joined = {kind: self._embeddings(kind, step) for kind in KINDS}
        leaves = {
            kind: self._workers.gather(joined[kind].detach(), step.bounds[kind]).requires_grad_() for kind in KINDS
        }
        self._optimizer.zero_grad()
        scalars = self.heads.scalars
        loss = self._loss.loss(leaves["image"], leaves["text"], step.image_of_text, scalars)
        value = loss.item()
        loss.backward()
        rank = self._workers.rank
        gradients = {kind: leaves[kind].grad[slice(*step.bounds[kind][rank:][:2])] for kind in KINDS}
        for kind in KINDS:
            if whole and step.parts[kind]:
                joined[kind].backward(gradients[kind])
            else:
                for part in step.parts[kind]:
                    places = torch.from_numpy(part.places).to(gradients[kind].device)
                    self._embed(kind, part, step).backward(gradients[kind][places])
        shared = [each for name, each in self._trained.items() if name.removeprefix("heads.") not in scalars]
        self._workers.sum_gradients(shared)
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), CLIP_NORM)
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise FinetuneError(
                f"the loss or its gradient is not finite in epoch {self.epoch + 1}, step {self.step + 1}; lower "
                "finetune.learning_rate or finetune.heads_factor, or raise finetune.warmup, and --force"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self._optimizer.step()
        self.heads.clamp_scalars(scalars)
        return value

    def _embeddings(self, kind: str, step: _Step) -> Tensor:
        """Vectors (b, embedding_dim) of this process's share, which may be empty."""
        if not step.parts[kind]:
            return torch.empty(0, self.heads.embedding_dim, device=self._workers.device)
        return _in_place([self._embed(kind, part, step) for part in step.parts[kind]], step.parts[kind])

    def _embed(self, kind: str, part: Part, step: _Step) -> Tensor:
        """Vectors (b, embedding_dim) of a part; a second pass drops what the first one dropped."""
        features = self.sides[kind].forward(part)
        places = torch.from_numpy(part.places)
        ends = (end[places].to(self._workers.device) for end in step.ends.get(kind, ()))
        table = self.heads.standardize[kind](torch.cat([features, *ends]))
        rows, *others = np.split(np.arange(len(table)), len(table) // len(features))
        noise = step.noise[kind].part(part.places)
        if others:
            noise = replace(noise, first=others[0], second=others[1])
        return getattr(self.heads, kind)(noisy(table, rows, noise, self._model.variation, self._model.dropout))


def _in_place(rows: list[Tensor], parts: list[Part]) -> Tensor:
    """Rows of parts, joined in the order of the batch."""
    back = np.argsort(np.concatenate([part.places for part in parts]))
    return torch.cat(rows)[torch.from_numpy(back).to(rows[0].device)]


def _save(
    work: Path,
    folder: Path,
    run: Run,
    sides: dict[str, Side],
    training: Training,
    settings: FinetuneConfig,
    specs: dict[str, str],
    request: str,
    unfreeze: str,
) -> dict:
    """Writes encoders and heads of the best epoch, history and settings into ``work``, and last ``finetune.json``.

    ``folder``: where all of it will lie in the end.
    """
    training.take_best()
    specs = dict(specs)
    weights = {kind: run.provenance["recipes"][kind]["weights"] for kind in KINDS}
    for kind, side in sides.items():
        if side.encoder is not None and training.best_epoch:
            specs[kind], weights[kind] = _save_encoder(work, folder, kind, side, run)
    if training.history:
        checkpoint.save_history(work, training.history)
    extract = replace(run.config.extract, **run.provenance["extract"])
    extract = replace(extract, image_encoder=specs["image"], text_encoder=specs["text"])
    checkpoint.save_settings(work, replace(run.config, extract=extract, finetune=settings), run.tokenizer_files)
    checkpoint.save_heads(work, training.heads.cpu(), run.provenance["fingerprints"])
    made = {
        "request": request,
        "encoders": specs,
        "weights": weights,
        "unfreeze": unfreeze,
        "best_epoch": training.best_epoch,
        "epochs": training.epoch,
        "start": training.start,
        "rsum": training.best_rsum,
        "seconds": round(sum(row["seconds"] for row in training.history), 2),
        "base": run.provenance | {"run": str(run.folder.resolve())},
        "device": str(sides["image"].device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
    }
    made["files"] = checkpoint.files_of_run(work)
    replacement.run_files(work).write_record(FINETUNED, made)
    checkpoint.save_resume(work, {"request": request})
    return made


def _try_saving(folder: Path, sides: dict[str, Side], run: Run) -> None:
    """Sees that the encoders can be saved, before anything is trained.

    Raises:
        FinetuneError: one cannot.
    """
    for kind, side in sides.items():
        if side.encoder is not None:
            with aside_folder(folder / kind) as aside:
                _save_checked(aside, kind, side, run)


def _save_encoder(work: Path, folder: Path, kind: str, side: Side, run: Run) -> tuple[str, str]:
    """Writes a fine-tuned encoder into the run that is made in ``work``, and that will lie in ``folder``.

    Returns:
        Its spec in ``folder``, and the hash of its weights.

    Raises:
        FinetuneError: loaded again it is another one.
    """
    place = f"{ENCODERS}/{kind}"
    with aside_folder(work / kind) as aside:
        spec, weights = _save_checked(aside, kind, side, run)
        for file in sorted(aside.iterdir()):
            replacement.run_files(work).move_in(file, f"{place}/{file.name}")
    return spec.replace(str(aside.resolve()), str((folder / place).resolve())), weights


def _save_checked(aside: Path, kind: str, side: Side, run: Run) -> tuple[str, str]:
    """Writes a fine-tuned encoder into an empty folder and loads it again, to see that it is the one that was trained.

    Returns:
        Its spec there, and the hash of its weights.

    Raises:
        FinetuneError: it is another one.
    """
    cannot = f"the {kind} encoder cannot be saved, so that nothing could be kept: thaw the other side alone"
    try:
        spec = side.encoder.save(aside).replace(str(aside), str(aside.resolve()))
    except RuntimeError as error:  # weights that do not fit the architecture as it is built
        raise FinetuneError(f"{cannot} ({str(error).splitlines()[0]})") from error
    made, device = run.provenance, str(side.device)
    given = made["encoders"][kind], made["recipes"][kind], made["extract"]
    if kind == "image":
        loaded = image_encoder_of(*given, device, spec)
    else:
        loaded = text_encoder_of(*given, run.tokenizer_files, device, spec)
    expected, found = side.sample_features(side.encoder), side.sample_features(loaded)
    tolerance = RELOADED if made["recipes"][kind]["dtype"] == "float32" else HALF
    if np.abs(found - expected).max() > tolerance * np.abs(expected).max():
        raise FinetuneError(f"{cannot} (loaded again it gives other features)")
    return spec, loaded.recipe["weights"]


def check_encoder(folder: Path, kind: str, recipe: dict) -> None:
    """Refuses features of an encoder that is not the one that ``finetune`` left in ``folder``.

    Raises:
        RunError: its weights are others.
    """
    if recipe["weights"] != read_record(folder / FINETUNED, "what fine-tuning made")["weights"][kind]:
        raise RunError(
            f"the {kind} features are not those of the encoder that {folder} was fine-tuned with; "
            "run the same finetune command again with --re-extract"
        )


def finish(store: FeatureStore, folder: str | Path) -> dict:
    """Makes what ``finetune`` left in ``folder`` a run like any other, on a store of the new encoders' features.

    Returns:
        The run's provenance.

    Raises:
        RunError: the store's features are of other encoders.
    """
    folder = Path(folder)
    with only_writer(folder, "the run"):
        made = read_record(folder / FINETUNED, "what fine-tuning made")
        for kind in KINDS:
            check_encoder(folder, kind, store.recipes[kind])
        base, roles = made["base"], store.roles()
        heads, config = checkpoint.load_heads(folder, base | {"files": made["files"]}), load_config(folder / CONFIG)
        space = checkpoint.save_heads(folder, heads, store.fingerprints)
        with replacement.run_files(folder).file(EMBEDDINGS) as aside:
            betas = write_embeddings(store, heads, aside, roles, space, config.model.rerank)
        tuned = ("unfreeze", "encoders", "weights", "start", "device", "threads")
        changed = {
            "request": made["request"],
            "space": space,
            "store": str(store.path.resolve()),
            "fingerprints": store.fingerprints,
            "recipes": store.recipes,
            "encoders": {kind: store.provenance[kind] for kind in KINDS},
            "extract": store.provenance["settings"],
            "betas": betas,
            "selection": base["selection"] | {"rsum": quality(*embed(heads, store, roles.selection))["rsum"]},
            "epochs": [made["epochs"]],
            "best_epochs": [made["best_epoch"]],
            "seconds": made["seconds"],
            "versions": made["versions"],
            "finetune": {name: made[name] for name in tuned} | {"from": base["run"], "space": base["space"]},
        }
        checkpoint.save_provenance(folder, base | changed)
    return checkpoint.read_provenance(folder)


def dataset_of(store: FeatureStore, data: str | Path) -> Dataset:
    """The very images and captions of a store, in its order, to be encoded again; ``data``: the dataset's folder."""
    data = Path(data)
    return Dataset(
        root=data if data.is_dir() else data.parent,
        layout=store.provenance["layout"],
        ids=store.image_ids,
        paths=store.image_paths,
        splits=store.image_splits,
        captions=store.captions,
        image_index=store.image_index,
        failures=store.failures,
        notes=store.provenance["notes"],
    )
