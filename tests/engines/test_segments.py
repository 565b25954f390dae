"""Constants of segments, their closed form along eigenvectors, and where a step becomes unstable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hf_rgm.engines.segments import StepConstants, _stable, segments_of
from tests.engines.long_segments import NUM_PARAMETERS, long_run, path_of

KINDS = {
    "plain sgd": lambda beta: (0.0, 1.0, 0.0, 1.0),
    "momentum": lambda beta: (beta, 1.0, beta, 1.0),
    "dampening": lambda beta: (beta, 1 - beta / 2, beta, 1 - beta / 2),
    "nesterov": lambda beta: (beta, 1.0, beta**2, 1 + beta),
    "adam": lambda beta: (beta, 1 - beta, beta, 1 - beta),
}


def matrix(h, constants):
    """One step of (delta, m) with rate times curvature h."""
    momentum, gain, momentum_share, gradient_share = constants
    return np.array([[1 - h * gradient_share, -momentum_share], [h * gain, momentum]])


def radius(h, constants):
    return np.abs(np.linalg.eigvals(matrix(h, constants))).max()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_the_stable_curvature_is_where_an_eigenvalue_leaves_the_unit_circle(kind, beta):
    constants = KINDS[kind](beta)
    limit = _stable(*constants)
    assert np.isfinite(limit) and limit > 0
    for share in (1e-3, 0.1, 0.5, 0.9, 0.999):
        assert radius(share * limit, constants) <= 1 + 1e-9
    for share in (1.001, 1.1, 2.0, 10.0):
        assert radius(share * limit, constants) > 1


@pytest.mark.parametrize(
    "constants", list(itertools.product((0.0, 0.5, 0.9), (0.1, 1.0), (0.0, 0.5, 0.9), (0.1, 1.0, 1.9)))
)
def test_of_any_constants_it_is_the_first_curvature_at_which_one_does(constants):
    limit = _stable(*constants)
    grid = np.linspace(1e-3, 40.0, 4000)
    unstable = grid[[radius(h, constants) > 1 + 1e-9 for h in grid]]
    first = unstable[0] if len(unstable) else np.inf
    assert limit == pytest.approx(first, abs=0.011) or (limit > 39.9 and first == np.inf)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [("sgd", {"decays": (0.2, 0.2), "clips": True}), ("adamw", {"decays": (0.2, 0.2)}), ("sgd", {"nesterov": True})],
)
def test_responses_are_the_steps_composed(optimizer, settings):
    """Along a direction of one curvature the deviation and its momentum are two numbers."""
    segment = segments_of(path_of(long_run(optimizer, **settings)))[1]
    curvature = np.array([0.0, 0.3, 2.0])
    phi, gamma = segment.responses(curvature)
    for index, bent in enumerate(curvature):
        ends = []
        for start, force in (((1.0, 0.0), 0.0), ((0.0, 1.0), 0.0), ((0.0, 0.0), 1.0)):
            delta, m = start
            for step in segment.steps:
                gradient = step.scale * (force + bent * delta) + step.coupled * delta
                direction = step.momentum_share * m + step.gradient_share * gradient
                delta, m = (1 - step.decay) * delta - step.rate * direction, step.momentum * m + step.gain * gradient
            ends.append((delta, m))
        np.testing.assert_allclose(phi[:, :, index], np.array(ends[:2]).T, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(gamma[:, index], ends[2], rtol=1e-12, atol=1e-14)


def test_rates_add_up_to_one_and_rates_times_the_preconditioner_are_the_learning_rates():
    run = long_run("sgd", rates=(1.0, 4.0), warmup=4)
    for segment in segments_of(path_of(run)):
        assert sum(step.rate for step in segment.steps) == pytest.approx(1.0)
        rates = run.steps.learning_rates[segment.first : segment.last]
        own = np.outer([step.rate for step in segment.steps], segment.precondition[[0, -1]].numpy())
        np.testing.assert_allclose(own, rates, rtol=1e-6)


def test_a_segment_before_any_learning_rate_moves_nothing_and_keeps_its_momentum():
    run = long_run("sgd", num_steps=8, states=(0, 1, 8), warmup=4)
    first = segments_of(path_of(run))[0]
    assert (first.first, first.last, first.precondition.tolist()) == (0, 1, [0.0])
    assert first.steps[0].gain == 1.0 and first.stable_curvature > 0


def test_the_preconditioner_is_the_mean_of_several_second_moments():
    run = long_run("adamw", states=(0, 1, 24))
    inverse = path_of(run).inverse_root_moment(24)
    for segment in segments_of(path_of(run)):
        lengths = run.steps.learning_rates[segment.first : segment.last, 0]
        updates = np.arange(segment.first, segment.last) + 1
        total = float((lengths / (1 - 0.8**updates)).sum())
        np.testing.assert_allclose(segment.precondition, total * inverse, rtol=1e-5)
        assert segment.precondition.shape == (NUM_PARAMETERS,)


def test_the_cap_is_that_of_the_stiffest_step():
    segment = segments_of(path_of(long_run("sgd", clips=True)))[1]
    own = [_stable(s.momentum, s.gain, s.momentum_share, s.gradient_share) / (s.rate * s.scale) for s in segment.steps]
    assert segment.stable_curvature == min(own) < max(own)
    assert isinstance(segment.steps[0], StepConstants)
