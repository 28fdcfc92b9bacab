"""Fitting the heads on cached features: batches, schedule, early stopping, and an exact resume.

Every random choice comes from ``seed_for``: (seed, purpose, epoch) decide it alone, so that an interrupted fit needs
no generator state to go on bit for bit, and two fits of one seed on one machine are the same.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configs import OnceoverError
from configs.formats import EMBEDDINGS, PROVENANCE
from configs.schema import Config, TrainingConfig
from extract.files import digest, only_writer
from extract.memory import default_memory
from extract.store import FeatureStore, Roles
from heads import checkpoint
from heads.chunks import Chunks, blocks, chunks_for
from heads.embed import CorrectHubs, embed, write_embeddings
from heads.losses import contrastive_loss
from heads.models import DualHeads

_PURPOSES = ("initialisation", "order", "dropout", "shuffle")
#: images (N, D), texts (M, D), image_index (M,) -> a report with "rsum" and both directions' recalls
Quality = Callable[[np.ndarray, np.ndarray, np.ndarray], dict]


class TrainingError(OnceoverError):
    """A fit that cannot start or cannot go on."""


def seed_for(seed: int, purpose: str, epoch: int = 0) -> int:
    """The one place where seeds come from: a 63-bit seed for initialisation, data order or dropout of an epoch."""
    return int(np.random.SeedSequence([seed, _PURPOSES.index(purpose), epoch]).generate_state(1, np.uint64)[0] >> 1)


class Batches:
    """The batches of an epoch over some pictures: each picture at most once a batch, each caption once an epoch.

    An epoch runs in rounds. In a round each picture that has captions left brings ``captions_per_image`` of them, in
    an order drawn anew for the epoch, with one view drawn at random.
    """

    def __init__(self, pictures: np.ndarray, image_index: np.ndarray, views: int, config: TrainingConfig):
        self._captions = np.flatnonzero(np.isin(image_index, pictures))
        self._pictures = image_index[self._captions]
        self._views, self._size, self._each = views, config.batch_size, config.captions_per_image
        counts = np.bincount(self._pictures)
        rounds = [int((counts > done).sum()) for done in range(0, int(counts.max()), self._each)]
        self.steps = sum(math.ceil(present / self._size) for present in rounds)

    def epoch(self, generator: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Pictures (B,), their views (B,), captions (T,), and each caption's place among the pictures (T,)."""
        order = np.lexsort((generator.random(len(self._captions)), self._pictures))
        pictures, captions = self._pictures[order], self._captions[order]
        first = np.r_[0, np.flatnonzero(np.diff(pictures)) + 1]
        place = np.arange(len(pictures)) - np.repeat(first, np.diff(np.r_[first, len(pictures)]))
        for turn in range(int(place.max()) // self._each + 1):
            mine = place // self._each == turn
            present = generator.permutation(np.unique(pictures[mine]))
            of_present = np.argsort(present)  # pictures in ascending order -> their place in ``present``
            where = of_present[np.searchsorted(present[of_present], pictures[mine])]
            by_place = np.argsort(where, kind="stable")
            where, rows = where[by_place], captions[mine][by_place]
            for batch in np.array_split(np.arange(len(present)), math.ceil(len(present) / self._size)):
                span = slice(*np.searchsorted(where, [batch[0], batch[-1] + 1]))
                views = generator.integers(self._views, size=len(batch))
                yield present[batch], views, rows[span], where[span] - batch[0]


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to zero at the last step (Loshchilov and Hutter 2017)."""
    warm = round(config.warmup * total)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, total - warm))  # chunks can make an epoch a few steps longer
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    store: FeatureStore,
    folder: str | Path,
    config: Config,
    *,
    quality: Quality,
    correct_hubs: CorrectHubs,
    device: str | torch.device = "cpu",
    memory: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict:
    """Fits heads on the store's train pictures and writes the run folder; goes on with an interrupted fit.

    The heads kept are those of the epoch with the best rsum on the selection pictures.

    Args:
        quality: measures the heads on the selection pictures: ``retrieval.metrics.quality``.
        correct_hubs: gives the embeddings their biases: ``retrieval.hubness.fit_inverted_softmax``.
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
        with torch.random.fork_rng(devices=[]):
            place = torch.device(device), memory or default_memory()
            heads, state, seconds = _train(store, roles, folder, config, request, quality, *place, say)
        space = checkpoint.save_heads(folder, heads, store.fingerprints)
        say("embedding everything, and choosing the correction for hubs")
        write_embeddings(store, heads, folder / EMBEDDINGS, roles, space, config.model.rerank, correct_hubs)
        provenance = {
            "request": request,
            "space": space,
            "members": [settings["model"]],
            "store": str(store.path.resolve()),
            "fingerprints": store.fingerprints,
            "recipes": store.recipes,
            "encoders": {kind: store.provenance[kind] for kind in ("image", "text")},
            "extract": store.provenance["settings"],
            "dims": {"image": store.image_features.shape[2], "text": store.text_features.shape[1]},
            "selection": {"split": roles.selection_name, "pictures": len(roles.selection), "rsum": state["best_rsum"]},
            "report": {"split": roles.report_name, "pictures": len(roles.report)},
            "train_pictures": len(roles.train),
            "chunks": state["chunks"],
            "epochs": state["epoch"],
            "best_epoch": state["best_epoch"],
            "seconds": seconds,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
        }
        checkpoint.save_provenance(folder, provenance)
    return checkpoint.read_provenance(folder)


def _train(store, roles: Roles, folder: Path, config: Config, request: str, quality: Quality, device, memory: int, say):
    image_index = store.image_index
    if config.training.shuffle_pairs:
        image_index = _swapped(image_index, roles.train, seed_for(config.training.seed, "shuffle"))
        say("the control: every train picture is fitted to the captions of another one")
    train_texts = np.flatnonzero(np.isin(store.image_index, roles.train))
    state = checkpoint.load_resume(folder, request)
    count = state.get("chunks") or chunks_for(store, roles.train, len(train_texts), memory)
    captioned = np.intersect1d(roles.train, image_index)
    chunks = Chunks(store, captioned, image_index, count, device)
    if count > 1:
        say(f"the features do not fit {memory / 2**30:.1f} GiB: they are read in {count} shuffled chunks an epoch")
    _, views, image_dim = store.image_features.shape
    torch.manual_seed(seed_for(config.training.seed, "initialisation"))
    heads = DualHeads(image_dim, store.text_features.shape[1], config.model)
    heads.image[0].fit(lambda: blocks(store.image_features, roles.train))
    heads.text[0].fit(lambda: blocks(store.text_features, train_texts))
    heads.to(device)
    optimizer = torch.optim.AdamW(
        _parameter_groups(heads, config.training.weight_decay), lr=config.training.learning_rate
    )
    if "heads" in state:
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        say(f"going on after epoch {state['epoch']}")
    else:
        state = {"request": request, "chunks": count, "epoch": 0, "best_epoch": 0, "best_rsum": -1.0}
        state |= {"best": {}, "history": []}
    say(
        f"fitting {sum(p.numel() for p in heads.parameters() if p.requires_grad):,} parameters on {device}: "
        f"{len(roles.train):,} pictures, {len(train_texts):,} captions, chosen on {len(roles.selection):,} "
        f"({roles.selection_name}), to be reported on {len(roles.report):,} ({roles.report_name})"
    )
    steps = sum(Batches(group, image_index, views, config.training).steps for group in chunks.groups())
    start = time.monotonic()
    total = config.training.num_epochs * steps
    with tqdm(total=total, initial=state["epoch"] * steps, unit=" steps", desc="fit", disable=None) as bar:
        while state["epoch"] < config.training.num_epochs and not _exhausted(state, config.training):
            epoch_start = time.monotonic()
            seed = config.training.seed, "order", state["epoch"]
            batches = _batches(chunks, image_index, views, config.training, np.random.default_rng(seed_for(*seed)))
            loss = _epoch(heads, optimizer, batches, state["epoch"], steps, config.training, bar)
            measured = quality(*embed(heads, store, roles.selection))
            state["epoch"] += 1
            state["history"].append(
                _history_row(state["epoch"], loss, heads, optimizer, measured, time.monotonic() - epoch_start)
            )
            if measured["rsum"] > state["best_rsum"]:
                state |= {
                    "best_rsum": measured["rsum"],
                    "best_epoch": state["epoch"],
                    "best": _copy(heads.state_dict()),
                }
            checkpoint.save_resume(folder, state | {"heads": heads.state_dict(), "optimizer": optimizer.state_dict()})
            checkpoint.save_history(folder, state["history"])
            bar.set_postfix(loss=f"{loss:.3f}", rsum=f"{measured['rsum']:.1f}", best=f"{state['best_rsum']:.1f}")
    heads.load_state_dict(state["best"])
    return heads.cpu().eval(), state, round(time.monotonic() - start, 2)


def _swapped(image_index: np.ndarray, pictures: np.ndarray, seed: int) -> np.ndarray:
    """``image_index`` with each of the pictures' captions moved to another one, none to its own."""
    order = np.random.default_rng(seed).permutation(pictures)
    other = np.arange(max(pictures.max(), image_index.max()) + 1)
    other[order] = np.roll(order, 1)
    return other[image_index]


def _batches(chunks: Chunks, image_index: np.ndarray, views: int, config: TrainingConfig, generator) -> Iterator:
    """The batches of an epoch: features of pictures, in a view each, and captions; each caption's picture there."""
    for chunk in chunks.epoch(generator):
        for pictures, view, captions, image_of_text in Batches(chunk.pictures, image_index, views, config).epoch(
            generator
        ):
            pictures, captions = chunk.place(pictures, captions)
            view, image_of_text = (torch.from_numpy(part).to(pictures.device) for part in (view, image_of_text))
            yield chunk.images[pictures, view], chunk.texts[captions], image_of_text


def _epoch(heads, optimizer, batches: Iterator, epoch: int, steps: int, config, bar) -> float:
    """One pass over every caption; returns the mean loss."""
    heads.train()
    torch.manual_seed(seed_for(config.seed, "dropout", epoch))
    losses = []
    for step, (images, texts, image_of_text) in enumerate(batches, epoch * steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.num_epochs * steps, config)
        embedded = heads.embed_images(images), heads.embed_texts(texts)
        loss = contrastive_loss(*embedded, image_of_text, heads.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        heads.clamp_temperature()
        losses.append(loss.detach())
        bar.update()
    heads.eval()
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise TrainingError(
            f"the loss is not finite in epoch {epoch + 1}; lower training.learning_rate or raise model.temperature"
        )
    return mean


def _exhausted(state: dict, config: TrainingConfig) -> bool:
    return bool(config.patience) and state["epoch"] - state["best_epoch"] >= config.patience


def _parameter_groups(heads: DualHeads, weight_decay: float) -> list[dict]:
    """Weight decay for matrices alone; biases, norms and the temperature go without."""
    trained = [parameter for parameter in heads.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def _copy(state: dict) -> dict:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _history_row(epoch: int, loss: float, heads: DualHeads, optimizer, measured: dict, seconds: float) -> dict:
    row = {
        "epoch": epoch,
        "loss": loss,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "temperature": float(heads.temperature.detach()),
        "rsum": measured["rsum"],
    }
    for direction in ("image_to_text", "text_to_image"):
        row |= {f"{direction}_R@{k}": measured[direction][f"R@{k}"] for k in (1, 5, 10)}
    return row | {"seconds": round(seconds, 3)}
