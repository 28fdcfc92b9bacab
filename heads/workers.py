"""Workers: processes that train together, each on its share of a batch, as ``torchrun`` starts them.

Each worker embeds its images and captions. The embeddings of all are gathered, every worker takes the loss over the
whole batch and sends the gradient of its own rows back. The sum of the workers' gradients is the gradient of the whole
batch, as with open_clip's gathering with gradients. A single process is a worker alone and exchanges nothing.
"""

import os
from collections.abc import Iterable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = timedelta(hours=12)  # for work that one does while the others wait: caching, validation


class Workers:
    """The workers of a training, seen from one of them.

    Attributes:
        rank: the number of this worker; 0 leads: it writes, validates and tells the user.
        size: how many there are.
        device: of this worker.
    """

    def __init__(self, device: torch.device):
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = device
        if self.size > 1 and device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)

    @property
    def leads(self) -> bool:
        """Whether this worker is the first."""
        return self.rank == 0

    def bounds(self, count: int) -> np.ndarray:
        """Splits ``count`` rows: worker k has the rows from bounds[k] up to bounds[k + 1]; int64 (size + 1,)."""
        return np.arange(self.size + 1) * count // self.size

    def own(self, bounds: np.ndarray) -> slice:
        """The rows of this worker."""
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def gather(self, own: Tensor, bounds: np.ndarray) -> Tensor:
        """Joins the rows of all workers: (n, D) of each -> (sum of n, D).

        Args:
            bounds: int64 (size + 1,), which rows each worker has.
        """
        if self.size == 1:
            return own
        counts = np.diff(bounds)
        padded = own.new_zeros(int(counts.max()), own.shape[1])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds up the workers' gradients, in one message."""
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = []
        for parameter in trained:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(gradient.reshape(-1))
        flat = torch.cat(gradients)
        dist.all_reduce(flat)
        parts = flat.split([parameter.numel() for parameter in trained])
        for parameter, part in zip(trained, parts, strict=True):
            # in the memory layout of the parameter, which a fused step walks through
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))

    def agree(self, value: float) -> float:
        """Returns the first worker's value in all of them."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def wait(self) -> None:
        """Returns when all workers have come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Waits for all workers to come here, and goes on without them."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()
