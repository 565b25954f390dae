"""Distances between the outputs of replayed and of retrained models."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

from hf_rgm.agreement.correlations import Array, Estimate, Indices, bootstrap_interval


def average_distance(predicted: Array, retrained: Array, *, seed: int = 0) -> dict[str, Estimate]:
    """
    AvgDist between the logits, `(num_models, num_queries, num_labels)`, of replayed and of retrained models.

    `cross_entropy` is in nats, of the predicted under the retrained softmax; its least value is the latter's entropy.

    Source: Ye et al., "Distilled Datamodel with Reverse Gradient Matching", CVPR 2024.
    """
    predicted, retrained = np.asarray(predicted, dtype=np.float64), np.asarray(retrained, dtype=np.float64)
    if predicted.shape != retrained.shape or predicted.ndim != 3 or predicted.size == 0:
        raise ValueError(
            f"`predicted` {predicted.shape} and `retrained` {retrained.shape} must be alike and not empty: logits of "
            "shape (num_models, num_queries, num_labels)."
        )
    for name, values in (("predicted", predicted), ("retrained", retrained)):
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"`{name}` has {bad} NaN or infinite values.")
    left, right = log_softmax(predicted, axis=-1), log_softmax(retrained, axis=-1)
    distances = {
        "softmax_l2": np.linalg.norm(np.exp(left) - np.exp(right), axis=-1),
        "cross_entropy": -(np.exp(right) * left).sum(-1),
        "logits_l2": np.linalg.norm(predicted - retrained, axis=-1),
    }
    estimates = {}
    for name, values in distances.items():

        def mean(queries: Indices, models: Indices, by_query: Array = values.T) -> float:
            return float(by_query[np.ix_(queries, models)].mean())

        value = float(values.mean())
        estimates[name] = Estimate(value, *bootstrap_interval(mean, values.T.shape, value, seed, 0, np.inf))
    return estimates
