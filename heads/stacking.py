"""Pairs of heads that are trained together, stacked so that one product serves them all; one alone is a stack of one.

Pairs that see the same batches (``same_steps``) go through an epoch together. Those of one seed share the draw of
noise, and noisy features where they want the same; those of one shape are stacked as well, where that pays. What
becomes of a pair does not depend on its company, but for rounding, since every random number comes from its own seeds
(``heads.seeds``).
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from onceover.configs.schema import Config, TrainingConfig
from onceover.heads.chunks import Chunks
from onceover.heads.losses import LOSSES
from onceover.heads.models import DualHeads
from onceover.heads.noise import Noise, draw_noise, noisy
from onceover.heads.seeds import seed_for

_PLAIN = ("epoch", "steps", "history", "best_epoch", "best_rsum")  # of a point's state
CPU_WIDTH = 4096  # dimensions, of all points of a stack


class Batches:
    """The batches of an epoch over some pictures: each image at most once a batch, each caption once an epoch.

    An epoch runs in rounds. In a round each image that has captions left brings ``captions_per_image`` of them, in
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
        """Images (B,), their views (B,), captions (T,), and each caption's place among the images (T,)."""
        order = np.lexsort((generator.random(len(self._captions)), self._pictures))
        pictures, captions = self._pictures[order], self._captions[order]
        first = np.r_[0, np.flatnonzero(np.diff(pictures)) + 1]
        place = np.arange(len(pictures)) - np.repeat(first, np.diff(np.r_[first, len(pictures)]))
        for turn in range(int(place.max()) // self._each + 1):
            mine = place // self._each == turn
            present = generator.permutation(np.unique(pictures[mine]))
            of_present = np.argsort(present)  # images in ascending order -> their place in ``present``
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


def with_recalls(row: dict, measured: dict) -> dict:
    """A row of a history with what was measured after its epoch, before its seconds."""
    recalls = {
        f"{direction}_R@{k}": measured[direction][f"R@{k}"]
        for direction in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    }
    rest = {name: value for name, value in row.items() if name != "seconds"}
    return rest | {"rsum": measured["rsum"]} | recalls | {"seconds": row["seconds"]}


class Point:
    """One pair of heads under way, and all that is needed to go on with it.

    Args:
        member: its number in an ensemble; members share their batches, and have starts and noise of their own.

    Attributes:
        config: its settings. heads: the pair itself, with what standardises its features.
        seed: of its start and its noise.
        moments: AdamW's two averages for each trained parameter, by name; steps: how often it was stepped.
        epoch: how many it has been through. history: a row for each: ``loss``, ``learning_rate``, the loss's
            scalars, ``seconds`` (its share of the time of all that are trained together), and what was measured.
        best_epoch, best_rsum: of the measured epochs, the one with the best rsum.
    """

    def __init__(
        self, config: Config, dims: tuple[int, int], standardize: dict[str, dict[str, Tensor]], member: int = 0
    ):
        self.seed = config.training.seed + member
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, "initialisation"))
            self.heads = DualHeads(*dims, config.model, config.training.loss)
        for kind, state in standardize.items():
            self.heads.standardize[kind].load_state_dict(state)
        self.config, self.epoch, self.steps = config, 0, 0
        self.moments = {
            name: (torch.zeros_like(parameter), torch.zeros_like(parameter)) for name, parameter in self._trained()
        }
        self.history: list[dict] = []
        self.best_epoch, self.best_rsum, self._best = 0, -1.0, {}

    def state(self) -> dict:
        """Everything but the settings, in tensors and plain values; of a finished one no more than is needed."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        moments = {} if self.finished else self.moments
        return plain | {"heads": self.heads.state_dict(), "best": self._best, "moments": moments}

    def restore(self, state: dict) -> None:
        """Goes on from ``state``, on the device where the heads are."""
        self.heads.load_state_dict(state["heads"])
        self._best, self.moments = state["best"], state["moments"]
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.to(self.heads.device)

    def keep(self, measured: dict) -> None:
        """Takes down what was measured after the last epoch, and keeps its heads where they are the best so far."""
        self.history[-1] = with_recalls(self.history[-1], measured)
        if measured["rsum"] > self.best_rsum:
            self.best_epoch, self.best_rsum = self.epoch, measured["rsum"]
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
        """Whether all epochs are done, or ``patience`` is at its end."""
        training = self.config.training
        waited = self.epoch - self.best_epoch
        return self.epoch >= training.num_epochs or (0 < training.patience <= waited)

    @property
    def until_check(self) -> int:
        """Epochs until the heads are to be measured."""
        training = self.config.training
        return min(training.check_every - self.epoch % training.check_every, training.num_epochs - self.epoch)

    def to(self, device: torch.device) -> "Point":
        """Moves heads and moments."""
        self.heads.to(device)
        self.moments = {name: tuple(part.to(device) for part in pair) for name, pair in self.moments.items()}
        return self

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.heads.named_parameters() if value.requires_grad)


def same_steps(config: Config) -> tuple:
    """What two fits have to agree in to be trained together: the same batches in the same order and arithmetic."""
    training = config.training
    return training.seed, training.shuffle_pairs, training.batch_size, training.captions_per_image, training.dtype


def _same_shape(point: Point) -> tuple:
    """What two pairs have to agree in to be stacked: all that makes the heads, but for where the temperature starts.

    On a processor their seed as well: without features to share a stack of three took 1.18 times as long there.
    """
    model = point.config.model
    device = point.heads.device
    loss = point.config.training.loss
    shape = model.head, model.embedding_dim, model.dropout, model.variation, model.learn_temperature, loss
    return shape if device.type != "cpu" else (*shape, point.seed)


def bytes_of_point(config: Config, dims: tuple[int, int]) -> int:
    """About what a point takes while it is trained, beside the features; ``dims``: of the features.

    Of its parameters there are nine copies: stacked, gradients, two moments, and the point's own with two moments and
    the best; of a batch there are features with noise, and vectors and similarities on their way back.
    """
    training, dim = config.training, config.model.embedding_dim
    with torch.device("meta"):
        heads = DualHeads(*dims, config.model, training.loss)
        numbers = sum(parameter.numel() for parameter in heads.parameters())
    images, texts = training.batch_size, training.batch_size * training.captions_per_image
    batch = images * dims[0] + texts * dims[1] + 4 * ((images + texts) * dim + images * texts)
    return 4 * (9 * numbers + batch)


def steps_an_epoch(chunks: Chunks, image_index: np.ndarray, config: TrainingConfig) -> int:
    """How many steps an epoch takes."""
    return sum(Batches(group, image_index, chunks.views, config).steps for group in chunks.groups())


def advance(
    points: Sequence[Point],
    chunks: Chunks,
    image_index: np.ndarray,
    epochs: int,
    step: Callable[[int], object] = lambda _: None,
) -> None:
    """Trains points together for some epochs. They have to agree in ``same_steps`` and to have come equally far.

    A loss that is not finite stands in the point's history; the others are none the worse.

    Args:
        chunks: the train images' standardised features.
        image_index: int64 (M,), each caption's image; of a control the swapped one.
        step: is told, after each step, how many points have taken it.
    """
    config, begun = points[0].config.training, points[0].epoch
    steps = steps_an_epoch(chunks, image_index, config)
    shapes = itertools.groupby(sorted(points, key=_same_shape), _same_shape)
    stacks = [Stack(part, steps) for _, same in shapes for part in _parts(list(same))]
    seeds = sorted({point.seed for point in points})
    for epoch in range(begun, begun + epochs):
        start = time.monotonic()
        order = np.random.default_rng(seed_for(config.seed, "order", epoch))
        noise = {seed: np.random.default_rng(seed_for(seed, "noise", epoch)) for seed in seeds}
        for number, (images, texts, image_of_text) in enumerate(_batches(chunks, image_index, config, order, noise)):
            with _products_of(config.dtype):
                for stack in stacks:
                    sides = (side.with_noise(*stack.noise) for side in (images, texts))
                    stack.step(*sides, image_of_text, epoch * steps + number)
            step(len(points))
        for stack in stacks:
            stack.end_epoch((time.monotonic() - start) / len(points))
    for stack in stacks:
        stack.settle()


@contextlib.contextmanager
def _products_of(dtype: str) -> Iterator[None]:
    """``auto``: float32 numbers are multiplied as bfloat16 or TF32 where that is native, and summed up as float32."""
    places = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    wanted = ("bf16", "tf32") if dtype == "auto" else ("ieee", "ieee")
    before = [place.fp32_precision for place in places]
    try:
        for place, precision in zip(places, wanted, strict=True):
            place.fp32_precision = precision
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _parts(points: list[Point]) -> list[list[Point]]:
    """Points of one shape, in stacks that pay: a wider one leaves a processor's caches between two operations."""
    most = len(points)
    if points[0].heads.device.type == "cpu":
        most = max(1, CPU_WIDTH // points[0].config.model.embedding_dim)
    return [points[start : start + most] for start in range(0, len(points), most)]


def _batches(chunks: Chunks, image_index: np.ndarray, config: TrainingConfig, order, noise: dict) -> Iterator:
    """The batches of an epoch: images, captions, and each caption's image there.

    Args:
        order: a generator. noise: by seed, one for each.
    """
    for chunk in chunks.epoch(order):
        of_chunk = Batches(chunk.pictures, image_index, chunks.views, config)
        views_of_all = chunk.images.flatten(0, 1)
        dims = views_of_all.shape[1], chunk.texts.shape[1]
        for pictures, view, captions, image_of_text in of_chunk.epoch(order):
            pictures, captions = chunk.place(pictures, captions)
            drawn = {
                seed: draw_noise(generator, pictures, view, captions, image_of_text, chunks.views, dims)
                for seed, generator in noise.items()
            }
            tables = (views_of_all, pictures * chunks.views + view), (chunk.texts, captions)
            sides = (
                _Noisy(*table, {seed: noises[side] for seed, noises in drawn.items()})
                for side, table in enumerate(tables)
            )
            yield *sides, torch.from_numpy(image_of_text).to(chunk.images.device)


class _Noisy:
    """One side of a batch with a draw of noise for each seed; settings take of it what they want.

    Args:
        table: standardised features (R, D). rows: int64 (n,), those of the batch.
    """

    def __init__(self, table: Tensor, rows: np.ndarray, noise: dict[int, Noise]):
        self._table, self._rows, self._noise, self._made = table, rows, noise, {}

    def with_noise(self, seeds: Sequence[int], variation: float, rate: float) -> Tensor:
        """The features, moved and with a share of their numbers left out: (n, D), or (P, n, D) where seeds differ."""
        parts = [self._drawn(seed, variation, rate) for seed in seeds]
        return parts[0] if len({*seeds}) == 1 else torch.stack(parts)

    def _drawn(self, *wanted: float) -> Tensor:
        if wanted not in self._made:
            seed, variation, rate = wanted
            self._made[wanted] = noisy(self._table, self._rows, self._noise[seed], variation, rate)
        return self._made[wanted]


class Stack:
    """Points of one shape, parameter by parameter as one tensor (P, ...), while they are trained.

    AdamW (Loshchilov and Hutter 2019) steps the rows of points with the same ``training`` settings as one tensor.
    Weight decay is for matrices alone; biases, norms and the temperature go without.

    Attributes:
        noise: the seeds of the points' draws, and the variation and the rate of dropout that all want.
    """

    def __init__(self, points: list[Point], steps: int):
        self._points = sorted(points, key=lambda point: dataclasses.astuple(point.config.training))
        self._model, model = self._points[0].heads, self._points[0].config.model
        self.noise = [point.seed for point in self._points], model.variation, model.dropout
        self._loss = LOSSES.load(self._model.loss)
        self._steps, self._losses = steps, []
        self._parameters, _ = torch.func.stack_module_state([point.heads for point in self._points])
        self._trained = {name: tensor for name, tensor in self._parameters.items() if tensor.requires_grad}
        self._alike = []
        for _, same in itertools.groupby(self._points, key=lambda point: point.config.training):
            start = self._alike[-1].rows.stop if self._alike else 0
            self._alike.append(_Alike(list(same), start, self._trained))

    def step(self, images: Tensor, texts: Tensor, image_of_text: Tensor, number: int) -> None:
        """One step on standardised features, (B, D) and (T, E) for all or (P, B, D) and (P, T, E).

        ``number``: of the step, counted over all epochs.
        """

        def embed(parameters: dict[str, Tensor], *features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return torch.func.functional_call(self._model, parameters, features)

        of_each = 0 if images.ndim == 3 else None
        stacked = torch.func.vmap(embed, in_dims=(0, of_each, of_each))
        image_vectors, text_vectors, scalars = stacked(self._parameters, images, texts)
        losses = self._loss.loss(image_vectors, text_vectors, image_of_text, scalars)
        losses.sum().backward()  # lays gradients out as the parameters are, which fused steps rely on
        gradients = {}
        for name, tensor in self._trained.items():  # a loss need not use all of its scalars
            gradients[name] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for alike in self._alike:
            alike.step(gradients, learning_rate(number, alike.training.num_epochs * self._steps, alike.training))
        for tensor in self._trained.values():
            tensor.grad = None
        self._model.clamp_scalars(self._parameters)
        self._losses.append(losses.detach())

    def end_epoch(self, seconds: float) -> None:
        """Adds an epoch to each point's history; ``seconds``: that it took for one point."""
        losses = iter(torch.stack(self._losses).mean(0).tolist())
        scalars = {name: self._parameters[name].detach() for name in self._model.scalars}
        columns = {name: iter(values.tolist()) for name, values in self._loss.shown(scalars).items()}
        for alike in self._alike:
            for point in alike.points:
                point.epoch, point.steps = point.epoch + 1, point.steps + len(self._losses)
                row = {"epoch": point.epoch, "loss": next(losses), "learning_rate": alike.rate}
                shown = {name: next(values) for name, values in columns.items()}
                point.history.append(row | shown | {"seconds": seconds})
        self._losses = []

    @torch.no_grad()
    def settle(self) -> None:
        """Gives the points back what has become of them."""
        for number, point in enumerate(self._points):
            for name, parameter in point.heads.named_parameters():
                parameter.copy_(self._parameters[name][number])
        for alike in self._alike:
            for name, (first, second) in alike.moments.items():
                for number, point in enumerate(alike.points):
                    point.moments[name] = first[number].clone(), second[number].clone()


class _Alike:
    """Points of a stack with the same ``training`` settings, neighbours there, and their AdamW.

    Its functional form, since ``torch.optim.AdamW`` loads torch's compiler, three seconds, to make an optimizer.

    Attributes:
        rows: of the stack. rate: of the last step. moments: by name, the two averages, (P, ...) each.
    """

    def __init__(self, points: list[Point], start: int, trained: dict[str, Tensor]):
        self.points, self.training, self.rows = points, points[0].config.training, slice(start, start + len(points))
        self.rate, self._parameters = 0.0, {name: tensor.detach()[self.rows] for name, tensor in trained.items()}
        self.moments = {
            name: tuple(torch.stack(parts) for parts in zip(*(point.moments[name] for point in points), strict=True))
            for name in trained
        }
        self._taken = {
            name: torch.tensor(float(points[0].steps), device=tensor.device) for name, tensor in trained.items()
        }

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], rate: float) -> None:
        """One step by the stack's gradients, at a learning rate."""
        self.rate = rate
        fixed = {"fused": True, "amsgrad": False, "maximize": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
        for matrices, decay in ((True, self.training.weight_decay), (False, 0.0)):
            names = [name for name, tensor in self._parameters.items() if (tensor.ndim > 2) == matrices]
            adamw(
                [self._parameters[name] for name in names],
                [gradients[name][self.rows] for name in names],
                [self.moments[name][0] for name in names],
                [self.moments[name][1] for name in names],
                [],
                [self._taken[name] for name in names],
                lr=rate,
                weight_decay=decay,
                **fixed,
            )
