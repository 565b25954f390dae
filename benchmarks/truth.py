"""
Ground truth of a task by retraining, cached as one file per retraining.

    python -m benchmarks.truth --task digits                # everything
    python -m benchmarks.truth --task digits --shard 0/2    # half of the work, for two processes side by side
"""

from __future__ import annotations

import argparse
import importlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets

from benchmarks.tasks import Task
from hf_rgm.fidelity.retraining import retrain

CACHE = Path(os.environ.get("HF_RGM_BENCH_CACHE", Path.home() / ".cache" / "hf-rgm-benchmarks"))


@dataclass
class Truth:
    """
    Retrained margins.

    Args:
        leave_out (`np.ndarray`): `(num_seeds, num_queries, num_clusters)`, f(all) - f(without cluster).
        cluster_subsets (`np.ndarray`): `(num_seeds, num_queries, num_cluster_masks)`, objective values.
        row_subsets (`np.ndarray`): `(num_seeds, num_queries, num_row_masks)`, objective values.
    """

    leave_out: np.ndarray
    cluster_subsets: np.ndarray
    row_subsets: np.ndarray


def load_task(name: str) -> Task:
    """Builds a task by name."""
    return importlib.import_module(f"benchmarks.tasks.{name}").load()


def subsets(task: Task) -> dict[str, list[np.ndarray]]:
    """Row subsets of each part of the ground truth."""
    cluster_ids = task.clusters.cluster_ids
    return {
        "rows": [np.flatnonzero(mask) for mask in task.row_masks()],
        "clusters": [np.flatnonzero(mask[cluster_ids]) for mask in task.cluster_masks()],
        "leave_out": [np.arange(len(task.train)), *task.leave_out_subsets()],
    }


def compute(task: Task, *, shard: tuple[int, int] = (0, 1), disable_tqdm: bool = False) -> dict[str, np.ndarray]:
    """Values `(num_subsets, num_seeds, num_queries + num_tuning_queries)` of each part, from the cache or anew."""
    queries = concatenate_datasets([task.queries, task.tuning_queries]).with_format("torch")
    return {
        part: retrain(
            task.build_trainer,
            task.train,
            rows[shard[0] :: shard[1]],
            queries,
            seeds=task.seeds,
            output_dir=CACHE / task.name,
            disable_tqdm=disable_tqdm,
        )
        for part, rows in subsets(task).items()
    }


def load(task: Task, *, tuning: bool = False) -> Truth:
    """The ground truth on the reported queries, or on the tuning queries."""
    values = compute(task, disable_tqdm=True)
    count = len(task.queries)
    chosen = slice(count, None) if tuning else slice(0, count)
    by_seed = {part: array.transpose(1, 2, 0)[:, chosen] for part, array in values.items()}
    leave_out = by_seed["leave_out"]
    return Truth(leave_out[:, :, :1] - leave_out[:, :, 1:], by_seed["clusters"], by_seed["rows"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--shard", default="0/1", help="i/n: do every n-th retraining, starting with the i-th")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    index, count = map(int, arguments.shard.split("/"))
    compute(load_task(arguments.task), shard=(index, count))
