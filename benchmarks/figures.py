"""The figures of a prediction: agreement with the ground truth, with intervals."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.distances import average_distance
from benchmarks.recorded import Prediction, Recorded
from benchmarks.tasks import Task
from benchmarks.truth import LOGITS, Truth
from hf_rgm.agreement.correlations import (
    Estimate,
    leave_cluster_out_correlation,
    linear_datamodeling_score,
    noise_ceiling,
)
from hf_rgm.engines.objectives import Queries
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import RowReader

MEASURES = ("leave_cluster_out", "lds_clusters", "lds_rows")
"""What settings are chosen by."""

pearson = partial(leave_cluster_out_correlation, correlation="pearson")


def figures(task: Task, truth: Truth, prediction: Prediction) -> dict[str, Any]:
    """
    Leave-cluster-out correlation (Spearman and Pearson), LDS of clusters, and where the method has them LDS of rows
    and distances of outputs, against the mean of the retraining seeds (distances: against the first seed).

    A subset's predicted value is the sum of the scores of what it keeps, unless the method predicts it directly.
    """
    subsets = prediction.cluster_subset_values
    if subsets is None:
        subsets = prediction.cluster_scores @ task.cluster_masks().T.astype(np.float32)
    changes = truth.leave_out.mean(0)
    result: dict[str, Any] = {
        "leave_cluster_out": leave_cluster_out_correlation(prediction.cluster_scores, changes),
        "leave_cluster_out_pearson": pearson(prediction.cluster_scores, changes),
        "lds_clusters": linear_datamodeling_score(subsets, truth.cluster_subsets.mean(0)),
    }
    if prediction.row_scores is not None:
        predicted = prediction.row_scores @ task.row_masks().T.astype(np.float32)
        result["lds_rows"] = linear_datamodeling_score(predicted, truth.row_subsets.mean(0))
    values = _as_json(result)
    if prediction.outputs is not None:
        values["distances"] = _distances(prediction.outputs, truth)
    return values


def ceilings(truth: Truth) -> dict[str, Any]:
    """The same figures for one retraining seed against the others (distances: the second against the first)."""
    result = {
        "leave_cluster_out": noise_ceiling(truth.leave_out, leave_cluster_out_correlation),
        "leave_cluster_out_pearson": noise_ceiling(truth.leave_out, pearson),
        "lds_clusters": noise_ceiling(truth.cluster_subsets, linear_datamodeling_score),
        "lds_rows": noise_ceiling(truth.row_subsets, linear_datamodeling_score),
    }
    second = {part: logits[1] for part, logits in truth.outputs.items()}
    return _as_json(result) | {"distances": _distances(second, truth)}


def unperturbed(recorded: Recorded, queries: Dataset, truth: Truth) -> dict[str, Any]:
    """Distances of the outputs of the trained model, whatever is absent: what doing nothing gives."""
    model = FunctionalModel(recorded.model)
    reader = RowReader(queries, model, what="queries")
    batch = Queries(*reader.batch(range(len(reader))))
    logits = LOGITS.values(model, model.space.flatten(model.parameters()), batch).reshape(len(batch), -1).numpy()
    outputs = {part: np.broadcast_to(logits, retrained.shape[1:]) for part, retrained in truth.outputs.items()}
    return {"distances": _distances(outputs, truth)}


def mean_figure(values: dict[str, Any]) -> float:
    """Mean of the figures in [`MEASURES`] that are there."""
    return float(np.mean([values[name]["value"] for name in MEASURES if name in values]))


def first_queries(prediction: Prediction, count: int) -> Prediction:
    """The prediction for the first `count` queries."""

    def first(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[:count]

    outputs = prediction.outputs
    return replace(
        prediction,
        cluster_scores=prediction.cluster_scores[:count],
        row_scores=first(prediction.row_scores),
        cluster_subset_values=first(prediction.cluster_subset_values),
        outputs=outputs and {part: logits[:, :count] for part, logits in outputs.items()},
    )


def _distances(outputs: dict[str, np.ndarray], truth: Truth) -> dict[str, Any]:
    return {part: _as_json(average_distance(logits, truth.outputs[part][0])) for part, logits in outputs.items()}


def _as_json(estimates: dict[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in estimates.items()}
