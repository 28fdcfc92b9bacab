"""Projection heads, which map the features of two encoders into one shared space."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onceover.configs.schema import ModelConfig
from onceover.heads.losses import LOSSES


class Standardize(nn.Module):
    """Shifts and scales each feature to mean 0 and standard deviation 1 over the train split; saved with the heads.

    Features that are never negative over the train split, as averages of ReLU outputs are, are square-rooted first
    (the Hellinger map of Arandjelovic and Zisserman 2012), which takes the weight off their few large values. A feature
    that is constant over the train split becomes 0.
    """

    root: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("root", torch.tensor(False))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, features: Callable[[], Iterable[Tensor]]) -> None:
        """Estimates mean and deviation of float32 features (..., D), which are read twice, block by block.

        Blocks are joined by the pairwise update of Chan, Golub and LeVeque (1983), in float64.

        Args:
            features: gives the blocks; called twice.
        """
        self.root.fill_(all(bool(block.min() >= 0) for block in features()))
        count = 0
        mean = torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(mean)  # sums of squared deviations from the mean
        largest = torch.zeros_like(self.mean)
        for block in features():
            rows = self._rooted(block).reshape(-1, block.shape[-1]).double()
            total = count + len(rows)
            block_mean = rows.mean(0)
            difference = block_mean - mean
            block_squares = (rows - block_mean).square_().sum(0)  # var(0) takes four times as long
            squares = squares + block_squares + difference**2 * (count * len(rows) / total)
            mean = mean + difference * (len(rows) / total)
            count = total
            largest = torch.maximum(largest, rows.abs().amax(0))
        deviation = (squares / count).sqrt()
        varies = deviation > torch.finfo(torch.float32).eps * largest
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, 1 / deviation, 0.0))

    def forward(self, features: Tensor) -> Tensor:
        """Standardises features: (..., D) -> (..., D)."""
        return (self._rooted(features) - self.mean).mul_(self.scale)

    def _rooted(self, features: Tensor) -> Tensor:
        features = features.to(self.mean.dtype)
        if self.root:
            return features.clamp_min(0).sqrt()
        return features


class Projection(nn.Linear):
    """A linear layer whose weight is (in_dim, out_dim), the layout in which a stack of heads gets its gradient."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, features: Tensor) -> Tensor:
        """Projects features: (..., in_dim) -> (..., out_dim)."""
        return features @ self.weight + self.bias


class ResidualMLP(nn.Module):
    """A linear projection, then one residual block: GELU, linear, sum, LayerNorm."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.project = Projection(in_dim, out_dim)
        self.block = nn.Sequential(nn.GELU(), Projection(out_dim, out_dim))
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Projects features: (..., in_dim) -> (..., out_dim)."""
        projected = self.project(features)
        return self.norm(projected + self.block(projected))


_HEADS: dict[str, type[Projection] | type[ResidualMLP]] = {"linear": Projection, "mlp": ResidualMLP}


def unit(vectors: Tensor) -> Tensor:
    """Scales vectors (..., D) to length 1; a zero vector stays 0. Nothing else normalises embeddings."""
    return F.normalize(vectors, dim=-1)


class DualHeads(nn.Module):
    """A head for images, a head for captions, and the scalars of the loss that trains them, such as a temperature.

    Args:
        image_dim: dimensions of a view's features. text_dim: of a caption's.

    Attributes:
        config: the settings of the heads.
        embedding_dim: dimensions of the shared space.
        loss: the name of the loss.
    """

    def __init__(self, image_dim: int, text_dim: int, config: ModelConfig, loss: str = "contrastive"):
        super().__init__()
        self.standardize = nn.ModuleDict({"image": Standardize(image_dim), "text": Standardize(text_dim)})
        head = _HEADS[config.head]
        self.image = head(image_dim, config.embedding_dim)
        self.text = head(text_dim, config.embedding_dim)
        self.config = config
        self.embedding_dim = config.embedding_dim
        self.loss = loss
        self._scalars = LOSSES.load(loss).scalars(config)
        for name, scalar in self._scalars.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(scalar.start), requires_grad=scalar.is_learned))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Maps standardised features (B, image_dim) and (T, text_dim) to vectors of any length.

        Returns:
            Image vectors (B, embedding_dim), text vectors (T, embedding_dim), and the loss's scalars by name.
        """
        return self.image(images), self.text(texts), self.scalars

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The loss's scalars by name."""
        return {name: getattr(self, name) for name in self._scalars}

    @property
    def device(self) -> torch.device:
        """The device that holds the heads."""
        return next(self.parameters()).device

    @torch.no_grad()
    def clamp_scalars(self, scalars: dict[str, Tensor]) -> None:
        """Keeps learned scalars, the heads' own or a stack's, within their bounds; to be called after each step."""
        for name, scalar in self._scalars.items():
            if scalar.is_learned:
                scalars[name].clamp_(scalar.low, scalar.high)

    def embed_views(self, features: Tensor) -> Tensor:
        """Embeds single views: float32 (..., image_dim) -> unit vectors (..., embedding_dim)."""
        return unit(self.image(self.standardize["image"](features)))

    def embed_images(self, views: Tensor) -> Tensor:
        """Embeds images as the normalised mean of their views' vectors: float32 (N, V, D) -> (N, embedding_dim)."""
        return unit(self.embed_views(views).mean(1))

    def embed_texts(self, features: Tensor) -> Tensor:
        """Embeds captions: float32 (..., text_dim) -> unit vectors (..., embedding_dim)."""
        return unit(self.text(self.standardize["text"](features)))


class Ensemble(nn.Module):
    """Several pairs of heads on the same features, as one space: the members' vectors side by side.

    Each member's vector is multiplied by the root of its weight. So the inner product of two such vectors is the
    weighted mean of the members' own, and an ensemble is searched like any single model.

    Args:
        members: two or more.
        weights: their shares of the scores, whose sum is 1; by default they are equal.
    """

    def __init__(self, members: Sequence[DualHeads], weights: Sequence[float] | None = None):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = list(weights or [1 / len(members)] * len(members))

    def embed_images(self, views: Tensor) -> Tensor:
        """Embeds images: float32 (N, V, image_dim) -> unit vectors (N, sum of the members' dimensions)."""
        return self._concatenated([member.embed_images(views) for member in self._heads()])

    def embed_texts(self, features: Tensor) -> Tensor:
        """Embeds captions: float32 (..., text_dim) -> unit vectors (..., sum of the members' dimensions)."""
        return self._concatenated([member.embed_texts(features) for member in self._heads()])

    def _heads(self) -> Iterator[DualHeads]:
        return (cast(DualHeads, member) for member in self.members)

    def _concatenated(self, vectors: list[Tensor]) -> Tensor:
        scaled = [vector * weight**0.5 for vector, weight in zip(vectors, self.weights, strict=True)]
        return torch.cat(scaled, dim=-1)


def members_of(heads: DualHeads | Ensemble) -> list[DualHeads]:
    """The pairs of heads of an ensemble, or the only one."""
    if isinstance(heads, Ensemble):
        return [cast(DualHeads, member) for member in heads.members]
    return [heads]


def weights_of(heads: DualHeads | Ensemble) -> list[float]:
    """The weights of an ensemble's members; 1 for a single pair."""
    if isinstance(heads, Ensemble):
        return heads.weights
    return [1.0]


def as_one(members: list[DualHeads], weights: Sequence[float] | None = None) -> DualHeads | Ensemble:
    """An ensemble of the members, in eval mode; of a single one the heads themselves."""
    if len(members) == 1:
        return members[0].eval()
    return Ensemble(members, weights).eval()
