from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_rgm.attribution.adjoint import AdjointEngine
from hf_rgm.attribution.attributor import Attributor
from hf_rgm.attribution.linearized import LinearizedReplayEngine
from hf_rgm.exceptions import DivergenceError
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.recorded import Linear, TinyNet, engine_parts, record

ROWS_PER_CLUSTER = 3
FLOAT_TOLERANCE = 2e-5
"""Float32 rounding over twenty steps, against float64."""
MASKS = torch.tensor([[0, 1, 1, 1], [1, 0.5, 0, 1], [2, 0, 1, 1.5]])


def engine(run, **settings):
    model, inputs, samples = engine_parts(run, ROWS_PER_CLUSTER)
    return LinearizedReplayEngine(
        model, inputs, samples, run.trajectory, **{"rewind": 0, "disable_tqdm": True, **settings}
    )


def dense_replay(run, mask):
    """The same recursion in float64 with dense matrices, one mask, straight from the definition."""
    model = run.model.double()
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for _, parameter in model.named_parameters()]
    rule = run.rule.groups[0]
    adaptive = run.rule.name in ("adam", "adamw")
    flat = lambda values: torch.cat([values[name].double().flatten() for name in names])  # noqa: E731

    def logits(vector):
        pieces = vector.split([shape.numel() for shape in shapes])
        parameters = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
        return torch.func.functional_call(model, parameters, (run.features,))

    def losses(vector):
        return torch.nn.functional.cross_entropy(logits(vector), run.labels, reduction="none") / len(run.labels)

    weights = mask.double().repeat_interleave(ROWS_PER_CLUSTER)
    deviation = torch.zeros(sum(shape.numel() for shape in shapes), dtype=torch.float64)
    momentum = torch.zeros_like(deviation)
    for step, learning_rate in enumerate(run.learning_rates):
        theta = flat(run.trajectory.state(step).parameters)
        jacobian = torch.func.jacrev(logits)(theta)
        p = logits(theta).softmax(-1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        curvature = torch.einsum("r,rcp,rcd,rdq->pq", weights / len(weights), jacobian, middle, jacobian)
        change = (weights - 1) @ torch.func.jacrev(losses)(theta) + curvature @ deviation
        decay = 0.0 if run.rule.name == "adamw" else rule.weight_decay
        change = change + decay * deviation
        if adaptive:
            second = flat(run.trajectory.state(step + 1).moments["exp_avg_sq"]) / (1 - rule.betas[1] ** (step + 1))
            momentum = rule.betas[0] * momentum + (1 - rule.betas[0]) * change
            direction = momentum / (1 - rule.betas[0] ** (step + 1)) / (second.sqrt() + rule.eps)
        else:
            momentum = change if step == 0 else rule.momentum * momentum + change
            direction = change + rule.momentum * momentum if rule.nesterov else momentum
        if run.rule.name == "adamw":
            deviation = (1 - learning_rate * rule.weight_decay) * deviation
        deviation = deviation - learning_rate * direction
    return flat(run.trajectory.final.parameters) + deviation


@pytest.mark.parametrize("max_bytes", [2**30, 1], ids=["explicit Jacobian", "jvp and vjp"])
@pytest.mark.parametrize("model_class", [Linear, TinyNet])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
def test_is_the_recursion_of_its_definition(optimizer, model_class, max_bytes, monkeypatch):
    """Adam's unwarmed second moments make the first of these deviations larger than the engine would let pass."""
    monkeypatch.setattr("hf_rgm.attribution.linearized.MAX_DEVIATION", float("inf"))
    run = record(optimizer, model_class=model_class)
    expected = torch.stack([dense_replay(run, mask) for mask in MASKS]).float()
    replayed = engine(run, max_bytes=max_bytes)
    torch.testing.assert_close(replayed.parameters(MASKS), expected, atol=FLOAT_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_everything_present_is_the_trained_model_exactly(optimizer):
    replayed = engine(record(optimizer))
    final = replayed.model.space.flatten(replayed.path.trajectory.final.parameters)
    assert torch.equal(replayed.parameters(torch.ones(2, 4)), final.expand(2, -1))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_its_derivative_is_the_adjoint(optimizer):
    run = record(optimizer, model_class=TinyNet)
    replayed = engine(run)
    adjoint = AdjointEngine(replayed.model, replayed.inputs, replayed.samples, run.trajectory, rewind=0)
    objective = torch.randn(2, replayed.model.num_parameters, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    up, down = (replayed.parameters(1 + sign * step * torch.eye(4)) @ objective.T for sign in (1, -1))
    torch.testing.assert_close(adjoint.cluster_scores(objective), ((up - down) / (2 * step)).T, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("seed", range(3))
def test_leaving_a_cluster_out_is_nearer_to_retraining_than_the_derivative(seed):
    """A quarter of the rows is no small change; the absent rows' curvature goes with them."""
    run = record("sgd", num_steps=60, learning_rate=0.3, seed=seed)
    replayed = engine(run)
    final = replayed.model.space.flatten(run.trajectory.final.parameters)
    masks = 1 - torch.eye(4)
    retrained = torch.stack([run.train(mask.repeat_interleave(ROWS_PER_CLUSTER).double()) for mask in masks]).float()
    adjoint = AdjointEngine(replayed.model, replayed.inputs, replayed.samples, run.trajectory, rewind=0)
    derivative = final - adjoint.cluster_scores(torch.eye(replayed.model.num_parameters)).T
    linearized_error = (replayed.parameters(masks) - retrained).norm()
    assert linearized_error < 0.8 * (derivative - retrained).norm()


def test_takes_the_gradients_it_is_given():
    run = record("sgd")
    zero = engine(run, cluster_gradients=lambda step, clusters: torch.zeros(len(clusters), 18))
    final = zero.model.space.flatten(run.trajectory.final.parameters)
    assert torch.equal(zero.parameters(MASKS), final.expand(3, -1))


def test_rows_replace_the_gradients_of_the_synset():
    """A synset matches its clusters' gradients only so well; the rows' own are exact."""
    run, attributor = tiny_recorded_run(), Attributor(tiny_recorded_run().model, tiny_synset(), disable_tqdm=True)
    synset_only = attributor.attribute(run.queries)
    with_rows = attributor.attribute(run.queries, rows=run.train_dataset)
    assert synset_only.row_scores is None
    assert with_rows.row_scores.shape == (len(run.queries), len(run.train_dataset))
    assert not (synset_only.scores == with_rows.scores).all()
    assert np.corrcoef(synset_only.scores.ravel(), with_rows.scores.ravel())[0, 1] > 0.8


def test_halves_its_stride_where_the_deviation_explodes(caplog):
    run = record("sgd", num_steps=64, learning_rate=5.0)
    coarse = engine(run, stride=32)
    with caplog.at_level("INFO", logger="hf_rgm"):
        replayed = coarse.parameters(MASKS)
    assert "Trying again with a stride of 16" in caplog.text
    assert coarse.path.stride < 32
    torch.testing.assert_close(replayed, engine(run, stride=coarse.path.stride).parameters(MASKS))


def test_names_the_mask_that_diverges_one_step_at_a_time():
    replayed = engine(record("sgd"))
    replayed.samples.log_weights = replayed.samples.log_weights + 12
    with pytest.raises(DivergenceError, match=r"replay of mask \d diverged at training step \d+.*stride of 1\."):
        replayed.parameters(MASKS)


def test_wrong_masks_are_named():
    with pytest.raises(ValueError, match=r"Masks must be finite.*\(num_masks, 4\).*got shape \(1, 3\)"):
        engine(record("sgd")).parameters(torch.ones(1, 3))
