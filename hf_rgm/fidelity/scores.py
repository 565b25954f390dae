"""Agreement between predicted and retrained effects (METHOD: ground truth and measures)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Estimate:
    """
    A figure with its bootstrap interval.

    Args:
        value (`float`): The estimate.
        low, high (`float`): Bounds of the 95% percentile interval.
        num_nan (`int`): Queries whose correlation is undefined (constant predictions or constant truth); they count
            as 0 in `value`.
    """

    value: float
    low: float
    high: float
    num_nan: int = 0

    def __str__(self) -> str:
        undefined = f", {self.num_nan} queries undefined" if self.num_nan else ""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{undefined}"


def spearman_by_query(predicted: Array, actual: Array) -> Array:
    """
    Spearman correlation of each row.

    Args:
        predicted, actual (`np.ndarray`): `(num_queries, num_points)`.

    Returns:
        `np.ndarray`: `(num_queries,)`, float64; NaN where either row is constant.

    Raises:
        ValueError: If shapes differ, there are no queries or fewer than 3 points, or values are NaN.
    """
    predicted, actual = np.asarray(predicted, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    if predicted.shape != actual.shape or predicted.ndim != 2:
        raise ValueError(f"`predicted` {predicted.shape} and `actual` {actual.shape} must be 2-dimensional and alike.")
    if len(predicted) == 0:
        raise ValueError("There are no queries to average over. Pass at least one.")
    if predicted.shape[1] < 3:
        raise ValueError(f"A correlation needs at least 3 points, got {predicted.shape[1]}. Retrain on more subsets.")
    for name, values in (("predicted", predicted), ("actual", actual)):
        if not np.isfinite(values).all():
            raise ValueError(f"`{name}` has {int((~np.isfinite(values)).sum())} NaN or infinite values.")
    left = rankdata(predicted, axis=1)
    right = rankdata(actual, axis=1)
    left -= left.mean(1, keepdims=True)
    right -= right.mean(1, keepdims=True)
    norm = np.sqrt((left**2).sum(1) * (right**2).sum(1))
    return np.divide((left * right).sum(1), norm, out=np.full(len(norm), np.nan), where=norm > 0)


def leave_cluster_out_correlation(scores: Array, changes: Array, *, seed: int = 0) -> Estimate:
    """
    Mean over queries of the Spearman correlation, over clusters, of scores with retrained changes.

    Args:
        scores (`np.ndarray`): `(num_queries, num_clusters)`, predicted f(with) - f(without).
        changes (`np.ndarray`): `(num_queries, num_clusters)`, the same by retraining.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap over queries and clusters.

    Returns:
        [`Estimate`]
    """
    return _bootstrap(np.asarray(scores), np.asarray(changes), seed)


def linear_datamodeling_score(predictions: Array, values: Array, *, seed: int = 0) -> Estimate:
    """
    LDS: mean over queries of the Spearman correlation, over subsets, of predicted with retrained objectives.

    Args:
        predictions (`np.ndarray`): `(num_queries, num_subsets)`: sums of the scores of the kept clusters or rows, or
            replayed objectives.
        values (`np.ndarray`): `(num_queries, num_subsets)`: objectives of models retrained on the subsets.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap over queries and subsets.

    Returns:
        [`Estimate`]

    Source: Park et al., "TRAK: Attributing Model Behavior at Scale", 2023.
    """
    return _bootstrap(np.asarray(predictions), np.asarray(values), seed)


def noise_ceiling(by_seed: Array, measure: Callable[[Array, Array], Estimate]) -> Estimate:
    """
    The measure for one seed's retraining against the mean of the others, averaged over seeds.

    Args:
        by_seed (`np.ndarray`): `(num_seeds, num_queries, num_points)`, retrained values or changes.
        measure (`Callable`): [`leave_cluster_out_correlation`] or [`linear_datamodeling_score`].

    Raises:
        ValueError: With fewer than two seeds.
    """
    if len(by_seed) < 2:
        raise ValueError(f"A noise ceiling needs at least 2 seeds, got {len(by_seed)}. Retrain with more seeds.")
    estimates = [measure(by_seed[s], np.delete(by_seed, s, axis=0).mean(0)) for s in range(len(by_seed))]
    return Estimate(
        float(np.mean([e.value for e in estimates])),
        float(np.mean([e.low for e in estimates])),
        float(np.mean([e.high for e in estimates])),
        sum(e.num_nan for e in estimates),
    )


def _bootstrap(predicted: Array, actual: Array, seed: int, num_resamples: int = 200) -> Estimate:
    by_query = spearman_by_query(predicted, actual)
    undefined = int(np.isnan(by_query).sum())
    generator = np.random.default_rng(seed)
    num_queries, num_points = predicted.shape
    means = []
    for _ in range(num_resamples):
        queries = generator.integers(num_queries, size=num_queries)
        points = generator.integers(num_points, size=num_points)
        resampled = spearman_by_query(predicted[np.ix_(queries, points)], actual[np.ix_(queries, points)])
        means.append(np.nan_to_num(resampled).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(np.nan_to_num(by_query).mean()), float(low), float(high), undefined)
