"""Our engines: without a synset, on a synset with the training rows, and on a synset alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset

from benchmarks.costs import Stages
from benchmarks.recorded import Method, Prediction, Recorded, synset_bytes
from benchmarks.truth import LOGITS
from hf_rgm import Attributor, DistillationConfig, Objective
from hf_rgm.distillation.config import PRESETS

HALVES = "halves"
"""The part of [`Task.distance_masks`] that holds random halves."""


def adjoint(*, num_runs: int = 1, attribution: dict[str, Any] | None = None, **distillation) -> Method:
    """Scores of rows by the adjoint, summed for clusters."""

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        task = recorded.task
        synset, seconds = recorded.synset(DistillationConfig(**distillation), num_runs=num_runs)
        attributor = Attributor(recorded.model, synset, max_memory=task.max_memory, disable_tqdm=True)
        stages = Stages(distil=seconds)
        with stages.stage("attribute"):
            result = attributor.attribute(
                queries, engine="adjoint", objective=task.objective, rows=task.train, **(attribution or {})
            )
        return Prediction(
            result.scores,
            result.row_scores,
            offline_seconds=seconds,
            online_seconds=stages.seconds["attribute"],
            stages=stages.seconds,
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
    Leave-one-out, subsets and outputs by a replay engine, on a synset.

    With the training rows (`with_rows`), replays use their gradients, and the adjoint scores every row unless
    `score_rows` is false.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        task = recorded.task
        synset, seconds = recorded.synset(DistillationConfig(**(distillation or {})), num_runs=num_runs)
        attributor = Attributor(recorded.model, synset, max_memory=task.max_memory, disable_tqdm=True)
        options = {"engine": engine, "rows": task.train if with_rows else None, **settings}
        prediction = _answers(
            recorded,
            queries,
            attributor,
            Stages(distil=seconds),
            scoring=options,
            replaying=options,
            with_rows=with_rows,
            leave_out=with_rows and not score_rows,
        )
        prediction.offline_seconds = seconds
        prediction.details = {"matching_error": synset.matching_error, "kept_bytes": synset_bytes(synset)}
        return prediction

    return run


def without_synset(*, num_runs: int = 1, engine: str = "linearized_replay", **settings) -> Method:
    """
    Scores of clusters and rows by the recorded run and the training rows; subsets and outputs by a replay engine.

    Nothing is distilled. Offline are the trainings of other runs alone.

    Args:
        num_runs (`int`, *optional*, defaults to `1`): Recorded runs whose mean counts.
        engine (`str`, *optional*, defaults to `"linearized_replay"`): What gives the models without much of the data.
            Leave-one-out is by linearised replay whatever it is: dearer engines take too long for every cluster.
        settings: Of replays.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        task = recorded.task
        folders, seconds = recorded.runs(num_runs)
        attributor = Attributor(
            recorded.model,
            trajectory=folders,
            rows=task.train,
            clusters=task.clusters,
            max_memory=task.max_memory,
            disable_tqdm=True,
        )
        prediction = _answers(
            recorded,
            queries,
            attributor,
            Stages(),
            scoring={},
            replaying={"engine": engine, **settings},
            with_rows=True,
        )
        prediction.offline_seconds = seconds
        prediction.details = {"kept_bytes": 0}
        return prediction

    return run


def _answers(
    recorded: Recorded,
    queries: Dataset,
    attributor: Attributor,
    stages: Stages,
    *,
    scoring: dict[str, Any],
    replaying: dict[str, Any],
    with_rows: bool,
    leave_out: bool = False,
) -> Prediction:
    """
    Scores, objectives of random halves and outputs of models.

    The clusters of a random half are weighted up so that the weights sum to the number of rows: every training of a
    task takes the same steps on whatever there is. Single clusters are left out as the library does it, without that.

    Args:
        recorded (`Recorded`): The recorded run.
        queries (`Dataset`): The queries.
        attributor (`Attributor`): Answers.
        stages (`Stages`): Where costs go.
        scoring, replaying (`dict`): Options of scores and of models.
        with_rows (`bool`): Whether the training rows are given.
        leave_out (`bool`, *optional*, defaults to `False`): Score clusters alone, by replayed values.
    """
    task = recorded.task

    def replayed(weights: np.ndarray, objective: str | Objective) -> np.ndarray:
        return attributor.replayed_values(
            queries, torch.from_numpy(weights.astype(np.float32)), objective=objective, **replaying
        )

    def weighted_up(masks: np.ndarray) -> np.ndarray:
        return masks * task.clusters.sizes.sum() / (masks @ task.clusters.sizes)[:, None]

    # Scores of clusters and of rows are by one call.
    scores_of = "cluster scores" if leave_out or not with_rows else "attribute"
    with stages.stage(scores_of):
        if leave_out:
            count = task.clusters.num_clusters
            values = replayed(1 - np.eye(count + 1, count, k=-1), task.objective)
            scores, row_scores = (values[0] - values[1:]).T, None
        else:
            result = attributor.attribute(queries, objective=task.objective, **scoring)
            scores, row_scores = result.scores, result.row_scores
    masks = task.cluster_masks()
    with stages.stage("halves"):
        subsets = replayed(weighted_up(masks), task.objective)
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
        online_seconds=stages.seconds[scores_of],
        model_seconds=stages.seconds["halves"] / len(masks),
        stages=stages.seconds,
    )


METHODS: dict[str, Method] = {
    "without a synset": without_synset(),
    "without a synset, 5 runs": without_synset(num_runs=5),
    "synset alone": replay(engine="responses"),
    "synset alone, by its samples": replay(distillation={"responses": "none"}),
    "synset alone, by its samples, quick preset": replay(distillation={**PRESETS["quick"], "responses": "none"}),
    "anchored replay": replay(engine="replay"),
    "training on": without_synset(engine="training_on"),
}

ABLATIONS: dict[str, Method] = {
    f"adjoint, {count} per cluster": adjoint(samples_per_cluster=count) for count in (1, 2, 5)
}
