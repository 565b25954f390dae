from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from scipy.stats import spearmanr

from hf_rgm.distillation.stopping import (
    FIRST_ROUND,
    SMALLEST_FACTOR,
    MatchQuality,
    SampleProducts,
    round_lengths,
    scaled,
)
from hf_rgm.synset.samples import SyntheticSamples

SOLVED = 1e-4
"""Relative; one weight after another comes near the solution, and is stopped."""


def drawn(num_states=3, num_clusters=4, per_cluster=2, num_parameters=20, seed=0):
    """Gradients of samples, with their clusters' in common so that good weights are positive, and real ones."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(num_states, num_clusters, num_parameters, generator=generator).double()
    noise = torch.randn(num_states, num_clusters, per_cluster, num_parameters, generator=generator)
    return real[:, :, None] / per_cluster + 0.3 * noise.double(), real


def products(samples, real):
    energies = real.square().sum((1, 2))
    return SampleProducts(
        gram=torch.einsum("tkip,tkjp,t->kij", samples, samples, 1 / energies),
        real=torch.einsum("tkip,tjp,t->tkij", samples, real, 1 / energies),
        among_real=torch.einsum("tkp,tjp,t->tkj", real, real, 1 / energies),
    )


def matching_errors(samples, real, factors):
    synthetic = (samples * factors[:, :, None]).sum(2)
    return (synthetic - real).square().sum((1, 2)) / real.square().sum((1, 2))


@given(num_iterations=st.integers(1, 2000))
def test_rounds_double_and_sum_to_the_bound(num_iterations):
    lengths = list(round_lengths(num_iterations))
    assert sum(lengths) == num_iterations
    assert lengths[0] == min(FIRST_ROUND, num_iterations)
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(lengths[:-1]))


@pytest.mark.parametrize(
    ("before", "now", "enough"),
    [
        ((0.9, 0.9), (0.04, 0.04), True),
        ((0.9, 0.9), (0.04, 0.06), False),
        ((0.9, 0.9), (0.06, 0.04), False),
        ((0.9, 0.9), (0.8, 0.89), False),
        ((0.9, 0.9), (0.89, 0.8), False),
        ((0.9, 0.9), (0.86, 0.86), True),
        ((0.9, 0.9), (1.2, 0.95), True),
    ],
)
def test_enough_is_little_left_or_little_gained(before, now, enough):
    assert MatchQuality(*now).is_enough(MatchQuality(*before), 0.05) is enough
    assert not MatchQuality(*now).is_enough(MatchQuality(*before), 0.0)


def test_error_and_order_equal_those_of_the_gradients():
    samples, real = drawn()
    factors = torch.rand(4, 2).double() + 0.5
    quality = products(samples, real).quality(factors)
    assert quality.error == pytest.approx(float(matching_errors(samples, real, factors).mean()))
    synthetic = (samples * factors[:, :, None]).sum(2)
    correlations = [
        spearmanr(synthetic[t] @ real[t, j], real[t] @ real[t, j]).statistic for t in range(3) for j in range(4)
    ]
    assert quality.disagreement == pytest.approx(1 - np.mean(correlations))
    copies = products(real[:, :, None], real).quality(torch.ones(4, 1).double())
    assert copies.error == pytest.approx(0, abs=1e-12) and copies.disagreement == pytest.approx(0, abs=1e-12)


def test_one_cluster_has_no_order():
    samples, real = drawn(num_clusters=1)
    assert products(samples, real).quality(torch.ones(1, 2).double()).disagreement == 0


def test_weights_are_those_of_least_squares_without_negative_ones():
    samples, real = drawn(per_cluster=3)
    factors = products(samples, real).best_factors()
    scale = real.square().sum((1, 2)).rsqrt()[:, None, None]
    for cluster in range(4):
        columns = (samples[:, cluster] * scale).transpose(1, 2).reshape(-1, 3).numpy()
        expected, _ = nnls(columns, (real[:, cluster] * scale[..., 0]).reshape(-1).numpy())
        assert (expected > SMALLEST_FACTOR).all()
        assert factors[cluster].tolist() == pytest.approx(expected.tolist(), rel=SOLVED)


@given(seed=st.integers(0, 1000), size=st.floats(0.01, 100))
def test_no_cluster_ends_worse_than_before_or_than_without_samples(seed, size):
    """However wrong the gradients are: summed over states, up to what the smallest weights leave."""
    generator = torch.Generator().manual_seed(seed)
    samples, real = drawn(seed=seed)
    samples = size * torch.randn(samples.shape, generator=generator, dtype=torch.float64)
    found = products(samples, real)
    factors = found.best_factors()
    ones = torch.ones_like(factors)
    assert (factors >= SMALLEST_FACTOR).all()
    for cluster in range(4):
        own = [samples[:, [cluster]], real[:, [cluster]]]
        energies = real.square().sum((1, 2))
        error, before = (
            float((((own[0] * f[[cluster], :, None]).sum(2) - own[1]).square().sum((1, 2)) / energies).sum())
            for f in (factors, ones)
        )
        without = float((own[1].square().sum((1, 2)) / energies).sum())
        least = float((((own[0] * SMALLEST_FACTOR).sum(2) - own[1]).square().sum((1, 2)) / energies).sum())
        assert error <= before + 1e-9
        assert error <= max(without, least) + 1e-9


def test_gradients_of_no_length_leave_weights_alone():
    samples, real = drawn()
    samples[:, 1, 0] = 0
    assert products(samples, real).best_factors()[1, 0] == 1


@pytest.mark.parametrize("positions", [(), (5,)])
def test_scaling_multiplies_the_weights_at_all_positions(positions):
    shape = (4, 2, *positions)
    samples = SyntheticSamples(torch.zeros(*shape, 3), torch.zeros(*shape, 3), torch.randn(shape))
    factors = torch.rand(4, 2).double() + 0.5
    expected = samples.log_weights.exp() * factors.float().reshape(4, 2, *[1] * len(positions))
    got = scaled(samples, factors)
    torch.testing.assert_close(got.log_weights.exp(), expected)
    assert got.log_weights.dtype == torch.float32
