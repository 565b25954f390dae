"""What any method has to beat: random scores, gradient cosine, and real rows in place of the synthetic ones."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from benchmarks.methods.ours import adjoint, replay
from benchmarks.recorded import Method, Prediction, Recorded
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_gradients import row_gradients
from hf_rgm.model.row_reader import RowReader

BATCH_SIZE = 256
GRADIENT_BYTES = 2 * 10**9
"""Of queries or rows whose gradients are held at once."""
RANDOM_SEED = 11


def random_scores(recorded: Recorded, queries: Dataset) -> Prediction:
    """Normal scores of rows, summed for clusters: what chance gives."""
    generator = np.random.default_rng(RANDOM_SEED)
    scores = generator.standard_normal((len(queries), len(recorded.task.train)), dtype=np.float32)
    return Prediction(sum_by_cluster(recorded, scores), scores, details={"kept_bytes": 0, "seed": RANDOM_SEED})


def gradient_cosine(recorded: Recorded, queries: Dataset) -> Prediction:
    """
    Cosine of a query's gradient of the objective and a row's gradient of the loss, at the trained parameters.

    With the sign turned: a step on a row goes against the gradient of its loss, so the row helps where the two point
    in opposite directions.
    """
    start = time.process_time()
    model = FunctionalModel(recorded.model)
    trained = model.parameters()
    reader = RowReader(queries, model, what="queries")
    objective = resolve_objective(recorded.task.objective)
    rows = RowReader(recorded.task.train, model)
    at_once = max(1, min(BATCH_SIZE, GRADIENT_BYTES // (4 * model.num_parameters)))

    def groups(count: int) -> list[range]:
        return [range(first, min(first + at_once, count)) for first in range(0, count, at_once)]

    row_scores = np.empty((len(reader), len(rows)), dtype=np.float32)
    for some in groups(len(reader)):
        gradients = objective.gradients(model, model.space.flatten(trained), Queries(*reader.batch(some)))
        gradients = torch.nn.functional.normalize(gradients)
        for group in groups(len(rows)):
            others = torch.nn.functional.normalize(row_gradients(model, trained, *rows.batch(group)))
            row_scores[some.start : some.stop, group.start : group.stop] = -(gradients @ others.T).numpy()
    return Prediction(
        sum_by_cluster(recorded, row_scores),
        row_scores,
        online_seconds=time.process_time() - start,
        details={"kept_bytes": 0},
    )


def sum_by_cluster(recorded: Recorded, row_scores: np.ndarray) -> np.ndarray:
    """Scores of clusters, `(num_queries, num_clusters)`, from those of rows, `(num_queries, num_rows)`."""
    clusters = recorded.task.clusters
    membership = np.eye(clusters.num_clusters, dtype=row_scores.dtype)[clusters.cluster_ids]
    return row_scores @ membership


def real_rows(init: str) -> dict[str, Any]:
    """
    Settings of a distillation that learns nothing: its samples are real rows with (next to) hard labels, each with an
    equal part of its cluster's share as its weight.

    Args:
        init (`str`): `"nearest"`, the row nearest the cluster's centre and, where there are more, random rows; or
            `"random"` rows.
    """
    rates = dict.fromkeys(("input_learning_rate", "target_learning_rate", "weight_learning_rate"), 1e-12)
    return {
        "init": init,
        "num_iterations": 1,
        "solve_weights": False,
        "target_smoothing": 1e-6,
        **rates,
    }


METHODS: dict[str, Method | dict[str, Method]] = {
    "random": random_scores,
    "gradient cosine": gradient_cosine,
    **{
        f"adjoint on real rows, {count} per cluster": {
            init: adjoint(samples_per_cluster=count, **real_rows(init)) for init in ("nearest", "random")
        }
        for count in (1, 5)
    },
    **{
        f"anchored replay on real rows, {count} per cluster": {
            init: replay(engine="replay", distillation={"samples_per_cluster": count, **real_rows(init)})
            for init in ("nearest", "random")
        }
        for count in (1, 5)
    },
}
