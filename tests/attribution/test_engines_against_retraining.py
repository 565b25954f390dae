"""With the real rows as synset and every state recorded, the engines must equal retraining and its derivative."""

from __future__ import annotations

import pytest
import torch

from hf_rgm.attribution.adjoint import AdjointEngine
from hf_rgm.attribution.replay import ReplayEngine
from tests.recorded import Linear, TinyNet, engine_parts, record

OPTIMIZERS = ["sgd", "nesterov", "adam", "adamw"]
FLOAT_TOLERANCE = 2e-5
"""Float32 rounding over twenty steps, against float64."""

ROWS_PER_CLUSTER = 3


def cluster_weights(run, mask):
    return mask.repeat_interleave(ROWS_PER_CLUSTER).double()


def replay_engine(run, **settings):
    model, inputs, samples = engine_parts(run, ROWS_PER_CLUSTER)
    return ReplayEngine(model, inputs, samples, run.trajectory, rewind=0, disable_tqdm=True, **settings)


@pytest.mark.parametrize("model_class", [Linear, TinyNet])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_anchored_replay_of_everything_is_the_trained_model_exactly(optimizer, model_class):
    run = record(optimizer, model_class=model_class)
    engine = replay_engine(run)
    final = engine.model.space.flatten(run.trajectory.final.parameters)
    assert torch.equal(engine.parameters(torch.ones(1, 4))[0], final)


@pytest.mark.parametrize("model_class", [Linear, TinyNet])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_plain_replay_is_retraining(optimizer, model_class):
    run = record(optimizer, model_class=model_class)
    masks = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0.5, 0, 1]])
    replayed = replay_engine(run, anchored=False).parameters(masks)
    retrained = torch.stack([run.train(cluster_weights(run, mask)) for mask in masks]).float()
    torch.testing.assert_close(replayed, retrained, atol=FLOAT_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("model_class", [Linear, TinyNet])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov"])
def test_anchored_replay_is_retraining_for_sgd(optimizer, model_class):
    run = record(optimizer, model_class=model_class)
    masks = torch.tensor([[0, 1, 1, 1], [1, 0.5, 0, 1]])
    replayed = replay_engine(run).parameters(masks)
    retrained = torch.stack([run.train(cluster_weights(run, mask)) for mask in masks]).float()
    torch.testing.assert_close(replayed, retrained, atol=FLOAT_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_anchored_replay_is_retraining_with_recorded_second_moments_for_adam(optimizer):
    run = record(optimizer, model_class=TinyNet)
    masks = torch.tensor([[0, 1, 1, 1], [1, 0.5, 0, 1]])
    replayed = replay_engine(run).parameters(masks)
    retrained = torch.stack(
        [run.train(cluster_weights(run, mask), frozen_second_moments=True) for mask in masks]
    ).float()
    torch.testing.assert_close(replayed, retrained, atol=FLOAT_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_adjoint_is_the_derivative_of_retraining(optimizer):
    """For a linear model the Gauss-Newton matrix is the Hessian, so nothing is approximated."""
    run = record(optimizer)
    model, inputs, samples = engine_parts(run, rows_per_cluster=1)
    engine = AdjointEngine(model, inputs, samples, run.trajectory, rewind=0)
    objective = torch.randn(3, model.num_parameters, generator=torch.Generator().manual_seed(1))
    frozen = optimizer in ("adam", "adamw")
    derivative = torch.autograd.functional.jacobian(
        lambda weights: objective.double() @ run.train(weights, frozen_second_moments=frozen),
        torch.ones(len(run.labels), dtype=torch.float64),
    )
    torch.testing.assert_close(engine.cluster_scores(objective), derivative.float(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_adjoint_predicts_small_changes_of_anchored_replay(optimizer):
    run = record(optimizer)
    replay = replay_engine(run)
    adjoint = AdjointEngine(replay.model, replay.inputs, replay.samples, run.trajectory, rewind=0)
    objective = torch.randn(2, replay.model.num_parameters, generator=torch.Generator().manual_seed(1))
    step = 1e-3
    masks = torch.cat([1 + step * torch.eye(4), 1 - step * torch.eye(4)])
    up, down = (replay.parameters(masks) @ objective.T).chunk(2)
    difference = ((up - down) / (2 * step)).T
    torch.testing.assert_close(adjoint.cluster_scores(objective), difference, atol=1e-3, rtol=5e-3)


def test_presence_that_helps_is_positive():
    """Rows of a label raise the probability of that label on themselves."""
    run = record("adamw", num_steps=40)
    model, inputs, samples = engine_parts(run, rows_per_cluster=1)
    engine = AdjointEngine(model, inputs, samples, run.trajectory, rewind=0)
    parameters = model.parameters()

    def log_probability(p):
        return model.logits(p, {"features": run.features.float()}).log_softmax(-1)[torch.arange(12), run.labels]

    gradients = model.space.flatten(torch.func.jacrev(log_probability)(parameters))
    own = engine.cluster_scores(gradients).diagonal()
    assert (own > 0).all()
