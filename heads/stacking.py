"""Trains several pairs of heads together; heads of one shape are stacked, so that one matrix product serves them all.

Trials that see the same batches (``heads.trials.same_batches``) go through an epoch together. Those with one seed share
the noise, if all or none leave out blocks, and the augmented features where they want the same; those of one shape are
stacked as well, where that is faster. A single fit is a stack of one. Up to rounding a trial does not depend on the
others, since every random number comes from its own seeds (``heads.seeds``).
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from onceover.configs.schema import ModelConfig, TrainingConfig
from onceover.heads.batches import Batches
from onceover.heads.chunks import Chunk, Chunks
from onceover.heads.losses import LOSSES
from onceover.heads.noise import Noise, augment, draw_noise
from onceover.heads.schedule import learning_rate
from onceover.heads.seeds import seed_for
from onceover.heads.trials import Trial

CPU_WIDTH = 4096  # sum of the embedding dimensions of a stack on a CPU; a wider one does not fit its caches


def steps_per_epoch(chunks: Chunks, image_index: np.ndarray, config: TrainingConfig) -> int:
    """How many steps an epoch takes. ``image_index``: int64 (M,), the image of each caption."""
    sizes = (config.images_per_step, config.captions_per_image)
    return sum(Batches(group, image_index, chunks.views, *sizes).steps for group in chunks.groups())


def train_epochs(
    trials: Sequence[Trial],
    chunks: Chunks,
    image_index: np.ndarray,
    epochs: int,
    on_step: Callable[[int], object] = lambda _: None,
) -> None:
    """Trains trials together for some epochs. They must agree in ``same_batches`` and be equally far.

    A loss that is not finite stands in the trial's history, and does not harm the others.

    Args:
        chunks: the train images' standardised features.
        image_index: int64 (M,), the image of each caption; with ``shuffle_pairs`` the swapped one.
        on_step: is called after each step with the number of trials that took it.
    """
    config = trials[0].config.training
    start_epoch = trials[0].epoch
    steps = steps_per_epoch(chunks, image_index, config)
    stacks = _stacks(trials, steps)
    keys = sorted({_noise_key(trial) for trial in trials})
    for epoch in range(start_epoch, start_epoch + epochs):
        start = time.monotonic()
        order = np.random.default_rng(seed_for(config.seed, "order", epoch))
        noise = {key: np.random.default_rng(seed_for(key.seed, "noise", epoch)) for key in keys}
        for number, batch in enumerate(_batches(chunks, image_index, config, order, noise)):
            with _product_precision(config.dtype):
                for stack in stacks:
                    stack.step(batch, epoch * steps + number)
            on_step(len(trials))
        for stack in stacks:
            stack.end_epoch((time.monotonic() - start) / len(trials))
    for stack in stacks:
        stack.write_back()


@contextlib.contextmanager
def _product_precision(dtype: str) -> Iterator[None]:
    """Within, ``auto`` multiplies float32 as bfloat16 or TF32 where that is native, and sums in float32."""
    if not hasattr(torch.backends.mkldnn, "matmul"):  # torch before 2.9 has one setting for all backends
        before_2_9 = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if dtype == "auto" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before_2_9)
        return
    backends: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    precisions = ("ieee", "ieee")
    if dtype == "auto":
        precisions = ("bf16", "tf32")
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _shape(trial: Trial) -> tuple:
    """The settings in which trials must agree to be stacked: all that shapes the heads, and the loss.

    On a CPU their seed as well: without features to share, a stack of three took 1.18 times as long there.
    """
    model = trial.config.model
    loss = trial.config.training.loss
    noise = (model.dropout, model.block_dropout, model.variation)
    shape = (model.head, model.embedding_dim, *noise, model.learn_temperature, loss)
    if trial.heads.device.type == "cpu":
        return *shape, trial.seed
    return shape


def _stacks(trials: Sequence[Trial], steps: int) -> list["Stack"]:
    """Stacks trials of one shape, as many at a time as is fast. ``steps``: of an epoch."""
    stacks = []
    for _, group in itertools.groupby(sorted(trials, key=_shape), _shape):
        same_shape = list(group)
        size = len(same_shape)
        if same_shape[0].heads.device.type == "cpu":
            size = max(1, CPU_WIDTH // same_shape[0].config.model.embedding_dim)
        for start in range(0, len(same_shape), size):
            stacks.append(Stack(same_shape[start : start + size], steps))
    return stacks


class _NoiseKey(NamedTuple):
    """Trials share their noise if they agree in the seed and in whether blocks are left out."""

    seed: int
    has_blocks: bool


def _noise_key(trial: Trial) -> _NoiseKey:
    return _NoiseKey(trial.seed, trial.config.model.block_dropout > 0)


class AugmentedRows:
    """The features of a batch's images, or captions, augmented with the noise of each trial when asked for.

    Args:
        table: standardised features (R, D).
        rows: int64 (n,), the batch's rows of the table.
        noise: by what trials that share it have in common.
    """

    def __init__(self, table: Tensor, rows: np.ndarray, noise: dict[_NoiseKey, Noise]):
        self._table = table
        self._rows = rows
        self._noise = noise
        self._computed: dict[tuple, Tensor] = {}

    def features(self, keys: Sequence[_NoiseKey], model: ModelConfig) -> Tensor:
        """Augmented features (n, D), or (P, n, D) where the P trials' noise differs. ``model``: their settings."""
        strengths = (model.variation, model.dropout, model.block_dropout)
        augmented = [self._augmented(key, strengths) for key in keys]
        if len(set(keys)) == 1:
            return augmented[0]
        return torch.stack(augmented)

    def _augmented(self, key: _NoiseKey, strengths: tuple[float, float, float]) -> Tensor:
        if (key, strengths) not in self._computed:
            self._computed[key, strengths] = augment(self._table, self._rows, self._noise[key], *strengths)
        return self._computed[key, strengths]


class FeatureBatch(NamedTuple):
    """The features of a batch of B images and T captions. ``image_of_text``: int64 (T,), on the device."""

    images: AugmentedRows
    texts: AugmentedRows
    image_of_text: Tensor


def _batches(
    chunks: Chunks,
    image_index: np.ndarray,
    config: TrainingConfig,
    order: np.random.Generator,
    noise: dict[_NoiseKey, np.random.Generator],
) -> Iterator[FeatureBatch]:
    """Yields the batches of an epoch. ``noise``: a generator for the trials that share it."""
    for chunk in chunks.epoch(order):
        yield from _batches_of_chunk(chunk, image_index, config, chunks.views, order, noise)


def _batches_of_chunk(
    chunk: Chunk,
    image_index: np.ndarray,
    config: TrainingConfig,
    views: int,
    order: np.random.Generator,
    noise: dict[_NoiseKey, np.random.Generator],
) -> Iterator[FeatureBatch]:
    """Yields the batches of a chunk, whose rows become positions in the chunk's features.

    A view is a row of the image table, ``image * views + view``. With two views per image::

        chunk.images  (P, 2, D)   [[a0, a1], [b0, b1]]
        image table   (2 P, D)    [a0, a1, b0, b1]       image 1, view 0 -> row 2
    """
    batches = Batches(chunk.image_rows, image_index, views, config.images_per_step, config.captions_per_image)
    image_table = chunk.images.flatten(0, 1)
    dims = (image_table.shape[1], chunk.texts.shape[1])
    for stored in batches.epoch(order):
        batch = chunk.within(stored)
        image_noise = {}
        text_noise = {}
        for key, generator in noise.items():
            drawn = draw_noise(generator, batch, views, dims, has_blocks=key.has_blocks)
            image_noise[key], text_noise[key] = drawn
        images = AugmentedRows(image_table, batch.images * views + batch.views, image_noise)
        texts = AugmentedRows(chunk.texts, batch.captions, text_noise)
        yield FeatureBatch(images, texts, torch.from_numpy(batch.image_of_text).to(chunk.images.device))


class Stack:
    """P trials of one shape, each parameter stacked to one tensor (P, ...) while they are trained.

    Three linear heads of one shape, trained in one product::

        parameters["image.weight"]  (3, image_dim, embedding_dim)     image.weight of trial 0, 1, 2
        images                      (B, image_dim), or (3, B, image_dim) where the trials' noise differs
        image vectors               (3, B, embedding_dim)
        losses                      (3,)                              the gradient of their sum is that of each

    AdamW (Loshchilov and Hutter 2019) steps the rows of trials with equal ``training`` settings as one tensor. Weight
    decay is for matrices alone; biases, norms and the loss's scalars go without.

    Args:
        steps: of an epoch.
    """

    def __init__(self, trials: list[Trial], steps: int):
        self._trials = sorted(trials, key=lambda trial: dataclasses.astuple(trial.config.training))
        self._heads = self._trials[0].heads
        self._model = self._trials[0].config.model
        self._noise_keys = [_noise_key(trial) for trial in self._trials]
        self._loss = LOSSES.load(self._heads.loss)
        self._steps = steps
        self._losses: list[Tensor] = []
        self._parameters, _ = torch.func.stack_module_state([trial.heads for trial in self._trials])
        self._trained = {name: tensor for name, tensor in self._parameters.items() if tensor.requires_grad}
        self._groups: list[_Group] = []
        start = 0
        for _, group in itertools.groupby(self._trials, key=lambda trial: trial.config.training):
            same_settings = list(group)
            self._groups.append(_Group(same_settings, start, self._trained))
            start += len(same_settings)

    def step(self, batch: FeatureBatch, number: int) -> None:
        """Takes one step. ``number``: of the step, counted over all epochs."""
        images = batch.images.features(self._noise_keys, self._model)
        texts = batch.texts.features(self._noise_keys, self._model)
        losses = self.losses(images, texts, batch.image_of_text)
        losses.sum().backward()  # lays gradients out as the parameters are, which fused steps rely on
        gradients = {}
        for name, tensor in self._trained.items():  # a loss need not use all of its scalars
            gradients[name] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for group in self._groups:
            total = group.training.epochs * self._steps
            group.step(gradients, learning_rate(number, total, group.training))
        for tensor in self._trained.values():
            tensor.grad = None
        self._heads.clamp_scalars(self._parameters)
        self._losses.append(losses.detach())

    def losses(self, images: Tensor, texts: Tensor, image_of_text: Tensor) -> Tensor:
        """The trials' losses, (P,), on features (B, D) and (T, E), or (P, B, D) and (P, T, E)."""

        def embed(parameters: dict[str, Tensor], *features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return torch.func.functional_call(self._heads, parameters, features)

        features_dim = 0 if images.ndim == 3 else None
        stacked = torch.func.vmap(embed, in_dims=(0, features_dim, features_dim))
        image_vectors, text_vectors, scalars = stacked(self._parameters, images, texts)
        return self._loss.loss(image_vectors, text_vectors, image_of_text, scalars)

    def end_epoch(self, seconds: float) -> None:
        """Adds a row to each trial's history. ``seconds``: of the epoch, for one trial."""
        losses = torch.stack(self._losses).mean(0).tolist()
        scalars = {name: self._parameters[name].detach() for name in self._heads.scalars}
        columns = {name: values.tolist() for name, values in self._loss.shown(scalars).items()}
        for group in self._groups:
            for number, trial in enumerate(group.trials, group.rows.start):
                trial.epoch += 1
                trial.steps += len(self._losses)
                row = {"epoch": trial.epoch, "loss": losses[number], "learning_rate": group.rate}
                for name, values in columns.items():
                    row[name] = values[number]
                trial.history.append(row | {"seconds": seconds})
        self._losses = []

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies the stacked parameters and moments back into the trials."""
        for number, trial in enumerate(self._trials):
            for name, parameter in trial.heads.named_parameters():
                parameter.copy_(self._parameters[name][number])
        for group in self._groups:
            group.write_back()


class _Group:
    """Trials of a stack with equal ``training`` settings, which are neighbours there, and their AdamW.

    Its functional form, since ``torch.optim.AdamW`` loads torch's compiler, three seconds, to make an optimizer.

    Attributes:
        rows: the trials' rows of the stack.
        rate: the learning rate of the last step.
    """

    def __init__(self, trials: list[Trial], start: int, trained: dict[str, Tensor]):
        self.trials = trials
        self.training = trials[0].config.training
        self.rows = slice(start, start + len(trials))
        self.rate = 0.0
        self._parameters: dict[str, Tensor] = {}
        self._first_moments: dict[str, Tensor] = {}
        self._second_moments: dict[str, Tensor] = {}
        self._steps: dict[str, Tensor] = {}
        for name, tensor in trained.items():
            self._parameters[name] = tensor.detach()[self.rows]
            self._first_moments[name] = torch.stack([trial.moments[name][0] for trial in trials])
            self._second_moments[name] = torch.stack([trial.moments[name][1] for trial in trials])
            self._steps[name] = torch.tensor(float(trials[0].steps), device=tensor.device)

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], rate: float) -> None:
        """Takes one AdamW step. ``gradients``: of the whole stack, by name. ``rate``: the learning rate."""
        self.rate = rate
        matrices = [name for name, tensor in self._parameters.items() if tensor.ndim > 2]
        vectors = [name for name, tensor in self._parameters.items() if tensor.ndim <= 2]
        self._adamw(matrices, gradients, self.training.weight_decay)
        self._adamw(vectors, gradients, 0.0)

    def _adamw(self, names: list[str], gradients: dict[str, Tensor], weight_decay: float) -> None:
        adamw(
            [self._parameters[name] for name in names],
            [gradients[name][self.rows] for name in names],
            [self._first_moments[name] for name in names],
            [self._second_moments[name] for name in names],
            [],
            [self._steps[name] for name in names],
            lr=self.rate,
            weight_decay=weight_decay,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
        )

    def write_back(self) -> None:
        """Copies the moments back into the trials."""
        for number, trial in enumerate(self.trials):
            for name, first in self._first_moments.items():
                second = self._second_moments[name]
                trial.moments[name] = (first[number].clone(), second[number].clone())
