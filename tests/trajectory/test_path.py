from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import strategies as st

from hf_rgm.model.functional_model import ParameterSpace
from hf_rgm.trajectory.optimizers import OptimizerRule, ParameterGroup
from hf_rgm.trajectory.path import LinearStep, RecordedPath, deviation_step
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.steps import StepTable
from hf_rgm.trajectory.trajectory import Trajectory

SPACE = ParameterSpace(("a", "b"), (torch.Size([2]), torch.Size([1])))
NUM_STEPS = 6
RATES = [[0.1, 0.2], [0.2, 0.4], [0.3, 0.6], [0.4, 0.8], [0.5, 1.0], [0.6, 1.2]]
CLIPS = [1.0, 0.5, 1.0, 0.25, 1.0, 1.0]


def trajectory(name="adamw", *, skipped=(), states=(0, 3, 6), rates=RATES, metadata=None, **constants):
    """Parameters at step t are t; second moments are t^2 times the bias correction."""
    updates = [sum(s not in skipped for s in range(t)) for t in range(NUM_STEPS + 1)]

    def moments(step):
        if name == "sgd" or updates[step] == 0:
            return {}
        raw = step**2 * (1 - 0.99 ** updates[step])
        second = {key: torch.full(shape, raw) for key, shape in zip("ab", SPACE.shapes, strict=True)}
        return {"exp_avg": {key: torch.zeros_like(value) for key, value in second.items()}, "exp_avg_sq": second}

    kinds = {"betas": (0.9, 0.99), "eps": 1e-3} if name != "sgd" else {"momentum": 0.8}
    groups = tuple(
        ParameterGroup((key,), **{"weight_decay": decay, **kinds, **constants})
        for key, decay in (("a", 0.1), ("b", 0.0))
    )
    return Trajectory(
        optimizer=OptimizerRule(name, groups),
        parameter_shapes={"a": (2,), "b": (1,)},
        steps=StepTable(
            epoch=[0.0] * NUM_STEPS,
            learning_rates=rates,
            gradient_norm=[1.0] * NUM_STEPS,
            clip_factor=CLIPS,
            skipped=[s in skipped for s in range(NUM_STEPS)],
        ),
        states={
            s: TrajectoryState(
                s, {k: torch.full(v, float(s)) for k, v in zip("ab", SPACE.shapes, strict=True)}, moments(s)
            )
            for s in states
        },
        num_rows=4,
        dataset_fingerprint="",
        metadata=metadata,
    )


def path(run, rewind=0.0, stride=1):
    return RecordedPath(run, SPACE, torch.device("cpu"), rewind=rewind, stride=stride)


def close(values, expected):
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("step", [0, 1, 1.5, 3, 4, 5.75, 6])
def test_parameters_are_interpolated_between_recorded_states(step):
    close(path(trajectory()).parameters_at(step), [float(step)] * 3)


def test_before_the_first_recorded_state_its_parameters_hold():
    close(path(trajectory(states=(3, 6))).parameters_at(1), [3.0] * 3)


def test_recorded_states_are_given_exactly():
    run = trajectory()
    assert torch.equal(path(run).parameters_at(6), SPACE.flatten(run.final.parameters))


@pytest.mark.parametrize(("step", "nearest"), [(0, 0), (1, 0), (1.5, 3), (2, 3), (4.4, 3), (4.5, 6), (6, 6)])
def test_nearest_state_prefers_the_later_of_two(step, nearest):
    assert path(trajectory()).nearest_state(step) == nearest


@pytest.mark.parametrize("rewind", [-0.1, 1.0, 1.5, float("nan")])
def test_rewind_out_of_range_is_refused(rewind):
    with pytest.raises(ValueError, match=f"`rewind` must be .* got {rewind}"):
        path(trajectory(), rewind=rewind)


@pytest.mark.parametrize("stride", [0, -2])
def test_stride_out_of_range_is_refused(stride):
    with pytest.raises(ValueError, match=f"`stride` must be .* got {stride}"):
        path(trajectory(), stride=stride)


@pytest.mark.parametrize(("stride", "starts"), [(1, [2, 3, 4, 5]), (3, [2, 5]), (4, [2]), (100, [2])])
def test_steps_cover_everything_from_the_rewind_point(stride, starts):
    assert [step.step for step in path(trajectory(), rewind=1 / 3, stride=stride).steps()] == starts


def test_the_latest_rewind_still_has_a_step():
    """0.99 of six steps rounds to six, where nothing would be left and every score would be zero."""
    assert [step.step for step in path(trajectory(), rewind=0.99).steps()] == [5]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_constants_of_adam(name):
    step = path(trajectory(name)).steps()[3]
    root = torch.tensor(math.sqrt((9 * 2 + 36) / 3) + 1e-3)  # the corrected second moment at step 4, between 3 and 6
    rates = torch.tensor([0.4, 0.4, 0.8])
    torch.testing.assert_close(step.precondition, rates / (1 - 0.9**4) / root)
    assert (step.gradient_scale, step.momentum, step.gain) == pytest.approx((0.25, 0.9, 0.1))
    decay = torch.tensor([0.1, 0.1, 0.0])
    coupled, decoupled = (decay, 0 * decay) if name == "adam" else (0 * decay, rates * decay)
    torch.testing.assert_close(step.coupled_decay.expand(3), coupled)
    torch.testing.assert_close(step.decoupled_decay.expand(3), decoupled)
    assert step.nearest_state == 3


def test_constants_of_sgd():
    steps = path(trajectory("sgd", dampening=0.3)).steps()
    close(steps[3].precondition, [0.4, 0.4, 0.8])
    close(steps[3].coupled_decay, [0.1, 0.1, 0.0])
    assert not steps[3].decoupled_decay.any()
    assert (steps[3].momentum, steps[3].gain, steps[3].gradient_scale) == pytest.approx((0.8, 0.7, 0.25))
    assert steps[0].gain == 1.0  # torch's first buffer is the gradient itself
    assert path(trajectory("sgd", dampening=0.3, metadata={"updates_before": 5})).steps()[0].gain == pytest.approx(0.7)
    nesterov = path(trajectory("sgd", nesterov=True)).steps()[1]
    shares = (nesterov.momentum_share, nesterov.gradient_share, nesterov.gain)
    assert shares == pytest.approx((0.8 * 0.8, 1 + 0.8, 1.0))


def test_strides_add_learning_rates_and_weigh_clipping_by_them():
    step = path(trajectory("sgd"), stride=4).steps()[0]
    close(step.precondition, [1.0, 1.0, 2.0])
    assert step.gradient_scale == pytest.approx((0.1 + 0.2 * 0.5 + 0.3 + 0.4 * 0.25) / 1.0)
    assert step.nearest_state == 3
    step = path(trajectory("adamw"), stride=4).steps()[1]
    corrected = 0.5 / (1 - 0.9**5) + 0.6 / (1 - 0.9**6)
    expected = torch.tensor([1.0, 1.0, 2.0]) * corrected / (math.sqrt((9 * 0.5 + 36 * 2.5) / 3) + 1e-3)
    torch.testing.assert_close(step.precondition, expected)


@pytest.mark.parametrize(
    "settings_", [("sgd", {"dampening": 0.3}), ("sgd", {"nesterov": True}), ("sgd", {"momentum": 0.0}), ("adamw", {})]
)
def test_a_stride_does_what_its_steps_do_to_a_constant_gradient(settings_):
    """Without decay, clipping and changes of the second moments, which a stride takes for constant."""
    name, constants = settings_
    generator = torch.Generator().manual_seed(0)
    deviation, momentum, gradient = torch.randn(3, 2, 3, generator=generator)
    run = trajectory(name, skipped=(3,), states=(0, 6), **{"weight_decay": 0.0, **constants})
    run.steps.clip_factor[:] = 1.0
    (whole,) = path(run, stride=NUM_STEPS).steps()
    expected = deviation, momentum
    for step in path(run).steps():
        step = dataclasses.replace(step, gradient_scale=float(step.gradient_scale > 0))
        expected = deviation_step(step, *expected, gradient)
    got = deviation_step(whole, deviation, momentum, gradient)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_skipped_step_changes_nothing(name):
    step = path(trajectory(name, skipped=(0, 2))).steps()[2]
    deviation, momentum, gradient = torch.randn(3, 2, 3)
    after = deviation_step(step, deviation, momentum, gradient)
    assert torch.equal(after[0], deviation)
    assert torch.equal(after[1], momentum)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_skipped_first_steps_stay_finite(name):
    """A loss scaler skips the very first updates, when Adam's bias correction is still zero."""
    for step in path(trajectory(name, skipped=(0, 1), states=(0, 1, 3, 6)), stride=1).steps():
        assert torch.isfinite(step.precondition).all()
        assert math.isfinite(step.gradient_scale)


def test_groups_may_have_their_own_second_beta_and_eps():
    recorded = trajectory()
    first, second = recorded.optimizer.groups
    second = dataclasses.replace(second, betas=(0.9, 0.9), eps=0.5)
    recorded.optimizer = OptimizerRule("adamw", (first, second))
    path = RecordedPath(recorded, SPACE, torch.device("cpu"), rewind=0.0, stride=1)
    of_second = 3 * math.sqrt((1 - 0.99**3) / (1 - 0.9**3))
    expected = torch.tensor([1 / 3.001, 1 / 3.001, 1 / (of_second + 0.5)])
    torch.testing.assert_close(path.inverse_root_moment(3), expected)
    recorded.optimizer = OptimizerRule("adamw", (first, dataclasses.replace(second, betas=(0.8, 0.9))))
    with pytest.raises(NotImplementedError, match="Parameter groups with different .first beta"):
        RecordedPath(recorded, SPACE, torch.device("cpu"), rewind=0.0, stride=1)


def test_a_state_before_the_first_update_lends_no_second_moment():
    with_it, without = (path(trajectory(skipped=(0, 1), states=states)) for states in ((0, 1, 3, 6), (0, 3, 6)))
    for ours, expected in zip(with_it.steps(), without.steps(), strict=True):
        assert torch.equal(ours.precondition, expected.precondition)


def test_skipped_steps_inside_a_stride_do_not_count():
    step = path(trajectory("sgd", skipped=(1,)), stride=3).steps()[0]
    close(step.precondition, [0.4, 0.4, 0.8])
    assert step.gradient_scale == pytest.approx(1.0)


def test_a_step_with_learning_rate_zero_still_feeds_the_momentum():
    """The first step of a warm-up."""
    step = path(trajectory("adamw", rates=[[0.0, 0.0], *RATES[1:]])).steps()[0]
    assert not step.precondition.any()
    _, momentum = deviation_step(step, torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1, 3))
    close(momentum, [[0.1] * 3])


def test_groups_with_different_momentum_are_refused():
    run = trajectory("sgd")
    groups = (run.optimizer.groups[0], ParameterGroup(("b",), momentum=0.5))
    run.optimizer = OptimizerRule("sgd", groups)
    with pytest.raises(NotImplementedError, match="momentum.*0.8.*0.5"):
        path(run)


@st.composite
def linear_steps(draw):
    number = st.floats(0.0, 1.0)
    vector = st.lists(number, min_size=3, max_size=3).map(lambda v: torch.tensor(v, dtype=torch.float64))
    return LinearStep(
        step=0,
        nearest_state=0,
        precondition=draw(vector),
        gradient_scale=draw(number),
        momentum=draw(number),
        gain=draw(number),
        momentum_share=draw(number),
        gradient_share=draw(number),
        coupled_decay=draw(vector),
        decoupled_decay=draw(vector),
    )


@pytest.mark.parametrize("rewind", [0.0, 0.5])
def test_segments_cover_the_path_and_belong_to_the_nearest_state(rewind):
    run = path(trajectory(), rewind=rewind)
    segments = run.segments()
    assert [step for _, first, last in segments for step in range(first, last)] == list(range(run.start, NUM_STEPS))
    assert all(run.nearest_state(step) == state for state, first, last in segments for step in range(first, last))
    assert len({state for state, *_ in segments}) == len(segments)
