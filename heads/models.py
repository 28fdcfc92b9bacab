"""Projection heads: features of two encoders -> one shared space."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onceover.configs.schema import ModelConfig

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1.0  # bounds of a learned temperature (CLIP's own clamp, logit scale <= 100)


class Standardize(nn.Module):
    """Shifts and scales each feature to mean 0 and standard deviation 1 over the train split; saved with the heads.

    Features that are never negative over the train split, as averages of ReLU outputs are, are square-rooted first
    (the Hellinger map of Arandjelovic and Zisserman 2012), which takes the weight off their few large values. A feature
    that is constant over the train split becomes 0.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("root", torch.tensor(False))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, features: Callable[[], Iterable[Tensor]]) -> None:
        """Takes mean and deviation from float32 features (..., D), given twice, block by block.

        Blocks are joined by the pairwise update of Chan, Golub and LeVeque (1983), in float64.
        """
        self.root.fill_(all(bool(block.min() >= 0) for block in features()))
        count, mean, squares, largest = 0, 0.0, 0.0, torch.zeros_like(self.mean)
        for block in features():
            rows = self._rooted(block).reshape(-1, block.shape[-1]).double()
            total = count + len(rows)
            own = rows.mean(0)
            difference = own - mean
            spread = (rows - own).square_().sum(0)  # var(0) takes four times as long
            squares = squares + spread + difference**2 * (count * len(rows) / total)
            mean = mean + difference * (len(rows) / total)
            count, largest = total, torch.maximum(largest, rows.abs().amax(0))
        deviation = (squares / count).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > torch.finfo(torch.float32).eps * largest, 1 / deviation, 0.0))

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return (self._rooted(features) - self.mean).mul_(self.scale)

    def _rooted(self, features: Tensor) -> Tensor:
        features = features.to(self.mean.dtype)
        return features.clamp_min(0).sqrt() if self.root else features


class Projection(nn.Linear):
    """A linear layer whose weight is (in_dim, out_dim), as the products of a stack give its gradient."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return features @ self.weight + self.bias


class ResidualMLP(nn.Module):
    """A linear projection, then one residual block: GELU, linear, sum, LayerNorm."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.project = Projection(in_dim, out_dim)
        self.block = nn.Sequential(nn.GELU(), Projection(out_dim, out_dim))
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        projected = self.project(features)
        return self.norm(projected + self.block(projected))


_HEADS = {"linear": Projection, "mlp": ResidualMLP}


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., D) of length 1; one without direction stays 0. Nothing else normalises embeddings."""
    return F.normalize(vectors, dim=-1)


class DualHeads(nn.Module):
    """A head for pictures, a head for captions, and the temperature of their contrast.

    Attributes:
        config: what they were made with.
    """

    def __init__(self, image_dim: int, text_dim: int, config: ModelConfig):
        super().__init__()
        self.standardize = nn.ModuleDict({"image": Standardize(image_dim), "text": Standardize(text_dim)})
        self.image, self.text = (_HEADS[config.head](dim, config.embedding_dim) for dim in (image_dim, text_dim))
        self.config, self.embedding_dim = config, config.embedding_dim
        self.log_temperature = nn.Parameter(
            torch.tensor(config.temperature).log(), requires_grad=config.learn_temperature
        )

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised features (B, image_dim) and (T, text_dim) -> vectors of any length, and the temperature."""
        return self.image(images), self.text(texts), self.temperature

    def embed_images(self, features: Tensor) -> Tensor:
        """float32 (..., image_dim) -> unit vectors (..., embedding_dim)."""
        return unit(self.image(self.standardize["image"](features)))

    def embed_pictures(self, views: Tensor) -> Tensor:
        """One unit vector a picture, the normalised mean of its views': float32 (N, V, D) -> (N, embedding_dim)."""
        return unit(self.embed_images(views).mean(1))

    def embed_texts(self, features: Tensor) -> Tensor:
        """float32 (..., text_dim) -> unit vectors (..., embedding_dim)."""
        return unit(self.text(self.standardize["text"](features)))

    @property
    def temperature(self) -> Tensor:
        """The divisor of the similarities, a scalar."""
        return self.log_temperature.exp()

    @staticmethod
    @torch.no_grad()
    def clamp_temperature(log_temperature: Tensor) -> None:
        """Keeps learned temperatures, given as their logarithms, within bounds; to be called after each step."""
        if log_temperature.requires_grad:
            log_temperature.clamp_(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))


class Ensemble(nn.Module):
    """Several pairs of heads on the same features, as one space: the members' vectors side by side.

    The inner product of two such vectors, each divided by the root of the number of members, is the mean of the
    members' own, so that an ensemble is searched like any single model.
    """

    def __init__(self, members: list[DualHeads]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def embed_pictures(self, views: Tensor) -> Tensor:
        """float32 (N, V, image_dim) -> unit vectors (N, sum of the members' dimensions)."""
        return self._joined([member.embed_pictures(views) for member in self.members])

    def embed_texts(self, features: Tensor) -> Tensor:
        """float32 (..., text_dim) -> unit vectors (..., sum of the members' dimensions)."""
        return self._joined([member.embed_texts(features) for member in self.members])

    def _joined(self, vectors: list[Tensor]) -> Tensor:
        return torch.cat(vectors, dim=-1) / len(vectors) ** 0.5


def mix(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """The normalised weighted sum of two sets of unit vectors, (..., D); ``weight`` is the first one's share."""
    return unit(weight * first + (1 - weight) * second)
