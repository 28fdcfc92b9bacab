"""Projection heads: features of two encoders -> one shared space."""

from collections.abc import Callable, Iterable

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
    """A head for images, a head for captions, and the scalars of the loss that trains them, such as a temperature.

    Attributes:
        config: the settings they were made with. loss: the name of the loss.
    """

    def __init__(self, image_dim: int, text_dim: int, config: ModelConfig, loss: str = "contrastive"):
        super().__init__()
        self.standardize = nn.ModuleDict({"image": Standardize(image_dim), "text": Standardize(text_dim)})
        self.image, self.text = (_HEADS[config.head](dim, config.embedding_dim) for dim in (image_dim, text_dim))
        self.config = config
        self.embedding_dim = config.embedding_dim
        self.loss = loss
        self._scalars = LOSSES.load(loss).scalars(config)
        for name, scalar in self._scalars.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(scalar.start), requires_grad=scalar.is_learned))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Standardised features (B, image_dim) and (T, text_dim) -> vectors of any length, and the loss's scalars."""
        return self.image(images), self.text(texts), self.scalars

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The loss's scalars by name."""
        return {name: getattr(self, name) for name in self._scalars}

    @property
    def device(self) -> torch.device:
        """Where the heads are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def clamp_scalars(self, scalars: dict[str, Tensor]) -> None:
        """Keeps learned scalars, the heads' own or a stack's, within their bounds; to be called after each step."""
        for name, scalar in self._scalars.items():
            if scalar.is_learned:
                scalars[name].clamp_(scalar.low, scalar.high)

    def embed_images(self, features: Tensor) -> Tensor:
        """float32 (..., image_dim) -> unit vectors (..., embedding_dim)."""
        return unit(self.image(self.standardize["image"](features)))

    def embed_pictures(self, views: Tensor) -> Tensor:
        """One unit vector an image, the normalised mean of its views': float32 (N, V, D) -> (N, embedding_dim)."""
        return unit(self.embed_images(views).mean(1))

    def embed_texts(self, features: Tensor) -> Tensor:
        """float32 (..., text_dim) -> unit vectors (..., embedding_dim)."""
        return unit(self.text(self.standardize["text"](features)))


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
