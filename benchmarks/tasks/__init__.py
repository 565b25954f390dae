"""Benchmark tasks: data, model, training recipe and subsets of the ground truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import Trainer

from hf_rgm import ClusterMap
from hf_rgm.agreement.subsets import kept_rows, random_masks
from hf_rgm.engines.memory_shares import DEFAULT_MEMORY

CLUSTER_MASK_SEED = 7
ROW_MASK_SEED = 8


@dataclass
class Task:
    """
    Args:
        name (`str`): For files and tables.
        train, queries, tuning_queries (`Dataset`): The model's inputs, of one shape, and `labels`: one a row, or one a
            token for language models.
        clusters (`ClusterMap`): K clusters of the training rows.
        build_trainer (`Callable`): `build_trainer(dataset, seed, callbacks=())`, a fresh `Trainer`.
        num_cluster_masks, num_row_masks (`int`): Half-masks of the ground truth.
        seeds (`tuple[int, ...]`): Retraining seeds; the recorded run uses seed 0, which is none of them.
        objective (`str`, *optional*, defaults to `"margin"`): What is attributed; one value for each query.
        num_distances (`int`, *optional*, defaults to `10`): Clusters left out, and as many half-masks, on which the
            outputs of perturbed models are compared with those of retrained ones. 0 compares none, as for language
            models, whose outputs are large.
        num_dear_queries (`int`, *optional*): Methods with dear queries are scored on the first so many only, and all
            methods are compared on these too. By default none are spared.
        max_memory (`str`, *optional*, defaults to `"4GB"`): Of our distiller and attributor.
    """

    name: str
    train: Dataset
    queries: Dataset
    tuning_queries: Dataset
    clusters: ClusterMap
    build_trainer: Callable[..., Trainer]
    num_cluster_masks: int
    num_row_masks: int
    seeds: tuple[int, ...]
    objective: str = "margin"
    num_distances: int = 10
    num_dear_queries: int | None = None
    max_memory: str = DEFAULT_MEMORY

    def leave_out_subsets(self) -> list[np.ndarray]:
        """Rows kept when each cluster is left out."""
        return kept_rows(~np.eye(self.clusters.num_clusters, dtype=bool), self.clusters)

    def cluster_masks(self, seed: int = CLUSTER_MASK_SEED) -> np.ndarray:
        """Half-masks of clusters, `(num_cluster_masks, num_clusters)`, bool."""
        return random_masks(self.clusters.num_clusters, self.num_cluster_masks, seed=seed)

    def row_masks(self, seed: int = ROW_MASK_SEED) -> np.ndarray:
        """Half-masks of rows, `(num_row_masks, num_rows)`, bool."""
        return random_masks(len(self.train), self.num_row_masks, seed=seed)

    def distance_masks(self) -> dict[str, np.ndarray]:
        """
        Masks of clusters on which outputs are compared, `(num_distances, num_clusters)` each, bool.

        `leave_out` drops one cluster each, spread over all clusters; `halves` are the first of the half-masks. Empty
        where none are compared.
        """
        if not self.num_distances:
            return {}
        num_clusters = self.clusters.num_clusters
        left_out = np.linspace(0, num_clusters - 1, self.num_distances).round().astype(int)
        return {
            "leave_out": ~np.eye(num_clusters, dtype=bool)[left_out],
            "halves": self.cluster_masks()[: self.num_distances],
        }
