"""The optimizer of a fine-tuning: AdamW over heads and unfrozen layers, with a learning rate for each depth.

Rates fall from layer to layer below (as in ELECTRA, Clark et al. 2020, and BEiT, Bao et al. 2022).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from onceover.configs.schema import FinetuneConfig
from onceover.heads.models import DualHeads
from onceover.heads.towers import Tower

CLIP_NORM = 1.0  # of the whole gradient

_HEADS = "heads."  # prefix of the names of the heads' parameters


class FinetuneOptimizer:
    """AdamW with a learning rate for each depth, and the parameters that it trains.

    ``rate`` is multiplied by ``heads_factor`` for the heads and by ``layer_decay ** depth`` for an encoder's layers.
    Weight decay is for matrices alone.

    Attributes:
        parameters: by name: ``heads.NAME``, ``image.NAME`` and ``text.NAME``.
    """

    def __init__(self, heads: DualHeads, towers: Mapping[str, Tower], settings: FinetuneConfig):
        self.parameters: dict[str, Tensor] = {}
        self._groups: dict[tuple[float, bool], list[Tensor]] = {}  # by scale of the rate and whether it decays
        for name, parameter in heads.named_parameters():
            if parameter.requires_grad:
                self._add(f"{_HEADS}{name}", parameter, settings.heads_factor)
        for kind, tower in towers.items():
            for name, value in tower.unfrozen_parameters().items():
                self._add(f"{kind}.{name}", value, settings.layer_decay ** tower.depths[name])
        groups = []
        for (scale, decays), parameters in self._groups.items():
            weight_decay = settings.weight_decay if decays else 0.0
            groups.append({"params": parameters, "scale": scale, "weight_decay": weight_decay})
        self._adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)

    def _add(self, name: str, parameter: Tensor, scale: float) -> None:
        self.parameters[name] = parameter
        is_matrix = parameter.ndim > 1
        self._groups.setdefault((scale, is_matrix), []).append(parameter)

    @property
    def highest_rate(self) -> float:
        """The highest learning rate of the last step."""
        return max(group["lr"] for group in self._adamw.param_groups)

    def copies(self, *, heads_only: bool = False) -> dict[str, Tensor]:
        """Copies of the parameters by name; ``heads_only``: of the heads' alone."""
        names = [name for name in self.parameters if name.startswith(_HEADS) or not heads_only]
        return {name: self.parameters[name].detach().clone() for name in names}

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Sets parameters to the values that are given by name; the others stay as they are."""
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def shared_parameters(self, scalars: Mapping[str, Tensor]) -> list[Tensor]:
        """The parameters whose gradients workers add up: all but the loss's scalars, whose gradient each has whole."""
        return [value for name, value in self.parameters.items() if name.removeprefix(_HEADS) not in scalars]

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._adamw.zero_grad()

    def clip(self) -> float:
        """Clips the gradient, and returns its norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM))

    def step(self, rate: float) -> None:
        """Takes one step. ``rate``: the learning rate of an encoder's topmost layer."""
        for group in self._adamw.param_groups:
            group["lr"] = rate * group["scale"]
        self._adamw.step()

    def state(self) -> dict:
        """AdamW's state."""
        return self._adamw.state_dict()

    def restore(self, state: dict) -> None:
        """Resumes from a ``state``."""
        self._adamw.load_state_dict(state)
