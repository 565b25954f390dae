"""Our engines on a synset."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from benchmarks.recorded import Method, Prediction, Recorded, synset_bytes
from benchmarks.truth import LOGITS
from hf_rgm import Attributor, DistillationConfig, Objective
from hf_rgm.synset.config import PRESETS

HALVES = "halves"
"""The part of [`Task.distance_masks`] that holds random halves."""


def adjoint(*, num_runs: int = 1, attribution: dict[str, Any] | None = None, **distillation) -> Method:
    """Scores of rows by the adjoint, summed for clusters."""

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        task = recorded.task
        synset, seconds = recorded.synset(DistillationConfig(**distillation), num_runs=num_runs)
        attributor = Attributor(recorded.model, synset, max_memory=task.max_memory, disable_tqdm=True)
        start = time.perf_counter()
        result = attributor.attribute(
            queries,
            engine="adjoint",
            objective=task.objective,
            rows=task.train,
            **(attribution or {}),
        )
        return Prediction(
            result.scores,
            result.row_scores,
            offline_seconds=seconds,
            online_seconds=time.perf_counter() - start,
            details={"matching_error": synset.matching_error, "kept_bytes": synset_bytes(synset)},
        )

    return run


def replay(
    *,
    engine: str = "linearized_replay",
    num_runs: int = 1,
    with_rows: bool = False,
    score_rows: bool = True,
    distillation: dict[str, Any] | None = None,
    **settings,
) -> Method:
    """
    Leave-one-out, subsets and outputs by a replay engine.

    The clusters of a random half are weighted up so that the weights sum to the number of rows: every training of a
    task takes the same steps on whatever there is. Single clusters are left out as the library does it, without that.
    With the training rows (`with_rows`), replays use their gradients, and the adjoint scores every row unless
    `score_rows` is false: on language models it takes longer than all the rest.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        task = recorded.task
        synset, seconds = recorded.synset(DistillationConfig(**(distillation or {})), num_runs=num_runs)
        attributor = Attributor(recorded.model, synset, max_memory=task.max_memory, disable_tqdm=True)
        options = {"engine": engine, "rows": task.train if with_rows else None, **settings}

        def replayed(weights: np.ndarray, objective: str | Objective) -> np.ndarray:
            return attributor.replayed_values(
                queries, torch.from_numpy(weights.astype(np.float32)), objective=objective, **options
            )

        def attribute() -> tuple[np.ndarray, np.ndarray | None]:
            result = attributor.attribute(queries, objective=task.objective, **options)
            return result.scores, result.row_scores

        def leave_out() -> tuple[np.ndarray, None]:
            count = task.clusters.num_clusters
            values = replayed(1 - np.eye(count + 1, count, k=-1), task.objective)
            return (values[0] - values[1:]).T, None

        def weighted_up(masks: np.ndarray) -> np.ndarray:
            return masks * task.clusters.sizes.sum() / (masks @ task.clusters.sizes)[:, None]

        start = time.perf_counter()
        scores, row_scores = leave_out() if with_rows and not score_rows else attribute()
        scored = time.perf_counter()
        masks = task.cluster_masks()
        subsets = replayed(weighted_up(masks), task.objective)
        replayed_seconds = time.perf_counter() - scored
        outputs = {
            part: replayed(weighted_up(chosen) if part == HALVES else chosen, LOGITS).reshape(
                len(chosen), len(queries), -1
            )
            for part, chosen in task.distance_masks().items()
        }
        return Prediction(
            scores,
            row_scores,
            cluster_subset_values=subsets.T,
            outputs=outputs,
            offline_seconds=seconds,
            online_seconds=scored - start,
            model_seconds=replayed_seconds / len(masks),
            details={"matching_error": synset.matching_error, "kept_bytes": synset_bytes(synset)},
        )

    return run


METHODS: dict[str, Method] = {
    "linearised replay and adjoint": replay(with_rows=True),
    "linearised replay and adjoint, 5 runs": replay(with_rows=True, num_runs=5),
    "linearised replay, synset alone": replay(),
    "adjoint": adjoint(),
    "adjoint, 5 runs": adjoint(num_runs=5),
    "linearised replay and adjoint, quick preset": replay(with_rows=True, distillation=PRESETS["quick"]),
    "linearised replay, synset alone, quick preset": replay(distillation=PRESETS["quick"]),
    "adjoint, quick preset": adjoint(**PRESETS["quick"]),
    "adjoint, 1 per cluster": adjoint(samples_per_cluster=1),
    "anchored replay and adjoint": replay(engine="replay", with_rows=True),
    "anchored replay and adjoint, 5 runs": replay(engine="replay", with_rows=True, num_runs=5),
    "anchored replay": replay(engine="replay"),
    "anchored replay, 5 runs": replay(engine="replay", num_runs=5),
    "anchored replay, quick preset": replay(engine="replay", distillation=PRESETS["quick"]),
    "anchored replay by rows' gradients": replay(engine="replay", with_rows=True, score_rows=False),
    "anchored replay by rows' gradients, quick preset": replay(
        engine="replay", with_rows=True, score_rows=False, distillation=PRESETS["quick"]
    ),
    "plain replay": replay(engine="plain_replay"),
}

ABLATIONS: dict[str, Method] = {
    **{
        f"adjoint, {count} per cluster{note}": adjoint(samples_per_cluster=count, **settings)
        for count in (1, 2, 5)
        for note, settings in (("", {}), (", curvature matched", {"curvature_weight": 0.5}))
        if count != 1 or settings
    },
    "adjoint, stride 1": adjoint(attribution={"stride": 1}),
    "anchored replay by rows' gradients, 100 iterations": replay(
        engine="replay",
        with_rows=True,
        score_rows=False,
        distillation={**PRESETS["quick"], "num_iterations": 100, "tolerance": 0.0},
    ),
}
