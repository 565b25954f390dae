"""
Ground truth of a task by retraining, cached as one file per retraining.

Values of the task's objective are cached in its folder, logits of the models whose outputs are compared in the
subfolder `logits`.

    python -m benchmarks.truth --task digits                # everything
    python -m benchmarks.truth --task digits --shard 0/2    # half of the work, for two processes side by side
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import concatenate_datasets

from benchmarks.tasks import Task
from hf_rgm import Objective
from hf_rgm.agreement.subsets import kept_rows
from hf_rgm.fidelity.retraining import retrain

CACHE = Path(os.environ.get("HF_RGM_BENCH_CACHE", Path.home() / ".cache" / "hf-rgm-benchmarks"))
NUM_OUTPUT_SEEDS = 2

LOGITS = Objective("logits", lambda forward, queries: forward(queries.inputs).flatten(), differentiable=False)
"""All logits of all queries as one vector: `(num_queries * num_labels,)`; of a model, never of its linearisation."""


@dataclass
class Truth:
    """
    Retrained objectives and outputs.

    Args:
        leave_out (`np.ndarray`): `(num_seeds, num_queries, num_clusters)`, f(all) - f(without cluster).
        cluster_subsets (`np.ndarray`): `(num_seeds, num_queries, num_cluster_masks)`, objective values.
        row_subsets (`np.ndarray`): `(num_seeds, num_queries, num_row_masks)`, objective values.
        outputs (`dict[str, np.ndarray]`): For each of [`Task.distance_masks`], the logits of two seeds:
            `(2, num_masks, num_queries, num_labels)`. Empty where the task compares none.
    """

    leave_out: np.ndarray
    cluster_subsets: np.ndarray
    row_subsets: np.ndarray
    outputs: dict[str, np.ndarray]

    def first(self, count: int) -> Truth:
        """The truth on the first `count` queries."""
        return Truth(
            self.leave_out[:, :count],
            self.cluster_subsets[:, :count],
            self.row_subsets[:, :count],
            {part: logits[:, :, :count] for part, logits in self.outputs.items()},
        )

    def sha256(self) -> str:
        """Identity of all values."""
        digest = hashlib.sha256()
        for array in (self.leave_out, self.cluster_subsets, self.row_subsets, *self.outputs.values()):
            digest.update(np.ascontiguousarray(array, dtype=np.float32).tobytes())
        return digest.hexdigest()


def load_task(name: str) -> Task:
    """Builds a task by name."""
    return importlib.import_module(f"benchmarks.tasks.{name}").load()


def subsets(task: Task) -> dict[str, list[np.ndarray]]:
    """Row subsets of each part of the ground truth."""
    return {
        "rows": kept_rows(task.row_masks()),
        "clusters": kept_rows(task.cluster_masks(), task.clusters),
        "leave_out": [np.arange(len(task.train)), *task.leave_out_subsets()],
    }


def compute(task: Task, *, shard: tuple[int, int] = (0, 1), disable_tqdm: bool = False) -> dict[str, np.ndarray]:
    """
    Every part of the ground truth, from the cache or anew; of a shard, every n-th retraining.

    Returns:
        `dict[str, np.ndarray]`: objectives `(num_subsets, num_seeds, num_queries + num_tuning_queries)` of the parts
        of [`subsets`], and logits `(num_masks, 2, (num_queries + num_tuning_queries) * num_labels)` of the parts of
        [`Task.distance_masks`], named `"outputs of ..."`.
    """
    queries = concatenate_datasets([task.queries, task.tuning_queries]).with_format("torch")
    mine = slice(shard[0], None, shard[1])
    results = {
        part: retrain(
            task.build_trainer,
            task.train,
            rows[mine],
            queries,
            seeds=task.seeds,
            objective=task.objective,
            output_dir=CACHE / task.name,
            disable_tqdm=disable_tqdm,
        )
        for part, rows in subsets(task).items()
    }
    for part, masks in task.distance_masks().items():
        results[f"outputs of {part}"] = retrain(
            task.build_trainer,
            task.train,
            kept_rows(masks[mine], task.clusters),
            queries,
            seeds=task.seeds[:NUM_OUTPUT_SEEDS],
            objective=LOGITS,
            output_dir=CACHE / task.name / "logits",
            disable_tqdm=disable_tqdm,
        )
    return results


def load(task: Task, *, tuning: bool = False) -> Truth:
    """The ground truth on the reported queries, or on the tuning queries."""
    values = compute(task, disable_tqdm=True)
    count, total = len(task.queries), len(task.queries) + len(task.tuning_queries)
    chosen = slice(count, None) if tuning else slice(0, count)
    leave_out, cluster_subsets, row_subsets = (
        values[part].transpose(1, 2, 0)[:, chosen] for part in ("leave_out", "clusters", "rows")
    )
    outputs = {}
    for part in task.distance_masks():
        logits = values[f"outputs of {part}"]
        outputs[part] = logits.reshape(*logits.shape[:2], total, -1).swapaxes(0, 1)[:, :, chosen]
    return Truth(leave_out[:, :, :1] - leave_out[:, :, 1:], cluster_subsets, row_subsets, outputs)


def first_halves(task: Task, num_masks: int, num_queries: int) -> np.ndarray:
    """
    Objectives of retrainings on the first half-masks of the clusters alone, from the cache or anew.

    Returns:
        `np.ndarray`: `(num_seeds, num_queries, num_masks)`, on the first tuning queries (fewer if there are fewer).
    """
    values = retrain(
        task.build_trainer,
        task.train,
        kept_rows(task.cluster_masks()[:num_masks], task.clusters),
        concatenate_datasets([task.queries, task.tuning_queries]).with_format("torch"),
        seeds=task.seeds,
        objective=task.objective,
        output_dir=CACHE / task.name,
        disable_tqdm=True,
    )
    return values.transpose(1, 2, 0)[:, len(task.queries) :][:, :num_queries]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--shard", default="0/1", help="i/n: do every n-th retraining, starting with the i-th")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    index, count = map(int, arguments.shard.split("/"))
    compute(load_task(arguments.task), shard=(index, count))
