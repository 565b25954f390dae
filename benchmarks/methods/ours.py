"""Our engines: adjoint and replay on a synset."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from benchmarks.recorded import Method, Prediction, Recorded, synset_bytes
from benchmarks.truth import LOGITS
from hf_rgm import Attributor, DistillationConfig


def adjoint(samples_per_cluster: int, **distillation) -> Method:
    """Scores of rows by the adjoint, summed for clusters."""

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        synset, seconds = recorded.synset(DistillationConfig(samples_per_cluster=samples_per_cluster, **distillation))
        start = time.perf_counter()
        result = Attributor(recorded.model, synset, disable_tqdm=True).attribute(queries, rows=recorded.task.train)
        return Prediction(
            result.scores,
            result.row_scores,
            offline_seconds=seconds,
            online_seconds=time.perf_counter() - start,
            details={"matching_error": synset.matching_error, "kept_bytes": synset_bytes(synset)},
        )

    return run


def replay(
    samples_per_cluster: int, *, anchored: bool = True, distillation: dict[str, Any] | None = None, **settings
) -> Method:
    """Leave-one-out, subsets and outputs by replay."""

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        config = DistillationConfig(samples_per_cluster=samples_per_cluster, **(distillation or {}))
        synset, seconds = recorded.synset(config)
        attributor = Attributor(recorded.model, synset, disable_tqdm=True)

        def replayed(masks: np.ndarray, **objective) -> np.ndarray:
            weights = torch.from_numpy(masks.astype(np.float32))
            return attributor.replayed_values(queries, weights, anchored=anchored, **objective, **settings)

        start = time.perf_counter()
        engine = "replay" if anchored else "plain_replay"
        result = attributor.attribute(queries, engine=engine, **settings)
        scored = time.perf_counter()
        masks = recorded.task.cluster_masks()
        subsets = replayed(masks)
        replayed_seconds = time.perf_counter() - scored
        outputs = {
            part: replayed(chosen, objective=LOGITS).reshape(len(chosen), len(queries), -1)
            for part, chosen in recorded.task.distance_masks().items()
        }
        return Prediction(
            result.scores,
            cluster_subset_values=subsets.T,
            outputs=outputs,
            offline_seconds=seconds,
            online_seconds=scored - start,
            model_seconds=replayed_seconds / len(masks),
            details={"matching_error": synset.matching_error, "kept_bytes": synset_bytes(synset)},
        )

    return run


METHODS: dict[str, Method] = {
    "adjoint, 1 per cluster": adjoint(1),
    "adjoint, 2 per cluster": adjoint(2),
    "anchored replay, 1 per cluster": replay(1),
    "anchored replay, 3 per cluster": replay(3),
    "plain replay, 3 per cluster": replay(3, anchored=False),
}

ABLATIONS: dict[str, Method] = {
    "adjoint, 1 per cluster, gradients only": adjoint(1, curvature_weight=0.0),
    "adjoint, 2 per cluster, gradients only": adjoint(2, curvature_weight=0.0),
    "adjoint, 2 per cluster, 256 probes": adjoint(2, num_probes=256),
}
