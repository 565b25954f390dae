"""Predictions of an attributor for the subsets that are retrained."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_rgm.agreement.budget import LDS_CLUSTERS, LDS_ROWS, LEAVE_CLUSTER_OUT
from hf_rgm.agreement.subsets import leave_one_out_masks, random_masks
from hf_rgm.attribution.attributor import Attributor
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.objectives import Objective
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import DataCollator, RowReader


def subset_masks(name: str, count: int, clusters: ClusterMap, seed: int) -> NDArray[np.bool_]:
    """Subsets of a measure: masks `(count, num_clusters)` or, for rows, `(count, num_rows)`, bool."""
    if name == LEAVE_CLUSTER_OUT:
        chosen = np.random.default_rng(seed).permutation(clusters.num_clusters)[:count]
        return leave_one_out_masks(clusters.num_clusters)[np.sort(chosen)]
    return random_masks(clusters.num_rows if name == LDS_ROWS else clusters.num_clusters, count, seed=seed)


def evaluation_identity(
    model: FunctionalModel, queries: Any, objective: Objective, data_collator: DataCollator | None
) -> str:
    """A digest of queries and objective, which keeps retrainings of different ones apart."""
    reader = RowReader(queries, model, data_collator=data_collator, what="queries")
    inputs, labels = reader.batch(range(len(reader)))
    digest = hashlib.sha256(objective.name.encode())
    for name, tensor in sorted({**inputs, "labels": labels}.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def predicted_values(
    attributor: Attributor, queries: Any, masks: dict[str, NDArray[np.bool_]], *, engine: str, **options: Any
) -> dict[str, NDArray[np.floating]]:
    """
    An attributor's predictions for subsets, up to a constant for each value: `(num_values, num_masks)` by measure.

    `options` are those that [`Attributor.attribute`] and [`Attributor.replayed_values`] share.
    """
    weights = {name: mask.astype(np.float32) for name, mask in masks.items()}
    predicted = {}
    if engine == "adjoint" or LDS_ROWS in weights:
        result = attributor.attribute(queries, engine=engine, **options)
        scores = {LDS_ROWS: result.row_scores, LDS_CLUSTERS: result.scores, LEAVE_CLUSTER_OUT: result.scores}
        predicted = {name: scores[name] @ weight.T for name, weight in weights.items()}
    if engine != "adjoint":
        for name in weights.keys() - {LDS_ROWS}:
            replayed = attributor.replayed_values(queries, torch.from_numpy(weights[name]), engine=engine, **options)
            predicted[name] = replayed.T
    for name, values in predicted.items():
        if (values == values[:, :1]).all():
            raise ValueError(
                f"The {engine} engine predicts the same of every subset of {name!r}: there is nothing to correlate. "
                "Check that the objective depends on the training data."
            )
    return predicted
