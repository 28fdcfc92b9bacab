"""The loop of a fine-tuning: epochs, and its state for an exact resume; validation, the best epoch and early stopping.

Heads that were fitted on the validation images as well are trained on these too. Then nothing is validated, and the
last epoch counts.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onceover.base.errors import OnceoverError
from onceover.base.progress import ProgressBar
from onceover.configs.schema import FinetuneConfig
from onceover.extract.store import FeatureStore
from onceover.heads.checkpoint import Run
from onceover.heads.embed import check_units
from onceover.heads.finetune_gradient import GradientComputer, in_batch_order
from onceover.heads.finetune_optimizer import FinetuneOptimizer
from onceover.heads.finetune_steps import Step, StepLoader
from onceover.heads.losses import LOSSES
from onceover.heads.models import DualHeads
from onceover.heads.rows import captions_of
from onceover.heads.schedule import learning_rate
from onceover.heads.towers import CAPTIONS, Tower
from onceover.heads.trials import with_recalls
from onceover.heads.workers import Workers
from onceover.retrieval.metrics import quality

SAVE_EVERY = 60.0  # seconds between two saves within an epoch, at least: what a kill can cost
_PLAIN = ("epoch", "step", "history", "start", "best_epoch", "best_rsum")  # attributes that a state holds as they are


class FinetuneError(OnceoverError):
    """A fine-tuning that cannot start or cannot be continued."""


class Training:
    """A fine-tuning in progress.

    Args:
        run: whose heads are trained on. towers: by ``image`` and ``text``.

    Attributes:
        heads, towers: what is trained.
        loader: of the steps.
        epoch: how many are done. step: how many steps of the next one.
        history: a row per epoch.
        start: the rsum before the first step; None until it was measured, and without validation.
        best_epoch: 0, until an epoch is better than the start; without validation the last one.
        best_rsum: of the best epoch; None without validation.
    """

    def __init__(
        self,
        store: FeatureStore,
        run: Run,
        towers: Mapping[str, Tower],
        settings: FinetuneConfig,
        workers: Workers,
    ):
        assert isinstance(run.heads, DualHeads), "an ensemble is not fine-tuned"
        self.heads = run.heads.to(workers.device)
        self.towers = towers
        roles = store.roles()
        if run.saw_validation:
            roles = roles.together()
        self.loader = StepLoader(store, roles.train, towers, run.config.model, settings, workers)
        self.epoch = 0
        self.step = 0
        self.history: list[dict] = []
        self.start: float | None = None
        self.best_epoch = 0
        self.best_rsum: float | None = None
        self._best: dict[str, Tensor] = {}
        self._losses: list[float] = []  # of the steps of the epoch in progress
        self._seconds = 0.0  # of the epoch in progress, up to the last save
        self._settings = settings
        self._workers = workers
        self._loss = LOSSES.load(self.heads.loss)
        self._validation = None if run.saw_validation else _Validation(store, self.heads, towers)
        self._gradient = GradientComputer(self.heads, towers, run.config.model, settings.micro_batch, workers)
        self._optimizer = FinetuneOptimizer(self.heads, towers, settings)

    def state(self) -> dict[str, Any]:
        """All that is needed to resume to the same result, in tensors and plain values."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return plain | {
            "losses": self._losses,
            "seconds": self._seconds,
            "parameters": {name: value.detach() for name, value in self._optimizer.parameters.items()},
            "best": self._best,
            "optimizer": self._optimizer.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes from a ``state``."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self._losses = state["losses"]
        self._seconds = state["seconds"]
        self._best = state["best"]
        self._optimizer.set_parameters(state["parameters"])
        self._optimizer.restore(state["optimizer"])

    def take_best(self) -> None:
        """Sets heads and encoders to what they were after the best epoch; where none was better, the heads alone.

        Without validation they stay as they are after the last one.
        """
        self._optimizer.set_parameters(self._best)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or ``finetune.patience`` ended the training early."""
        if self.epoch >= self._settings.num_epochs:
            return True
        return 0 < self._settings.patience <= self.epoch - self.best_epoch

    def run(self, save: Callable[[dict[str, Any]], None]) -> None:
        """Trains to the end. ``save``: is given the state after each epoch, and now and then within one.

        Raises:
            FinetuneError: a loss that is not finite.
        """
        total = self._settings.num_epochs * self.loader.steps
        if self.start is None:
            self._validate()
        initial = self.epoch * self.loader.steps + self.step
        with ProgressBar("finetune", "steps", total=total, initial=initial) as bar:
            while not self.finished:
                self._run_epoch(total, bar, save)
                if self._workers.leads:
                    save(self.state())

    def _run_epoch(self, total: int, bar: ProgressBar, save: Callable[[dict[str, Any]], None]) -> None:
        """Trains what is left of an epoch. ``total``: steps of all epochs."""
        start = time.monotonic()
        saved = start
        for step in self.loader.remaining(self.epoch, self.step):
            number = self.epoch * self.loader.steps + self.step
            loss = self.train(step, learning_rate(number, total, self._settings))
            self._losses.append(loss)
            self.step += 1
            shown = {"loss": f"{loss:.3f}"}
            if self._validation:
                shown |= {"start": f"{self.start:.1f}", "best": f"{self.best_rsum:.1f}"}
            bar.show(**shown)
            bar.update()
            is_last = self.step == self.loader.steps
            if self._workers.leads and not is_last and time.monotonic() - saved >= SAVE_EVERY:
                saved = time.monotonic()
                save(self.state() | {"seconds": self._seconds + saved - start})
        self._end_epoch(self._seconds + time.monotonic() - start)

    def _end_epoch(self, seconds: float) -> None:
        """Adds a row to the history, and validates."""
        row = {
            "epoch": self.epoch + 1,
            "loss": sum(self._losses) / len(self._losses),
            "learning_rate": self._optimizer.highest_rate,
        }
        scalars = {name: value.detach() for name, value in self.heads.scalars.items()}
        for name, value in self._loss.shown(scalars).items():
            row[name] = float(value)
        row["seconds"] = seconds
        self.history.append(row)
        self.epoch += 1
        self.step = 0
        self._losses = []
        self._seconds = 0.0
        self._validate()

    def _validate(self) -> None:
        """Measures heads and encoders on the validation images, if there are any, and keeps those of the best epoch."""
        if self._validation is None:
            self.best_epoch = self.epoch
            return
        measured: dict = {"rsum": 0.0}
        if self._workers.leads:
            measured = self._validation.measure()
        rsum = self._workers.agree(measured["rsum"])
        if self.start is None:
            self.start = rsum
            self.best_rsum = rsum
            self._best = self._optimizer.copies(heads_only=True)
            return
        if self._workers.leads:
            self.history[-1] = with_recalls(self.history[-1], measured)
        if self.best_rsum is None or rsum > self.best_rsum:
            self.best_epoch = self.epoch
            self.best_rsum = rsum
            self._best = self._optimizer.copies()

    def train(self, step: Step, rate: float) -> float:
        """Takes one step at a learning rate; returns its loss.

        Raises:
            FinetuneError: the loss or its gradient is not finite.
        """
        self._optimizer.zero_grad()
        loss = self._gradient.backward(step)
        scalars = self.heads.scalars
        self._workers.sum_gradients(self._optimizer.shared_parameters(scalars))
        norm = self._optimizer.clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FinetuneError(
                f"the loss or its gradient is not finite in epoch {self.epoch + 1}, step {self.step + 1}; lower "
                "finetune.learning_rate or finetune.heads_factor, or raise finetune.warmup, and --force"
            )
        self._optimizer.step(rate)
        self.heads.clamp_scalars(scalars)
        return loss


class _Validation:
    """Measures heads and towers on the validation images, with all their views."""

    def __init__(self, store: FeatureStore, heads: DualHeads, towers: Mapping[str, Tower]):
        self._heads = heads
        self._towers = towers
        self._images = store.roles().selection
        self._captions = captions_of(store.image_index, self._images)
        self._image_index = np.searchsorted(self._images, store.image_index[self._captions])
        self._views = store.image_features.shape[1]

    @torch.inference_mode()
    def measure(self) -> dict:
        """A report with ``rsum`` and the recalls of both directions.

        Raises:
            EmbedError: an embedding that is not finite or has no direction.
        """
        views = []
        for view in range(self._views):
            views.append(self._features("image", self._images, np.full(len(self._images), view)))
        images = self._heads.embed_images(torch.stack(views, 1)).cpu().numpy()
        texts = self._heads.embed_texts(self._features("text", self._captions)).cpu().numpy()
        return quality(check_units("image", images), check_units("caption", texts), self._image_index)

    def _features(self, kind: str, rows: np.ndarray, views: np.ndarray | None = None) -> Tensor:
        """A tower's features of rows of the store, without augmentation: (n, D)."""
        tower = self._towers[kind]
        size = 4 * CAPTIONS
        features = []
        for start in range(0, len(rows), size):
            block = slice(start, start + size)
            batches = tower.micro_batches(rows[block], None if views is None else views[block])
            features.append(in_batch_order([tower.forward(batch) for batch in batches], batches))
        return torch.cat(features)
