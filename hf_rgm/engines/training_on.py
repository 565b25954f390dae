"""Training on: from a recorded state to the end, on the rows that are kept."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_rgm.engines.anchored_replay import finite, progress
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.gradient_sources import RowSource
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.trajectory.optimizers import apply_update

CLIPPING_EPSILON = 1e-6
"""What torch adds to the norm it divides by."""


class TrainingOnEngine(Engine):
    """
    Goes on with the training itself, from a recorded state with its moments, on batches of the rows that are kept.

    The nearest to retraining where much is removed (docs/method.md, training on); a model costs what is left of a
    training.
    """

    name = "training_on"
    needs = "rows"
    anchored = False  # its batches are others
    rewind = 0.27

    @property
    def batch_size(self) -> int:
        """One model after the other."""
        return 1

    def prepare(self, rewind: float) -> None:
        """Needs no gradients of clusters."""

    def start(self, rewind: float) -> int:
        """The recorded state nearest to the rewind point, the last one excepted."""
        path = self.run.path(rewind)
        return path.nearest_state(path.start, before=self.run.trajectory.num_steps)

    def replay(self, masks: Tensor, rewind: float) -> Tensor:
        """Final parameters under each row of `masks`."""
        rows = self._rows
        start = self.start(rewind)
        return finite(torch.stack([self._trained_on(rows, mask, start) for mask in masks]), start)

    def costs(self, num_masks: int, rewind: float | None) -> PieceOfWork:
        """From the gradient of one batch."""
        rows = self._rows
        batch = np.arange(min(self._rows_per_step, len(rows.reader)))
        weights = torch.ones(len(batch), device=self.run.model.device)
        step = measured(lambda: self._gradient(rows, self.run.final, batch, weights))
        steps = self.run.trajectory.num_steps - self.start(self.rewind if rewind is None else rewind)
        # Parameters, gradient and both moments, before and after an update, and what it makes of them.
        return PieceOfWork(steps * num_masks * step.seconds, step.peak_bytes + 40 * self.run.model.num_parameters)

    @property
    def _rows(self) -> RowSource:
        if self.run.rows is None:
            raise RuntimeError("This engine needs the training rows.")
        return self.run.rows

    @property
    def _rows_per_step(self) -> int:
        """Rows of an update, over all processes of the recorded training."""
        told = self.run.trajectory.metadata
        factors = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
        return int(np.prod([int(told.get(name) or 1) for name in factors]))

    def _trained_on(self, rows: RowSource, mask: Tensor, start: int) -> Tensor:
        run = self.run
        table, rule, space = run.trajectory.steps, run.trajectory.optimizer, run.model.space
        weights = mask[torch.tensor(run.clusters.cluster_ids, device=mask.device, dtype=torch.int64)]
        kept = np.flatnonzero(weights.cpu().numpy() > 0)
        # Weights are relative to the whole training set: without a tenth of it, gradients are a tenth smaller.
        weights = weights * (len(kept) / len(weights))
        max_norm = float(run.trajectory.metadata.get("max_grad_norm") or 0.0)
        state = run.trajectory.state(start)
        parameters = {name: value.to(run.model.device) for name, value in state.parameters.items()}
        moments = {
            kind: {name: value.to(run.model.device) for name, value in values.items()}
            for kind, values in state.moments.items()
        }
        # Where nothing is kept all weights are 0, whatever the batches are.
        batches = _batches(kept if len(kept) else np.arange(len(weights)), self._rows_per_step)
        for t in progress(range(start, run.trajectory.num_steps), 1, start, disable=run.disable_tqdm):
            if table.skipped[t]:
                continue
            batch = next(batches)
            gradient = self._gradient(rows, space.flatten(parameters), batch, weights[torch.from_numpy(batch)])
            if max_norm:
                gradient = gradient * min(1.0, max_norm / (float(gradient.norm()) + CLIPPING_EPSILON))
            parameters, moments = apply_update(
                rule,
                parameters,
                space.unflatten(gradient),
                moments,
                learning_rates=table.learning_rates[t].tolist(),
                step=int(run.trajectory.update_numbers[t]),
            )
        return space.flatten(parameters)

    def _gradient(self, rows: RowSource, vector: Tensor, batch: NDArray[np.int64], weights: Tensor) -> Tensor:
        model = self.run.model
        inputs, labels = rows.reader.batch(batch)
        named = {name: value.detach().requires_grad_() for name, value in model.space.unflatten(vector).items()}
        with torch.enable_grad():
            loss = (weights * rows.row_loss(model.logits(named, inputs), labels)).mean()
        gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        return model.space.flatten(dict(zip(named, gradients, strict=True)))


def _batches(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Batches of rows in a random order, the same for the same rows, without end."""
    generator, left = np.random.default_rng(0), rows[:0]
    while True:
        while len(left) < size:
            left = np.concatenate([left, generator.permutation(rows)])
        yield left[:size]
        left = left[size:]
