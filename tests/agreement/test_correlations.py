from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from hf_rgm.agreement.correlations import (
    Estimate,
    leave_cluster_out_correlation,
    linear_datamodeling_score,
    noise_ceiling,
    pearson_by_query,
    retrained_slope,
    spearman_by_query,
)

MEASURES = [leave_cluster_out_correlation, linear_datamodeling_score]


def noisy(seed=0, noise=0.5, num_queries=20, num_points=15):
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(num_queries, num_points))
    return truth + noise * generator.normal(size=truth.shape), truth


def test_spearman_by_hand_with_ties():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)."""
    got = spearman_by_query([[1.0, 5.0, 5.0, 9.0], [4.0, 3.0, 2.0, 1.0]], [[1.0, 2.0, 3.0, 4.0]] * 2)
    np.testing.assert_allclose(got, [4.5 / np.sqrt(22.5), -1.0])


def test_spearman_equals_scipy_and_sees_only_ranks():
    predicted, actual = noisy()
    expected = [spearmanr(p, a).statistic for p, a in zip(predicted, actual, strict=True)]
    np.testing.assert_allclose(spearman_by_query(predicted, actual), expected)
    np.testing.assert_allclose(spearman_by_query(np.exp(3 * predicted), actual), expected)


def test_pearson_equals_numpy():
    predicted, actual = noisy()
    expected = [np.corrcoef(p, a)[0, 1] for p, a in zip(predicted, actual, strict=True)]
    np.testing.assert_allclose(pearson_by_query(predicted, actual), expected)
    got = leave_cluster_out_correlation(predicted, actual, correlation="pearson")
    assert got.value == pytest.approx(np.mean(expected))
    assert got.value != leave_cluster_out_correlation(predicted, actual).value


def test_constant_rows_are_undefined_for_pearson_down_to_float_error():
    """The mean of five times 0.1 is not 0.1."""
    assert np.isnan(pearson_by_query([[0.1] * 5], [[1.0, 2.0, 3.0, 4.0, 5.0]])).all()


def test_unknown_correlations_are_refused():
    with pytest.raises(ValueError, match="Unknown `correlation` 'kendall'. Use one of spearman, pearson"):
        leave_cluster_out_correlation(*noisy(), correlation="kendall")


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("constant", "name"), [(0, "constant predictions over"), (1, "constant retrained values over")]
)
def test_queries_that_are_all_constant_are_refused(measure, constant, name):
    pair = list(noisy())
    pair[constant] = np.ones_like(pair[constant]) * np.arange(20)[:, None]
    with pytest.raises(ValueError, match=f"All 20 queries have {name} the 15 points"):
        measure(*pair)


def test_undefined_for_different_reasons_is_undefined():
    with pytest.raises(ValueError, match="constant predictions or retrained values"):
        linear_datamodeling_score([[1, 1, 1], [1, 2, 3]], [[1, 2, 3], [1, 1, 1]])


@pytest.mark.parametrize("measure", MEASURES)
def test_too_few_points_give_no_interval(measure):
    estimate = measure(*noisy(num_points=4))
    assert (estimate.low, estimate.high) == (None, None)
    assert str(estimate).endswith(" (no interval: fewer than 5 points)")
    assert measure(*noisy(num_points=5)).low is not None


def population(generator, num_queries, num_points):
    """Predicted and actual values of subsets whose effects queries share in part, correlated at about 0.9."""
    factors = generator.normal(size=(6, num_points))
    loadings = generator.normal(size=(num_queries, 6))
    actual = loadings @ factors + generator.normal(size=(num_queries, num_points))
    return actual + generator.normal(size=actual.shape), actual


def test_intervals_hold_the_value_of_many_queries_and_subsets():
    """Percentile intervals hold it in 8 of these 40 cases."""
    generator = np.random.default_rng(0)
    truth = spearman_by_query(*population(generator, 1000, 1000)).mean()
    estimates = [linear_datamodeling_score(*population(generator, 50, 10)) for _ in range(40)]
    assert sum(e.low <= truth <= e.high for e in estimates) >= 36
    assert np.mean([e.high - e.low for e in estimates]) < 0.2


@pytest.mark.parametrize("measure", MEASURES)
def test_constant_rows_are_counted_and_score_zero(measure):
    actual = np.tile(np.arange(5.0), (4, 1))
    predicted = actual.copy()
    predicted[1] = 7.0
    assert np.isnan(spearman_by_query(predicted, actual)).tolist() == [False, True, False, False]
    estimate = measure(predicted, actual)
    assert estimate.value == pytest.approx(0.75)
    assert estimate.num_nan == 1
    assert str(estimate).endswith(", 1 queries undefined")
    assert measure(actual, predicted).num_nan == 1


@pytest.mark.parametrize("measure", MEASURES)
def test_bounds_enclose_the_value_and_follow_the_seed(measure):
    predicted, actual = noisy()
    first = measure(predicted, actual, seed=3)
    assert -1 <= first.low < first.value < first.high <= 1
    assert first.value == pytest.approx(spearman_by_query(predicted, actual).mean())
    assert measure(predicted, actual, seed=3) == first
    other = measure(predicted, actual, seed=4)
    assert (other.low, other.value) != (first.low, first.value)
    assert other.value == first.value


def test_bounds_narrow_with_more_queries_and_points():
    few, many = (linear_datamodeling_score(*noisy(num_queries=n, num_points=p)) for n, p in ((5, 6), (60, 80)))
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_perfect_and_reversed():
    _, actual = noisy()
    assert leave_cluster_out_correlation(actual, actual).value == pytest.approx(1.0)
    assert leave_cluster_out_correlation(-actual, actual).value == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("predicted", "actual", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 2)), "at least 3 points, got 2"),
        (np.zeros((2, 4)), np.zeros((2, 5)), r"\(2, 4\) and `actual` \(2, 5\)"),
        (np.zeros(4), np.zeros(4), "2-dimensional"),
        (np.full((1, 4), np.nan), np.zeros((1, 4)), "`predicted` has 4 NaN"),
        (np.zeros((1, 4)), np.array([[0, 1, np.inf, 2]]), "`actual` has 1 NaN or infinite"),
        (np.zeros((0, 4)), np.zeros((0, 4)), "no queries"),
    ],
)
def test_bad_input_is_refused(predicted, actual, message):
    for measure in MEASURES:
        with pytest.raises(ValueError, match=message):
            measure(predicted, actual)


def test_noise_ceiling_scores_each_seed_against_the_mean_of_the_others():
    generator = np.random.default_rng(0)
    by_seed = noisy()[1] + 0.3 * generator.normal(size=(3, 20, 15))
    ceiling = noise_ceiling(by_seed, linear_datamodeling_score)
    expected = [spearman_by_query(by_seed[s], (by_seed.sum(0) - by_seed[s]) / 2).mean() for s in range(3)]
    assert ceiling.value == pytest.approx(np.mean(expected))
    assert ceiling.low < ceiling.value < ceiling.high
    assert noise_ceiling(np.stack([by_seed[0]] * 2), linear_datamodeling_score).value == pytest.approx(1.0)


def test_noise_ceiling_needs_two_seeds():
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        noise_ceiling(noisy()[1][None], linear_datamodeling_score)


def test_estimates_print_value_and_interval():
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def test_ceilings_without_interval():
    ceiling = noise_ceiling(np.stack(noisy(num_points=4)), linear_datamodeling_score)
    assert (ceiling.low, ceiling.high) == (None, None)


def test_slope_is_least_squares_with_an_intercept_for_each_query():
    generator = np.random.default_rng(0)
    predicted = generator.normal(size=(6, 20)) + 10 * generator.normal(size=(6, 1))
    actual = 3 * predicted + generator.normal(size=(6, 20)) - 50 * generator.normal(size=(6, 1))
    design = np.zeros((120, 7))
    design[:, 0] = predicted.ravel()
    design[np.arange(120), 1 + np.repeat(np.arange(6), 20)] = 1
    expected = np.linalg.lstsq(design, actual.ravel(), rcond=None)[0][0]
    slope = retrained_slope(predicted, actual)
    assert slope.value == pytest.approx(expected)
    assert slope.low < 3 < slope.high and slope.high - slope.low < 1
    assert retrained_slope(predicted, 7 * predicted - 1).value == pytest.approx(7)
    assert retrained_slope(predicted[:, :4], actual[:, :4]).low is None
