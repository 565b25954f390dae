"""Mixtures: cluster weights that improve an objective at the same amount of data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import root_scalar

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.objectives import Objective
from hf_rgm.exceptions import DivergenceError

logger = logging.getLogger(__name__)

MAX_SHRINKS = 4


@dataclass(eq=False, repr=False)
class MixtureSuggestion:
    """
    Cluster weights p to train with, and the change of an objective that they are expected to make.

    A weight of 2 means: train as if every row of the cluster were there twice. The amount of data stays the same:
    `(weights * clusters.sizes).sum()` is the number of rows. With several queries the objective is their mean.

    Args:
        weights (`np.ndarray`): `(num_clusters,)`, float64, p of each cluster, 1 for no change.
        clusters (`ClusterMap`): The clusters and their rows.
        scores (`np.ndarray`): `(num_clusters,)`, float64: derivative of the objective by each weight at p = 1, which
            is the adjoint's score, mean over queries.
        objective (`str`): Name of the objective.
        objective_value (`float`): The objective of the trained model, mean over queries.
        maximize (`bool`): Whether the weights are to raise the objective, or to lower it.
        max_change (`float`): The bound that was used: all weights lie in `[1 / max_change, max_change]`.
        replayed_change (`float`, *optional*): Change of the objective when the weights are replayed on the synset, in
            units of the objective.

    Example:

    ```python
    >>> from hf_rgm import Attributor
    >>> from hf_rgm.testing import tiny_recorded_run, tiny_synset
    >>> run = tiny_recorded_run()
    >>> attributor = Attributor(run.model, tiny_synset(), disable_tqdm=True)
    >>> mixture = attributor.suggest_mixture(run.queries, max_change=1.5)
    >>> mixture.predicted_change > 0
    True
    >>> run.train_dataset.select(mixture.resample(seed=0)).num_rows == run.train_dataset.num_rows
    True

    ```
    """

    weights: NDArray[np.float64]
    clusters: ClusterMap
    scores: NDArray[np.float64]
    objective: str
    objective_value: float
    maximize: bool
    max_change: float
    replayed_change: float | None = None

    @property
    def linear_change(self) -> float:
        """Change of the objective to first order, `scores @ (weights - 1)`, in units of the objective."""
        return float(self.scores @ (self.weights - 1))

    @property
    def predicted_change(self) -> float:
        """Change of the objective by replay if that was done, else to first order, in units of the objective."""
        return self.linear_change if self.replayed_change is None else self.replayed_change

    def to_pandas(self) -> pd.DataFrame:
        """
        The suggestion as a table, highest weight first.

        Returns:
            `pd.DataFrame`: columns `cluster`, `weight`, `size` (rows now), `suggested_size` (weight times size),
            `share` (of all suggested rows: the probabilities of `datasets.interleave_datasets`) and `score`.
        """
        suggested = self.weights * self.clusters.sizes
        frame = pd.DataFrame(
            {
                "cluster": list(self.clusters.names),
                "weight": self.weights,
                "size": self.clusters.sizes,
                "suggested_size": suggested,
                "share": suggested / suggested.sum(),
                "score": self.scores,
            }
        )
        return frame.sort_values("weight", ascending=False, kind="stable", ignore_index=True)

    def resample(self, seed: int = 0) -> NDArray[np.int64]:
        """
        Rows to train on instead: `train_dataset.select(mixture.resample())`.

        A row of a cluster with weight p comes `floor(p)` times, and once more with probability `p - floor(p)`. The
        draws are systematic: every cluster gets its suggested size but for rounding, and the total stays the same.

        Args:
            seed (`int`, *optional*, defaults to `0`): Seed of the draws.

        Returns:
            `np.ndarray`: `(num_rows,)`, int64, ascending, with repeats.
        """
        generator = np.random.default_rng(seed)
        ids = self.clusters.cluster_ids
        order = np.lexsort((generator.random(len(ids)), ids))
        cumulative = np.cumsum(self.weights[ids[order]])
        cumulative[-1] = len(ids)
        copies = np.diff(np.floor(cumulative + generator.random()), prepend=0).astype(np.int64)
        return np.sort(np.repeat(order, copies))

    def __repr__(self) -> str:
        verb = "maximize" if self.maximize else "minimize"
        low, high = self.weights.min(), self.weights.max()
        return (
            f"MixtureSuggestion({verb} {self.objective}: {self.objective_value:.4g} {self.predicted_change:+.4g}, "
            f"{self.clusters.num_clusters} weights from {low:.3g} to {high:.3g})"
        )


def mixture_weights(
    scores: NDArray[np.floating], sizes: NDArray[np.integer], max_change: float
) -> NDArray[np.float64]:
    """Weights `(num_clusters,)`, float64, that raise a linear objective at the same amount of data."""
    # A clipped exponentiated-gradient step: p_k = max_change ** clip(z_k - shift, -1, 1), with z_k the score per row
    # of cluster k in standard deviations over rows, and the shift such that sum_k p_k n_k = n.
    per_row = np.asarray(scores, dtype=np.float64) / sizes
    shares = sizes / sizes.sum()
    centred = per_row - shares @ per_row
    deviation = np.sqrt(shares @ centred**2)
    if deviation <= 1e-9 * np.abs(per_row).max():
        raise ValueError(
            f"All {len(sizes)} clusters have the same score per row ({per_row[0]:.3g}): to first order no mixture is "
            "better than another. Use clusters that differ, or another objective."
        )
    z = centred / deviation

    def weights(shift: float) -> NDArray[np.float64]:
        return np.clip(max_change ** np.clip(z - shift, -1, 1), 1 / max_change, max_change)

    bracket = (z.min() - 1, z.max() + 1)
    return weights(root_scalar(lambda shift: shares @ weights(shift) - 1, bracket=bracket, xtol=1e-15).root)


def trusted_mixture(
    scores: NDArray[np.float64],
    clusters: ClusterMap,
    objective: str,
    objective_value: float,
    *,
    maximize: bool,
    max_change: float,
    min_agreement: float | None,
    replayed_change: Callable[[NDArray[np.float64]], float],
) -> MixtureSuggestion:
    """Boldest mixture whose replayed change is at least `min_agreement` of the change to first order."""
    tried = []
    for shrinks in range(MAX_SHRINKS + 1):  # the bound's square root each time
        bound = max_change**0.5**shrinks
        weights = mixture_weights(scores if maximize else -scores, clusters.sizes, bound)
        suggestion = MixtureSuggestion(weights, clusters, scores, objective, objective_value, maximize, bound)
        if min_agreement is None:
            return suggestion
        try:
            suggestion.replayed_change = replayed_change(weights)
        except DivergenceError as error:
            logger.info("Weights within a factor of %.3g: %s", bound, error)
            tried.append(f"{bound:.3g}: diverged")
            continue
        agreement = suggestion.replayed_change / suggestion.linear_change
        if agreement >= min_agreement:
            return suggestion
        tried.append(f"{bound:.3g}: {agreement:.2f}")
    raise ValueError(
        f"Replay does not confirm the first-order prediction for {objective!r}: the replayed change is less than "
        f"`min_agreement` = {min_agreement} of it within every bound tried ({', '.join(tried)}). Use more queries, "
        "distil with more samples per cluster, or pass `min_agreement=None` for the unchecked weights."
    )


def check_request(objective: Objective, num_clusters: int, max_change: Any, min_agreement: Any) -> None:
    """Checks arguments of [`Attributor.suggest_mixture`] before anything is computed."""
    if not objective.differentiable:
        raise ValueError(
            f"A mixture follows the gradient of the objective, but {objective.name!r} is not differentiable. Use a "
            'differentiable stand-in, such as "margin" for "accuracy".'
        )
    if num_clusters < 2:
        raise ValueError("The synset has one cluster only: there is nothing to mix. Distil with more clusters.")
    if not 1 < max_change < float("inf"):
        raise ValueError(
            f"`max_change` must be above 1 and finite, got {max_change}. Weights lie in [1 / max_change, max_change]; "
            "2 halves or doubles a cluster at most."
        )
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise ValueError(
            f"`min_agreement` must lie in (0, 1], got {min_agreement}. It is the share of the first-order change that "
            "replay has to reach; None skips the replay."
        )
