"""The adjoint is the derivative of retraining, and the transpose of the linear engine."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_rgm import Attributor
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.anchored_replay import AnchoredReplayEngine
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.row_scores import row_scores
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.engines.parts import row_run, sample_run
from tests.recorded import TinyNet, record

RUN = tiny_recorded_run()
OPTIMIZERS = ["sgd", "nesterov", "adam", "adamw"]


def tiny(**settings):
    attributor = Attributor(RUN.model, tiny_synset(), rows=RUN.train_dataset, disable_tqdm=True, **settings)
    run = attributor._runs(None, None)[0]
    gradients = torch.randn(3, run.model.num_parameters, generator=torch.Generator().manual_seed(0))
    return AdjointEngine(run), gradients


@pytest.mark.parametrize("make", [sample_run, row_run], ids=["samples", "rows"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_derivative_of_retraining(optimizer, make):
    """For a linear model the Gauss-Newton matrix is the Hessian, so nothing is approximated."""
    run = record(optimizer)
    recorded = make(run, 1)
    objective = torch.randn(3, recorded.model.num_parameters, generator=torch.Generator().manual_seed(1))
    scores = AdjointEngine(recorded).cluster_scores(objective, 0.0)
    frozen = optimizer in ("adam", "adamw")
    derivative = torch.autograd.functional.jacobian(
        lambda weights: objective.double() @ run.train(weights, frozen_second_moments=frozen),
        torch.ones(len(run.labels), dtype=torch.float64),
    )
    torch.testing.assert_close(scores, derivative.float(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_derivative_of_the_linear_engine(optimizer):
    recorded = sample_run(record(optimizer, model_class=TinyNet))
    objective = torch.randn(2, recorded.model.num_parameters, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    up, down = (LinearEngine(recorded).replay(1 + sign * step * torch.eye(4), 0.0) for sign in (1, -1))
    difference = ((up - down) @ objective.T / (2 * step)).T
    scores = AdjointEngine(recorded).cluster_scores(objective, 0.0)
    torch.testing.assert_close(scores, difference, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_predicts_small_changes_of_anchored_replay(optimizer):
    recorded = sample_run(record(optimizer))
    replay = AnchoredReplayEngine(recorded)
    objective = torch.randn(2, recorded.model.num_parameters, generator=torch.Generator().manual_seed(1))
    step = 1e-3
    masks = torch.cat([1 + step * torch.eye(4), 1 - step * torch.eye(4)])
    up, down = (replay.replay(masks, 0.0) @ objective.T).chunk(2)
    difference = ((up - down) / (2 * step)).T
    scores = AdjointEngine(recorded).cluster_scores(objective, 0.0)
    torch.testing.assert_close(scores, difference, atol=1e-3, rtol=5e-3)


def test_presence_that_helps_is_positive():
    """Rows of a label raise the probability of that label on themselves."""
    run = record("adamw", num_steps=40)
    recorded = sample_run(run, 1)
    model = recorded.model

    def log_probability(p):
        return model.logits(p, {"features": run.features.float()}).log_softmax(-1)[torch.arange(12), run.labels]

    gradients = model.space.flatten(torch.func.jacrev(log_probability)(model.parameters()))
    own = AdjointEngine(recorded).cluster_scores(gradients, 0.0).diagonal()
    assert (own > 0).all()


def test_row_scores_are_directions_times_row_gradients():
    engine, gradients = tiny()
    directions = engine.directions(gradients, 0.14)
    scores = row_scores(engine, directions, engine.run.rows, range(48))
    assert len(directions) == 5
    for row in (0, 17, 47):
        inputs, labels = engine.run.rows.reader.batch([row])
        expected = torch.zeros(3)
        for step, direction in directions.items():
            parameters = RUN.trajectory.state(step).parameters
            gradient = torch.func.grad(lambda p: cross_entropy(engine.run.model.logits(p, inputs), labels))(parameters)  # noqa: B023
            expected += direction @ engine.run.model.space.flatten(gradient) / 48
        torch.testing.assert_close(scores[:, row], expected, atol=1e-6, rtol=1e-3)


def test_memory_limits_do_not_change_the_scores():
    """40 KB hold 20 rows of curvature and no kept gradients: fewer rows, clusters and queries go at a time."""
    plain, gradients = tiny()
    directions = plain.directions(gradients, 0.14)
    tight = tiny(max_memory="70KB")[0]
    assert tight.queries_at_once < plain.queries_at_once
    expected = row_scores(plain, directions, plain.run.rows, range(5, 31))
    torch.testing.assert_close(row_scores(tight, directions, tight.run.rows, range(5, 31)), expected)


def test_scores_are_linear_in_the_objective():
    engine, gradients = tiny()
    mixed = torch.stack([gradients[0] + 2 * gradients[1], 0 * gradients[0]])
    scores = engine.cluster_scores(gradients, 0.14)
    expected = torch.stack([scores[0] + 2 * scores[1], 0 * scores[0]])
    torch.testing.assert_close(engine.cluster_scores(mixed, 0.14), expected, atol=1e-5, rtol=1e-3)


def test_gradients_that_are_no_numbers_are_named():
    engine, gradients = tiny()
    gradients[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"gradient of objective values \[1\] is NaN or infinite"):
        engine.cluster_scores(gradients, 0.14)
