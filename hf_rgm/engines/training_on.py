"""Training on: from a recorded state to the end, on the rows that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_rgm.engines.anchored_replay import finite, loss_gradient, progress
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.recorded_run import given
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.trajectory.optimizers import apply_update

GradientOf = Callable[[int, Tensor], Tensor]
"""Gradient `(num_parameters,)` of a model at a training step and its parameters."""


class TrainingOnEngine(Engine):
    """Continues the training itself on batches of the rows that are kept (docs/method.md, training on)."""

    name = "training_on"
    needs = "rows"
    rewind = 0.27
    anchored = False

    @property
    def batch_size(self) -> int:
        """One model at a time."""
        return 1

    def prepare(self, rewind: float) -> None:
        """Needs no gradients of clusters."""

    def start(self, rewind: float) -> int:
        """Recorded state nearest to the rewind point, the last one excepted."""
        path = self.run.path(rewind)
        return path.nearest_state(path.start, before=self.run.trajectory.num_steps)

    def replay(self, masks: Tensor, rewind: float) -> Tensor:
        """Final parameters `(num_masks, num_parameters)` under `masks`, `(num_masks, num_clusters)`."""
        start = self.start(rewind)
        return finite(torch.stack([self._continued(start, self.gradients(mask)) for mask in masks]), start)

    def _continued(self, start: int, gradient: GradientOf) -> Tensor:
        """Final parameters `(num_parameters,)` by the recorded optimizer, from a recorded state with its moments."""
        run, device = self.run, self.run.model.device
        recorded, table, space = run.trajectory.state(start), run.trajectory.steps, run.model.space
        current = space.flatten(recorded.parameters).to(device)
        moments = {
            kind: {name: value.to(device) for name, value in values.items()}
            for kind, values in recorded.moments.items()
        }
        for t in progress(range(start, run.trajectory.num_steps), 1, start, disable=run.disable_tqdm):
            if table.skipped[t]:
                continue
            updated, moments = apply_update(
                run.trajectory.optimizer,
                space.unflatten(current),
                space.unflatten(gradient(t, current)),
                moments,
                learning_rates=table.learning_rates[t].tolist(),
                step=int(run.trajectory.update_numbers[t]),
            )
            current = space.flatten(updated)
        return current

    def costs(self, num_masks: int, rewind: float | None) -> PieceOfWork:
        """Cost of so many models, from one gradient."""
        gradient, run = measured(self.one_gradient), self.run
        steps = run.trajectory.num_steps - self.start(self.rewind if rewind is None else rewind)
        # Parameters, gradients and both moments, before and after an update, and temporaries of the update.
        return PieceOfWork(steps * num_masks * gradient.seconds, 40 * run.model.num_parameters + gradient.peak_bytes)

    def one_gradient(self) -> Tensor:
        """Gradient of one training step of one model, for estimates."""
        batch = np.arange(min(self._rows_per_step, len(self.run.clusters.cluster_ids)))
        return self._gradient(self.run.final, batch, torch.ones(len(batch), device=self.run.model.device))

    @property
    def _rows_per_step(self) -> int:
        """Rows of an update, over all processes of the recorded training."""
        told = self.run.trajectory.metadata
        factors = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
        return int(np.prod([int(told.get(name) or 1) for name in factors]))

    def gradients(self, mask: Tensor) -> GradientOf:
        """Gradients of the training steps under one mask, `(num_clusters,)`."""
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
            gradient = self._gradient(current, batch, weights[torch.from_numpy(batch)])
            if max_norm:  # as torch.nn.utils.clip_grad_norm_ does
                gradient = gradient * min(1.0, max_norm / (float(gradient.norm()) + 1e-6))
            return gradient

        return clipped

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
