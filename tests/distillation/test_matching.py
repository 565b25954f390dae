from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rgm.distillation.learner import cluster_residuals, draw_states, matching_error


def relative_error(synthetic, real):
    return matching_error(synthetic, real, real.square().sum())


def test_matching_error_closed_form():
    real = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    synthetic = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    assert relative_error(synthetic, real).item() == pytest.approx((1 + 4) / 25)
    assert relative_error(torch.zeros(2, 2), real).item() == 1.0
    assert relative_error(real, real).item() == 0.0


def test_cluster_residuals_closed_form():
    real = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    synthetic = torch.tensor([[3.0, 3.0], [0.0, 0.0], [0.0, 0.0]])
    assert cluster_residuals(synthetic, real).tolist() == pytest.approx([1 / 25, 0.0, 1.0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), clusters=st.integers(1, 4), scale=st.floats(0.01, 100))
def test_matching_error_is_the_energy_weighted_mean_of_residuals_and_free_of_scale(seed, clusters, scale):
    generator = torch.Generator().manual_seed(seed)
    synthetic, real = (torch.randn(clusters, 5, generator=generator).double() for _ in range(2))
    energy = real.square().sum(1)
    expected = (cluster_residuals(synthetic, real) * energy).sum() / energy.sum()
    torch.testing.assert_close(relative_error(scale * synthetic, scale * real), expected)


def drawn(num_states, per_iteration, count, seed=0):
    states = draw_states(num_states, per_iteration, torch.Generator().manual_seed(seed))
    return list(itertools.islice(states, count))


@settings(max_examples=50, deadline=None)
@given(num_states=st.integers(1, 12), per_iteration=st.integers(1, 5), passes=st.integers(1, 3))
def test_every_state_has_its_turn_in_every_pass(num_states, per_iteration, passes):
    length = math.ceil(num_states / per_iteration)
    batches = drawn(num_states, per_iteration, passes * length)
    for first in range(0, len(batches), length):
        assert sorted(itertools.chain(*batches[first : first + length])) == list(range(num_states))
    assert all(1 <= len(batch) <= per_iteration for batch in batches)


def test_the_order_of_states_is_that_of_the_seed():
    assert drawn(6, 2, 30) == drawn(6, 2, 30) != drawn(6, 2, 30, seed=1)
