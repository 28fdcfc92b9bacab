"""Processes that train together, each on its share of a batch, as ``torchrun`` starts them; one alone needs nothing.

Each process embeds its images and captions. The embeddings of all are gathered, every process takes the loss over
the whole batch, and sends back through its own part what the loss says of it; the sum of the processes' gradients is
then the gradient of the whole batch, as with open_clip's gathering with gradients.
"""

import os
from collections.abc import Iterable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(hours=12)  # for what one process does while the others wait: caching, measuring


class Workers:
    """The processes of this training.

    Attributes:
        rank: which one this is; 0 writes and measures. size: how many there are.
    """

    def __init__(self, device: torch.device):
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = device
        if self.size > 1 and device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)

    def shares(self, count: int) -> np.ndarray:
        """Where each process's share of ``count`` begins, and the last one's ends: int64 (size + 1,)."""
        return np.arange(self.size + 1) * count // self.size

    def gather(self, own: Tensor, bounds: np.ndarray) -> Tensor:
        """The rows of all processes, (n, D) here, as (sum of n, D); ``bounds``: where each one's begin and end."""
        if self.size == 1:
            return own
        counts = np.diff(bounds)
        padded = own.new_zeros(int(counts.max()), own.shape[1])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds the processes' gradients up, in one message."""
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        flat = torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).reshape(-1) for each in trained])
        dist.all_reduce(flat)
        for parameter, part in zip(trained, flat.split([each.numel() for each in trained]), strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))  # as the parameter lies

    def agree(self, value: float) -> float:
        """The first process's value."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return float(told)

    def leave(self) -> None:
        """Waits for all processes to have come here, and goes on without the others."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()
