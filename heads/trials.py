"""A trial: one pair of heads under training, with the optimizer's state and its history, so that it can be resumed."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from onceover.configs.schema import Config
from onceover.heads.models import DualHeads
from onceover.heads.seeds import seed_for

_PLAIN = ("epoch", "steps", "history", "best_epoch", "best_rsum")  # attributes that a state holds as they are
_COPIES = 9  # of the parameters while a trial is trained; see trial_memory


class Trial:
    """A pair of heads under training: a setting with a seed, or an ensemble member.

    Args:
        dims: dimensions of the features of a view and of a caption.
        standardize: the states of the fitted ``Standardize`` layers, by ``image`` and ``text``.
        member: number in an ensemble; members share their batches, and have starts and noise of their own.

    Attributes:
        config: the settings.
        heads: the pair, with the layers that standardise its features.
        seed: of initialisation and noise.
        moments: AdamW's two averages for each trained parameter, by name.
        steps: how many optimizer steps were taken.
        epoch: how many epochs are done.
        history: a row per epoch: ``epoch``, ``loss``, ``learning_rate``, the loss's scalars, ``seconds`` (its share of
            the time of all trials that are trained together), and the recalls where it was validated.
        best_epoch, best_rsum: the validated epoch with the best rsum.
    """

    def __init__(
        self, config: Config, dims: tuple[int, int], standardize: dict[str, dict[str, Tensor]], member: int = 0
    ):
        self.config = config
        self.seed = config.training.seed + member
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, "initialisation"))
            self.heads = DualHeads(*dims, config.model, config.training.loss)
        for kind, state in standardize.items():
            self.heads.standardize[kind].load_state_dict(state)
        self.epoch = 0
        self.steps = 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, parameter in self._trained_parameters():
            self.moments[name] = (torch.zeros_like(parameter), torch.zeros_like(parameter))
        self.history: list[dict] = []
        self.best_epoch = 0
        self.best_rsum = -1.0
        self._best: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """The trial without its settings, in tensors and plain values; of a finished one no more than is needed."""
        moments = {} if self.finished else self.moments
        plain = {name: getattr(self, name) for name in _PLAIN}
        return plain | {"heads": self.heads.state_dict(), "best": self._best, "moments": moments}

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes from a ``state``, on the device where the heads are."""
        self.heads.load_state_dict(state["heads"])
        self._best = state["best"]
        self.moments = state["moments"]
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.to(self.heads.device)

    def record(self, measured: dict) -> None:
        """Adds the recalls of a validation to the last epoch's row, and keeps the heads if they are the best so far."""
        self.history[-1] = with_recalls(self.history[-1], measured)
        if measured["rsum"] > self.best_rsum:
            self.best_epoch = self.epoch
            self.best_rsum = measured["rsum"]
            self._best = {name: tensor.detach().clone() for name, tensor in self.heads.state_dict().items()}

    def best_heads(self) -> DualHeads:
        """The heads as they were after the best epoch, on the CPU, in eval mode."""
        self.heads.load_state_dict(self._best)
        return self.heads.cpu().eval()

    @property
    def diverged(self) -> int | None:
        """The first epoch whose loss was not finite, if there is one."""
        return next((row["epoch"] for row in self.history if not math.isfinite(row["loss"])), None)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or ``training.patience`` ended the training early."""
        training = self.config.training
        if self.epoch >= training.epochs:
            return True
        return 0 < training.patience <= self.epoch - self.best_epoch

    @property
    def until_validation(self) -> int:
        """Epochs until the next validation."""
        training = self.config.training
        return min(training.check_every - self.epoch % training.check_every, training.epochs - self.epoch)

    def to(self, device: torch.device) -> "Trial":
        """Moves heads and moments to a device."""
        self.heads.to(device)
        self.moments = {name: (first.to(device), second.to(device)) for name, (first, second) in self.moments.items()}
        return self

    def _trained_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.heads.named_parameters() if value.requires_grad)


def with_recalls(row: dict, measured: dict) -> dict:
    """A history's row with rsum and recalls of a validation, which stand before ``seconds``."""
    columns = {name: value for name, value in row.items() if name != "seconds"}
    columns["rsum"] = measured["rsum"]
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            columns[f"{direction}_R@{k}"] = measured[direction][f"R@{k}"]
    columns["seconds"] = row["seconds"]
    return columns


def same_batches(config: Config) -> tuple:
    """The settings in which trials must agree to be trained together: they see the same batches, in one dtype."""
    training = config.training
    return training.seed, training.shuffle_pairs, training.images_per_step, training.captions_per_image, training.dtype


def trial_memory(config: Config, dims: tuple[int, int]) -> int:
    """About how many bytes a trial takes while it is trained, beside the features.

    There are nine copies of its parameters: stacked, gradients, two moments, and the trial's own with two moments and
    the best; and of a batch the augmented features, and vectors and similarities with their gradients.

    Args:
        dims: dimensions of the features of a view and of a caption.
    """
    training = config.training
    with torch.device("meta"):
        heads = DualHeads(*dims, config.model, training.loss)
        parameters = sum(parameter.numel() for parameter in heads.parameters())
    images = training.images_per_step
    texts = images * training.captions_per_image
    features = images * dims[0] + texts * dims[1]
    vectors = (images + texts) * config.model.embedding_dim
    batch = features + 4 * (vectors + images * texts)
    return 4 * (_COPIES * parameters + batch)
