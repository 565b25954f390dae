"""
Whether the steps that saw a row should count: scores with rows all alike, and with rows as steps saw them.

    python -m benchmarks.rows_seen --tasks sentences lm     # shuffled: tuning queries, truth over several seeds
    python -m benchmarks.rows_seen --ordered                # one epoch in order: truth by the same steps

Shuffled rows are better taken alike: which steps saw a row is an accident that the next training does not repeat.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import truth
from benchmarks.recorded import Recorded
from hf_rgm import Attributor, ClusterMap, TrajectoryCallback
from hf_rgm.agreement.correlations import leave_cluster_out_correlation, linear_datamodeling_score
from hf_rgm.attribution import subject
from hf_rgm.testing import tiny_dataset, tiny_trainer
from hf_rgm.trajectory.exposure import Exposure

NUM_QUERIES = 40
PARTS, BATCH, RATE = 8, 2, 0.1


class AsSeen(Exposure):
    """Rows count at each state by whether its steps saw them, whatever the order."""

    def of_rows(self, states):
        """Exposures by state, as of an order that is no accident."""
        shuffled, self.is_ordered = self.is_ordered, True
        found = super().of_rows(states)
        self.is_ordered = shuffled
        return found


def shuffled(name: str) -> None:
    """Prints agreement with retraining for a task whose rows are shuffled."""
    task = truth.load_task(name)
    known = truth.load(task, tuning=True).first(NUM_QUERIES)
    queries = task.tuning_queries.select(range(NUM_QUERIES))
    with tempfile.TemporaryDirectory() as folder:
        recorded = Recorded(task, Path(folder) / "trajectory")
        for label, exposure in (("all alike", Exposure), ("as seen", AsSeen)):
            subject.Exposure = exposure
            options = {"rows": task.train, "clusters": task.clusters, "max_memory": task.max_memory}
            asked = Attributor(recorded.model, trajectory=recorded.folder, disable_tqdm=True, **options)
            found = asked.attribute(queries, objective=task.objective)
            rows = linear_datamodeling_score(
                found.row_scores @ task.row_masks().T.astype(np.float32), known.row_subsets.mean(0)
            )
            clusters = leave_cluster_out_correlation(found.scores, known.leave_out.mean(0))
            print(f"{name}, {label}: leave-cluster-out {clusters.value:.3f}, LDS of rows {rows.value:.3f}")


def ordered() -> None:
    """Prints effects of the parts of one ordered epoch beside those of retraining."""
    train, queries, rows = tiny_dataset(48, seed=0), tiny_dataset(6, seed=1), 48 // PARTS
    with tempfile.TemporaryDirectory() as folder:
        settings = {"learning_rate": RATE, "max_grad_norm": 0, "optim": "sgd", "num_train_epochs": 1}
        order = {"per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential"}
        callback = TrajectoryCallback(f"{folder}/trajectory")
        trainer = tiny_trainer(train, callbacks=[callback], **settings, **order)
        trainer.train()
        clusters = ClusterMap.from_ids([row // rows for row in range(48)])
        asked = Attributor(trainer.model, trajectory=callback.folder, rows=train, clusters=clusters, disable_tqdm=True)
        found = asked.attribute(queries)
    whole = _margins(train, queries, range(0))
    parts = [range(rows * part, rows * (part + 1)) for part in range(PARTS)]
    retrained = np.stack([whole - _margins(train, queries, part) for part in parts])
    for label, effects in (("retrained", retrained.T), ("as seen", found.scores)):
        mean = np.abs(effects).mean(0)
        print(f"{label}: {np.round(mean / mean.mean(), 2).tolist()}")
    print("correlation:", round(float(np.corrcoef(found.scores.T.ravel(), retrained.ravel())[0, 1]), 2))


def _margins(train, queries, absent: range) -> np.ndarray:
    """Margins of the queries after the same steps, to which the absent rows add nothing."""
    model = tiny_trainer(train).model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    rows, asked = train.with_format("torch")[:], queries.with_format("torch")[:]
    num_steps = len(train) // BATCH
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / num_steps)
        batch = torch.arange(BATCH * step, BATCH * (step + 1))
        logits = model(rows["pixel_values"][batch]).logits
        losses = torch.nn.functional.cross_entropy(logits, rows["labels"][batch], reduction="none")
        optimizer.zero_grad()
        (losses * torch.tensor([row not in absent for row in batch.tolist()])).mean().backward()
        optimizer.step()
    logits, labels = model(asked["pixel_values"]).logits.detach(), asked["labels"][:, None]
    others = logits.scatter(1, labels, -torch.inf).logsumexp(1)
    return (logits.gather(1, labels)[:, 0] - others).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--ordered", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tasks:
        shuffled(name)
    if arguments.ordered:
        ordered()


if __name__ == "__main__":
    main()
