"""A tiny task whose truth is known exactly: every row adds its own effect to every query."""

from __future__ import annotations

from functools import partial

import numpy as np
from datasets import Dataset

from benchmarks.recorded import Prediction, Recorded
from benchmarks.tasks import Task
from benchmarks.truth import Truth
from hf_rgm import ClusterMap
from hf_rgm.testing import tiny_dataset, tiny_trainer

NUM_ROWS, NUM_QUERIES, NUM_TUNING, NUM_LABELS = 24, 8, 5, 3
CLUSTER_IDS = np.arange(NUM_ROWS) % 6


def task(**overrides) -> Task:
    """Six clusters of four rows, six half-masks of each kind."""
    settings = {
        "name": "tiny",
        "train": tiny_dataset(NUM_ROWS, seed=0),
        "queries": tiny_dataset(NUM_QUERIES, seed=1),
        "tuning_queries": tiny_dataset(NUM_TUNING, seed=2),
        "clusters": ClusterMap.from_ids(CLUSTER_IDS),
        "build_trainer": partial(tiny_trainer, num_train_epochs=2),
        "num_cluster_masks": 6,
        "num_row_masks": 6,
        "seeds": (1, 2),
        "num_distances": 2,
    }
    return Task(**(settings | overrides))


def effects(queries: Dataset) -> np.ndarray:
    """What the presence of each row adds to each query, `(num_queries, num_rows)`: a function of the query alone."""
    pixels = np.stack([np.asarray(row["pixel_values"]).ravel() for row in queries]).astype(np.float64)
    return pixels @ np.random.default_rng(3).standard_normal((pixels.shape[1], NUM_ROWS))


def additive_truth(the_task: Task, queries: Dataset) -> Truth:
    """The truth if effects of rows add up, the same for both seeds; outputs are drawn at random."""
    rows = effects(queries)
    clusters = by_cluster(rows)
    generator = np.random.default_rng(4)
    outputs = {
        part: generator.standard_normal((2, len(masks), len(queries), NUM_LABELS))
        for part, masks in the_task.distance_masks().items()
    }
    leave_out, cluster_subsets, row_subsets = (
        np.stack([values, values])
        for values in (
            clusters,
            5.0 + clusters @ the_task.cluster_masks().T,
            5.0 + rows @ the_task.row_masks().T,
        )
    )
    return Truth(leave_out, cluster_subsets, row_subsets, outputs)


def by_cluster(rows: np.ndarray) -> np.ndarray:
    """Sums over the rows of each cluster."""
    return np.stack([rows[:, CLUSTER_IDS == cluster].sum(1) for cluster in range(6)], axis=1)


def exact(recorded: Recorded, queries: Dataset) -> Prediction:
    """The method that knows the effects."""
    rows = effects(queries)
    return Prediction(by_cluster(rows), rows, offline_seconds=2.0, online_seconds=1.0, details={"kept_bytes": 7})


def opposite(recorded: Recorded, queries: Dataset) -> Prediction:
    """The method that has every sign wrong."""
    rows = -effects(queries)
    return Prediction(by_cluster(rows), rows)


def broken(recorded: Recorded, queries: Dataset) -> Prediction:
    """The method that cannot run."""
    raise MemoryError("no room")
