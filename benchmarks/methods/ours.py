"""Our engines on a synset."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from benchmarks.recorded import Method, Prediction, Recorded, synset_bytes
from benchmarks.truth import LOGITS
from hf_rgm import Attributor, DistillationConfig

HALVES = "halves"
"""The part of [`Task.distance_masks`] that holds random halves."""


def adjoint(samples_per_cluster: int, *, num_runs: int = 1, **distillation) -> Method:
    """Scores of rows by the adjoint, summed for clusters."""

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        config = DistillationConfig(samples_per_cluster=samples_per_cluster, **distillation)
        synset, seconds = recorded.synset(config, num_runs=num_runs)
        attributor = Attributor(recorded.model, synset, disable_tqdm=True)
        start = time.perf_counter()
        result = attributor.attribute(queries, engine="adjoint", rows=recorded.task.train)
        return Prediction(
            result.scores,
            result.row_scores,
            offline_seconds=seconds,
            online_seconds=time.perf_counter() - start,
            details={"matching_error": synset.matching_error, "kept_bytes": synset_bytes(synset)},
        )

    return run


def replay(
    samples_per_cluster: int,
    *,
    engine: str = "linearized_replay",
    num_runs: int = 1,
    with_rows: bool = False,
    distillation: dict[str, Any] | None = None,
    **settings,
) -> Method:
    """
    Leave-one-out, subsets and outputs by a replay engine.

    The clusters of a random half are weighted up so that the weights sum to the number of rows: every training of a
    task takes the same steps on whatever there is. Single clusters are left out as the library does it, without that.
    With the training rows (`with_rows`), linearised replay uses their gradients, and the adjoint scores every row.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        task = recorded.task
        config = DistillationConfig(samples_per_cluster=samples_per_cluster, **(distillation or {}))
        synset, seconds = recorded.synset(config, num_runs=num_runs)
        attributor = Attributor(recorded.model, synset, disable_tqdm=True)
        options = {"engine": engine, "rows": task.train if with_rows else None, **settings}

        def replayed(weights: np.ndarray, **objective) -> np.ndarray:
            return attributor.replayed_values(
                queries, torch.from_numpy(weights.astype(np.float32)), **objective, **options
            )

        def weighted_up(masks: np.ndarray) -> np.ndarray:
            return masks * task.clusters.sizes.sum() / (masks @ task.clusters.sizes)[:, None]

        start = time.perf_counter()
        result = attributor.attribute(queries, **options)
        scored = time.perf_counter()
        masks = task.cluster_masks()
        subsets = replayed(weighted_up(masks))
        replayed_seconds = time.perf_counter() - scored
        outputs = {
            part: replayed(weighted_up(chosen) if part == HALVES else chosen, objective=LOGITS).reshape(
                len(chosen), len(queries), -1
            )
            for part, chosen in task.distance_masks().items()
        }
        return Prediction(
            result.scores,
            result.row_scores,
            cluster_subset_values=subsets.T,
            outputs=outputs,
            offline_seconds=seconds,
            online_seconds=scored - start,
            model_seconds=replayed_seconds / len(masks),
            details={"matching_error": synset.matching_error, "kept_bytes": synset_bytes(synset)},
        )

    return run


METHODS: dict[str, Method] = {
    "linearised replay and adjoint, 2 per cluster": replay(2, with_rows=True),
    "linearised replay and adjoint, 2 per cluster, 5 runs": replay(2, with_rows=True, num_runs=5),
    "linearised replay, 2 per cluster, synset alone": replay(2),
    "adjoint, 1 per cluster": adjoint(1),
    "adjoint, 2 per cluster": adjoint(2),
    "adjoint, 2 per cluster, 5 runs": adjoint(2, num_runs=5),
    "anchored replay, 3 per cluster": replay(3, engine="replay"),
    "plain replay, 3 per cluster": replay(3, engine="plain_replay"),
}

ABLATIONS: dict[str, Method] = {
    "adjoint, 1 per cluster, gradients only": adjoint(1, curvature_weight=0.0),
    "adjoint, 2 per cluster, gradients only": adjoint(2, curvature_weight=0.0),
    "adjoint, 2 per cluster, 256 probes": adjoint(2, num_probes=256),
}
