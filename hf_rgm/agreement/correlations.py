"""Agreement between predicted and retrained effects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.floating]
Indices = NDArray[np.int64]

MIN_POINTS = 3
MIN_POINTS_FOR_INTERVAL = 5
STANDARD_DEVIATIONS = 1.96  # 95% of a normal distribution
NUM_RESAMPLES = 200


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% bootstrap interval."""

    value: float
    low: float | None  # `value` - 1.96 bootstrap standard deviations, within the range of the measure
    high: float | None  # both bounds are `None` with fewer than 5 points (retrained clusters, subsets or models)
    num_nan: int = 0  # queries with constant predictions or truth, which count as 0 in `value`

    def __str__(self) -> str:
        undefined = f", {self.num_nan} queries undefined" if self.num_nan else ""
        if self.low is None or self.high is None:
            return f"{self.value:.3f} (no interval: fewer than {MIN_POINTS_FOR_INTERVAL} points){undefined}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{undefined}"


def spearman_by_query(predicted: Array, actual: Array) -> Array:
    """Spearman correlation of each row: `(num_queries, num_points)` to `(num_queries,)`, NaN where constant."""
    predicted, actual = _checked(predicted, actual)
    return _pearson(rankdata(predicted, axis=1), rankdata(actual, axis=1))


def pearson_by_query(predicted: Array, actual: Array) -> Array:
    """Pearson correlation of each row, with shapes as in [`spearman_by_query`]."""
    return _pearson(*_checked(predicted, actual))


CORRELATIONS = {"spearman": spearman_by_query, "pearson": pearson_by_query}


def leave_cluster_out_correlation(
    scores: Array, changes: Array, *, correlation: str = "spearman", seed: int = 0
) -> Estimate:
    """Mean over queries of the correlation over clusters, both `(num_queries, num_clusters)`: f(with) - f(without)."""
    if correlation not in CORRELATIONS:
        raise ValueError(f"Unknown `correlation` {correlation!r}. Use one of {', '.join(CORRELATIONS)}.")
    return _mean_correlation(scores, changes, CORRELATIONS[correlation], seed)


def linear_datamodeling_score(predictions: Array, values: Array, *, seed: int = 0) -> Estimate:
    """
    LDS: mean over queries of the Spearman correlation over subsets, both `(num_queries, num_subsets)`.

    Predictions are sums of the kept clusters' or rows' scores, or replayed objectives. With few subsets the score is
    biased towards 0, as rank correlations of samples are: by about 0.05 with 12 subsets, 0.1 with 5.

    Source: Park et al., "TRAK: Attributing Model Behavior at Scale", 2023.
    """
    return _mean_correlation(predictions, values, spearman_by_query, seed)


def retrained_slope(predictions: Array, values: Array, *, seed: int = 0) -> Estimate:
    """Slope of retrained values on predictions, both `(num_queries, num_subsets)`; an intercept for each query."""
    predicted, actual = _checked(predictions, values)

    def slope(queries: Indices, points: Indices) -> float:
        x, y = (part[np.ix_(queries, points)] for part in (predicted, actual))
        x = x - x.mean(1, keepdims=True)
        squares = (x * x).sum()
        return float((x * y).sum() / squares) if squares > 0 else 0.0

    value = slope(*(np.arange(length) for length in predicted.shape))
    return Estimate(value, *bootstrap_interval(slope, predicted.shape, value, seed, -np.inf, np.inf))


def noise_ceiling(by_seed: Array, measure: Callable[[Array, Array], Estimate]) -> Estimate:
    """The measure of each seed's retraining, `by_seed[s]`, against the mean of the others; mean over seeds."""
    if len(by_seed) < 2:
        raise ValueError(f"A noise ceiling needs at least 2 seeds, got {len(by_seed)}. Retrain with more seeds.")
    estimates = [measure(by_seed[s], np.delete(by_seed, s, axis=0).mean(0)) for s in range(len(by_seed))]
    bounds = [(e.low, e.high) for e in estimates if e.low is not None and e.high is not None]
    low, high = np.mean(bounds, axis=0).tolist() if bounds else (None, None)
    return Estimate(float(np.mean([e.value for e in estimates])), low, high, num_nan=sum(e.num_nan for e in estimates))


def _mean_correlation(
    predicted: Array, actual: Array, correlation: Callable[[Array, Array], Array], seed: int
) -> Estimate:
    predicted, actual = np.asarray(predicted), np.asarray(actual)
    by_query = correlation(predicted, actual)
    undefined = int(np.isnan(by_query).sum())
    if undefined == len(by_query):
        both = {"predictions": predicted, "retrained values": actual}
        constant = [name for name, values in both.items() if _constant(values).all()]
        raise ValueError(
            f"All {undefined} queries have constant {' and '.join(constant) or 'predictions or retrained values'} "
            f"over the {predicted.shape[1]} points: there is nothing to correlate. Check that scores and subsets "
            "differ, and that the objective depends on the training data."
        )
    value = float(np.nan_to_num(by_query).mean())

    def resampled(queries: Indices, points: Indices) -> float:
        chosen = np.ix_(queries, points)
        return float(np.nan_to_num(correlation(predicted[chosen], actual[chosen])).mean())

    return Estimate(value, *bootstrap_interval(resampled, predicted.shape, value, seed, -1, 1), num_nan=undefined)


def bootstrap_interval(
    resampled: Callable[[Indices, Indices], float],
    shape: tuple[int, ...],
    value: float,
    seed: int,
    lowest: float,
    highest: float,
) -> tuple[float, float] | tuple[None, None]:
    """
    Normal interval with the bootstrap's standard deviation over queries and points.

    Percentiles fail: repeated points lower rank correlations. In simulations with a true correlation of 0.8,
    percentile intervals held it in only 5 to 8 of 10 cases with 5 to 40 points.
    """
    num_queries, num_points = shape
    if num_points < MIN_POINTS_FOR_INTERVAL:
        return None, None
    generator = np.random.default_rng(seed)
    draws = [
        resampled(generator.integers(num_queries, size=num_queries), generator.integers(num_points, size=num_points))
        for _ in range(NUM_RESAMPLES)
    ]
    half_width = STANDARD_DEVIATIONS * np.std(draws, ddof=1)
    return float(max(value - half_width, lowest)), float(min(value + half_width, highest))


def _checked(predicted: Array, actual: Array) -> tuple[Array, Array]:
    predicted, actual = np.asarray(predicted, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    if predicted.shape != actual.shape or predicted.ndim != 2:
        raise ValueError(f"`predicted` {predicted.shape} and `actual` {actual.shape} must be 2-dimensional and alike.")
    if len(predicted) == 0:
        raise ValueError("There are no queries to average over. Pass at least one.")
    if predicted.shape[1] < MIN_POINTS:
        raise ValueError(
            f"A correlation needs at least {MIN_POINTS} points, got {predicted.shape[1]}. Retrain on more subsets."
        )
    for name, values in (("predicted", predicted), ("actual", actual)):
        if not np.isfinite(values).all():
            raise ValueError(f"`{name}` has {int((~np.isfinite(values)).sum())} NaN or infinite values.")
    return predicted, actual


def _constant(values: Array) -> NDArray[np.bool_]:
    return (values == values[:, :1]).all(1)


def _pearson(left: Array, right: Array) -> Array:
    constant = _constant(left) | _constant(right)
    left = left - left.mean(1, keepdims=True)
    right = right - right.mean(1, keepdims=True)
    norms = np.sqrt((left**2).sum(1) * (right**2).sum(1))
    return np.divide((left * right).sum(1), norms, out=np.full(len(norms), np.nan), where=~constant & (norms > 0))
