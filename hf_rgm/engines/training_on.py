"""Training on: from a recorded state to the end, on the rows that are kept."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_rgm.engines.anchored_replay import finite, loss_gradient
from hf_rgm.engines.plain_replay import ContinuingEngine
from hf_rgm.engines.recorded_run import given


class TrainingOnEngine(ContinuingEngine):
    """Continues the training itself on batches of the rows that are kept (docs/method.md, training on)."""

    name = "training_on"
    needs = "rows"
    rewind = 0.27

    @property
    def batch_size(self) -> int:
        """One model at a time."""
        return 1

    def prepare(self, rewind: float) -> None:
        """Needs no gradients of clusters."""

    def replay(self, masks: Tensor, rewind: float) -> Tensor:
        """Final parameters `(num_masks, num_parameters)` under `masks`, `(num_masks, num_clusters)`."""
        start = self.start(rewind)
        return finite(torch.cat([self._trained_on(mask, start) for mask in masks]), start)

    def one_gradient(self) -> Tensor:
        batch = np.arange(min(self._rows_per_step, len(self.run.clusters.cluster_ids)))
        return self._gradient(self.run.final, batch, torch.ones(len(batch), device=self.run.model.device))

    @property
    def _rows_per_step(self) -> int:
        """Rows of an update, over all processes of the recorded training."""
        told = self.run.trajectory.metadata
        factors = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
        return int(np.prod([int(told.get(name) or 1) for name in factors]))

    def _trained_on(self, mask: Tensor, start: int) -> Tensor:
        """Final parameters `(1, num_parameters)` under one mask, `(num_clusters,)`."""
        weights = mask[torch.tensor(self.run.clusters.cluster_ids, device=mask.device, dtype=torch.int64)]
        seen = given(self.run.rows, "the training rows").seen
        kept = np.flatnonzero((weights.cpu().numpy() > 0) & seen)
        # Weights are relative to the whole training set: without a tenth of it, gradients are a tenth smaller.
        weights = weights * (len(kept) / int(seen.sum()))
        max_norm = float(self.run.trajectory.metadata.get("max_grad_norm") or 0.0)
        # If nothing is kept all weights are 0, and any batches will do.
        batches = _batches(kept if len(kept) else np.flatnonzero(seen), self._rows_per_step)

        def clipped(_: int, current: Tensor) -> Tensor:
            batch = next(batches)
            gradient = self._gradient(current[0], batch, weights[torch.from_numpy(batch)])
            if max_norm:  # as torch.nn.utils.clip_grad_norm_ does
                gradient = gradient * min(1.0, max_norm / (float(gradient.norm()) + 1e-6))
            return gradient[None]

        return self.continued(start, 1, clipped)

    def _gradient(self, vector: Tensor, batch: NDArray[np.int64], weights: Tensor) -> Tensor:
        """Gradient `(num_parameters,)` of the weighted mean loss of a batch."""
        model, rows = self.run.model, given(self.run.rows, "the training rows")
        inputs, labels = rows.reader.batch(batch)
        return loss_gradient(
            model, vector, lambda named: (weights * rows.row_loss(model.logits(named, inputs), labels)).mean()
        )


def _batches(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Batches of rows in random order, the same for the same rows, without end."""
    generator, left = np.random.default_rng(0), rows[:0]
    while True:
        while len(left) < size:
            left = np.concatenate([left, generator.permutation(rows)])
        yield left[:size]
        left = left[size:]
