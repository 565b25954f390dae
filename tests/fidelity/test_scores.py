from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from hf_rgm.fidelity.scores import (
    Estimate,
    leave_cluster_out_correlation,
    linear_datamodeling_score,
    noise_ceiling,
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
