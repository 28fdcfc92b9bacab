"""The gradient of a fine-tuning's step, through heads and towers, over all workers.

The gradient with respect to the embeddings comes first. It then goes back through the passes that gave them, or, where
the batch is larger than ``micro_batch``, through a second pass of one micro-batch after the other, which needs the
memory of one micro-batch (GradCache, Gao et al. 2021).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from onceover.configs.schema import ModelConfig
from onceover.extract.store import KINDS
from onceover.heads.finetune_steps import Step
from onceover.heads.losses import LOSSES
from onceover.heads.models import DualHeads
from onceover.heads.noise import augment
from onceover.heads.towers import MicroBatch, Tower
from onceover.heads.workers import Workers


class GradientComputer:
    """Computes the loss of a step and the gradients of heads and towers.

    Args:
        model: settings of the heads: both kinds of dropout, and variation.
        micro_batch: images whose activations fit the memory; a larger share of a batch takes two passes.
    """

    def __init__(
        self,
        heads: DualHeads,
        towers: Mapping[str, Tower],
        model: ModelConfig,
        micro_batch: int,
        workers: Workers,
    ):
        self._heads = heads
        self._towers = towers
        self._model = model
        self._micro_batch = micro_batch
        self._workers = workers
        self._loss = LOSSES.load(heads.loss)

    def backward(self, step: Step) -> float:
        """Adds the gradient of a step to the parameters, those of this worker's share; returns the loss.

        For each kind, with a share of 3 rows in micro-batches of the positions [2 0] and [1]::

            vectors    (3, D)        this worker's, in the order of the batch
            leaves     (rows, D)     all workers'; the loss gives their gradient
            gradients  (3, D)        of this worker's rows
                                     one pass: vectors.backward(gradients)
                                     two passes: embed [2 0] again, .backward(gradients[[2, 0]]); then [1]
        """
        is_one_pass = int(np.diff(step.bounds["image"]).max()) <= self._micro_batch
        with torch.set_grad_enabled(is_one_pass):
            vectors = {kind: self._embed_share(kind, step) for kind in KINDS}
        leaves = {}
        for kind in KINDS:
            gathered = self._workers.gather(vectors[kind].detach(), step.bounds[kind])
            leaves[kind] = gathered.requires_grad_()
        loss = self._loss.loss(leaves["image"], leaves["text"], step.image_of_text, self._heads.scalars)
        value = loss.item()
        loss.backward()
        for kind in KINDS:
            gradient = leaves[kind].grad
            assert gradient is not None, "a loss depends on the embeddings"
            own_gradient = gradient[self._workers.own(step.bounds[kind])]
            if is_one_pass and step.micro_batches[kind]:
                vectors[kind].backward(own_gradient)
                continue
            for batch in step.micro_batches[kind]:
                positions = torch.from_numpy(batch.positions).to(own_gradient.device)
                self.embed(kind, batch, step).backward(own_gradient[positions])
        return value

    def _embed_share(self, kind: str, step: Step) -> Tensor:
        """Embeds this worker's share, which may be empty: (b, embedding_dim)."""
        batches = step.micro_batches[kind]
        if not batches:
            return torch.empty(0, self._heads.embedding_dim, device=self._workers.device)
        return in_batch_order([self.embed(kind, batch, step) for batch in batches], batches)

    def embed(self, kind: str, batch: MicroBatch, step: Step) -> Tensor:
        """Embeds a micro-batch: (b, embedding_dim). A second pass drops the same features as the first.

        With feature transfer, the rows whose difference is added are appended to the encoder's features::

            table  (3 b, D)   [encoder's features (b) | stored, first (b) | stored, second (b)]
        """
        features = self._towers[kind].forward(batch)
        noise = step.noise[kind].part(batch.positions)
        tables = [features]
        count = len(features)
        rows = np.arange(count)
        if kind in step.transfer:
            positions = torch.from_numpy(batch.positions)
            tables += [stored[positions].to(self._workers.device) for stored in step.transfer[kind]]
            noise = replace(noise, first=rows + count, second=rows + 2 * count)
        table = self._heads.standardize[kind](torch.cat(tables))
        augmented = augment(table, rows, noise, self._model.variation, self._model.dropout, self._model.block_dropout)
        head = self._heads.image if kind == "image" else self._heads.text
        return head(augmented)


def in_batch_order(rows: Sequence[Tensor], batches: Sequence[MicroBatch]) -> Tensor:
    """Joins the rows (b, D) of micro-batches in the order of the batch: (B, D)."""
    order = np.argsort(np.concatenate([batch.positions for batch in batches]))
    return torch.cat(list(rows))[torch.from_numpy(order).to(rows[0].device)]
