"""
What replays of random halves of the clusters could reach at best: going on from a recorded state, on real rows.

    python -m benchmarks.training_on --task fashion

A replay that starts late misses what the absent rows did before, and one along the recorded path keeps its second
moments. Here nothing else is approximated: batches of the kept rows, one after the other, and the optimizer itself,
with its own second moments or with the recorded ones. Agreement with retraining from scratch (LDS of clusters) is
that on the first half-masks, by the tuning queries, which are never reported. For tasks whose recorded run is AdamW
without clipping on one batch a step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import truth as ground_truth
from benchmarks.recorded import Recorded
from benchmarks.report import RESULTS, Report, environment, versions
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.fidelity.scores import linear_datamodeling_score, noise_ceiling
from hf_rgm.losses import RowLoss
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import RowReader
from hf_rgm.trajectory import Trajectory, apply_update
from hf_rgm.trajectory.path import RecordedPath

NUM_MASKS = 12
NUM_QUERIES = 60
STATES = (1, 2, 3)
"""Positions of the recorded states that training goes on from. At the first there are no second moments to keep."""


class Continuation:
    """
    Goes on from recorded states.

    Args:
        model (`FunctionalModel`): The recorded run's model.
        trajectory (`Trajectory`): The recorded run.
        reader (`RowReader`): The training rows.
        batch_size (`int`): Rows of a step.
    """

    def __init__(self, model: FunctionalModel, trajectory: Trajectory, reader: RowReader, batch_size: int) -> None:
        self._model = model
        self._trajectory = trajectory
        self._inputs, self._labels = reader.batch(range(len(reader)))
        self._batch_size = batch_size
        self._path = RecordedPath(trajectory, model.space, model.device, rewind=0.0, stride=1)

    def parameters(self, rows: NDArray[np.integer], step: int, *, frozen: bool, seed: int) -> Tensor:
        """
        The final parameters, `(num_parameters,)`.

        Args:
            rows: Indices of the rows that are trained on.
            step: Recorded step to go on from.
            frozen: Keep the recorded second moments.
            seed: Of the order of rows.
        """
        space, state = self._model.space, self._trajectory.state(step)
        vector, moments = space.flatten(state.parameters), state.moments
        first = space.flatten(moments["exp_avg"])
        beta = self._trajectory.optimizer.groups[0].betas[0]
        batches = self._batches(rows, seed)
        for t in range(step, self._trajectory.num_steps):
            gradient = self._gradient(vector, next(batches))
            update = int(self._trajectory.update_numbers[t])
            if frozen:
                recorded = self._path.steps(t, t + 1)[0]
                first = beta * first + (1 - beta) * gradient
                vector = (1 - recorded.decoupled_decay) * vector - recorded.precondition * first / (1 - beta**update)
                continue
            updated, moments = apply_update(
                self._trajectory.optimizer,
                space.unflatten(vector),
                space.unflatten(gradient),
                moments,
                learning_rates=self._trajectory.steps.learning_rates[t].tolist(),
                step=update,
            )
            vector = space.flatten(updated)
        return vector

    def _batches(self, rows: NDArray[np.integer], seed: int) -> Iterator[NDArray[np.integer]]:
        generator, left = np.random.default_rng(seed), rows[:0]
        while True:
            while len(left) < self._batch_size:
                left = np.concatenate([left, generator.permutation(rows)])
            yield left[: self._batch_size]
            left = left[self._batch_size :]

    def _gradient(self, vector: Tensor, rows: NDArray[np.integer]) -> Tensor:
        named = {name: value.detach().requires_grad_() for name, value in self._model.space.unflatten(vector).items()}
        with torch.enable_grad():
            logits = self._model.logits(named, {name: value[rows] for name, value in self._inputs.items()})
            loss = RowLoss()(logits, self._labels[rows]).mean()
        gradients = torch.autograd.grad(loss, list(named.values()))
        return self._model.space.flatten(dict(zip(named, gradients, strict=True)))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """LDS of clusters by recorded step and kind of second moments, and the noise ceiling on the same masks."""
    task = ground_truth.load_task(name)
    truth = ground_truth.first_halves(task, NUM_MASKS, NUM_QUERIES)
    count = truth.shape[1]
    recorded = Recorded(task, folder)
    model, trajectory = FunctionalModel(recorded.model), Trajectory.load(folder)
    size = trajectory.metadata["per_device_train_batch_size"]
    continuation = Continuation(model, trajectory, RowReader(task.train, model), size)
    reader = RowReader(task.tuning_queries.select(range(count)), model, what="queries")
    queries, objective = Queries(*reader.batch(range(count))), resolve_objective(task.objective)
    kept = [np.flatnonzero(mask[task.clusters.cluster_ids]) for mask in task.cluster_masks()[:NUM_MASKS]]
    results: dict[str, Any] = {"noise_ceiling": vars(noise_ceiling(truth, linear_datamodeling_score))}
    for step in (trajectory.state_steps[position] for position in STATES):
        for frozen in (False, True):
            start = time.process_time()
            with model.differentiable():
                ends = [
                    continuation.parameters(rows, step, frozen=frozen, seed=seed) for seed, rows in enumerate(kept)
                ]
                values = torch.stack([objective.values(model, end, queries) for end in ends])
            found = linear_datamodeling_score(values.T.numpy(), truth.mean(0))
            moments = "recorded" if frozen else "own"
            share = step / trajectory.num_steps
            print(f"{name} from {share:.0%}, {moments} second moments: {found.value:.3f}", flush=True)
            results[f"{share:.2f}, {moments} second moments"] = {
                "lds_clusters": vars(found),
                "cpu_seconds": time.process_time() - start,
            }
    return results


def main(arguments: argparse.Namespace) -> None:
    """Measures, and writes."""
    identity = {"queries": "tuning", "num_masks": NUM_MASKS, "states": list(STATES)}
    report = Report(arguments.output, {"identity": identity, "versions": versions()}, [arguments.task], anew=False)
    with tempfile.TemporaryDirectory() as parent:
        found = measure(arguments.task, Path(parent) / "trajectory")
    report.put(arguments.task, {"results": found, "environment": environment()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="fashion", choices=("digits", "fashion"))
    parser.add_argument("--output", type=Path, default=RESULTS / "training-on.json", help="another JSON file")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(given)
