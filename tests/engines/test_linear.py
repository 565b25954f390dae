"""The linear engine against the recursion of its definition, in float64 with dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_rgm import Attributor
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.drift import DriftMeter
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.segments import Segment
from hf_rgm.exceptions import DivergenceError
from hf_rgm.testing import tiny_recorded_run
from tests.engines.parts import (
    FLOAT_TOLERANCE,
    MASKS,
    ROWS_PER_CLUSTER,
    flat,
    retrained,
    row_run,
    row_source,
    sample_run,
)
from tests.recorded import Linear, TinyNet, record

OPTIMIZERS = ["sgd", "nesterov", "adam", "adamw"]


@pytest.fixture
def no_cap(monkeypatch):
    """Adam's unwarmed second moments make first steps that the engine would cap under weights of 2."""
    monkeypatch.setattr(Segment, "stable_curvature", float("inf"))


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


@pytest.mark.parametrize("make", [sample_run, row_run], ids=["samples", "rows"])
@pytest.mark.parametrize("model_class", [Linear, TinyNet])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_is_the_recursion_of_its_definition(optimizer, model_class, make, no_cap):
    run = record(optimizer, model_class=model_class)
    expected = torch.stack([dense_replay(run, mask) for mask in MASKS]).float()
    found = LinearEngine(make(run)).parameters(MASKS, 0.0).values
    torch.testing.assert_close(found, expected, atol=FLOAT_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_everything_present_is_the_trained_model_exactly(optimizer):
    engine = LinearEngine(sample_run(record(optimizer, model_class=TinyNet)))
    assert torch.equal(engine.parameters(torch.ones(2, 4), 0.0).values, engine.run.final.expand(2, -1))


@pytest.mark.parametrize("max_bytes", [2**30, 40_000])
def test_masks_are_replayed_independently(max_bytes):
    run = record("adamw", model_class=TinyNet)
    engine = LinearEngine(sample_run(run, max_bytes=max_bytes))
    apart = torch.cat([engine.replay(mask[None], 0.0) for mask in MASKS[:2]])
    torch.testing.assert_close(engine.replay(MASKS[:2], 0.0), apart, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_leaving_a_cluster_out_is_nearer_to_retraining_than_the_derivative(seed):
    """A quarter of the rows is no small change; the absent rows' curvature goes with them."""
    run = record("sgd", num_steps=60, learning_rate=0.3, seed=seed)
    recorded = sample_run(run)
    masks = 1 - torch.eye(4)
    expected = retrained(run, masks)
    derivative = recorded.final - AdjointEngine(recorded).cluster_scores(torch.eye(18), 0.0).T
    linearized_error = (LinearEngine(recorded).parameters(masks, 0.0).values - expected).norm()
    assert linearized_error < 0.8 * (derivative - expected).norm()


def test_rows_take_the_place_of_samples():
    """Gradients and curvature of the rows, though the synset's samples would say otherwise."""
    run = record("sgd")
    weak, both = sample_run(run), sample_run(run)
    for own in (weak, both):
        own.samples.samples.log_weights = own.samples.samples.log_weights - 3
    both.rows = row_source(run, both.model)
    expected = LinearEngine(sample_run(run)).replay(MASKS, 0.0)
    torch.testing.assert_close(LinearEngine(both).replay(MASKS, 0.0), expected, atol=1e-5, rtol=1e-4)
    assert (LinearEngine(weak).replay(MASKS, 0.0) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("with_rows", [False, True])
def test_little_memory_gives_the_same_models(with_rows):
    """With little memory gradients and curvature are taken anew where they are needed."""
    run = record("adamw", model_class=TinyNet)
    make = row_run if with_rows else sample_run
    plenty = make(run)
    expected = LinearEngine(plenty).replay(MASKS[:2], 0.0)
    assert len(plenty._maps) == 20
    row_bytes = 4 * plenty.model.num_parameters
    tight = make(run, max_bytes=2 * 40 * row_bytes * 16 // (8 if with_rows else 10))
    assert tight.rank == 40  # of 36 terms
    torch.testing.assert_close(LinearEngine(tight).replay(MASKS[:2], 0.0), expected, atol=1e-6, rtol=1e-5)
    assert not tight._maps


def test_a_later_rewind_begins_later():
    """The end of the path alone: the same as the recursion from there, so another answer than from the beginning."""
    engine = LinearEngine(sample_run(record("sgd")))
    early, late = (engine.replay(MASKS, rewind) for rewind in (0.0, 0.95))
    gradients = engine.gradients(0.95)(19, range(4))
    expected = -engine.run.trajectory.steps.learning_rates[19, 0] * (MASKS - 1) @ gradients
    torch.testing.assert_close(late, expected.float(), atol=1e-7, rtol=1e-4)
    assert early.norm() > 2 * late.norm()


def test_what_is_not_finite_is_an_error():
    recorded = sample_run(record("sgd"))
    recorded.samples.samples.inputs = recorded.samples.samples.inputs.clone()
    recorded.samples.samples.inputs[0] = float("nan")
    with pytest.raises(DivergenceError, match="outputs at a recorded state are NaN or infinite"):
        LinearEngine(recorded).replay(MASKS, 0.0)


def test_flat_is_the_recorded_state():
    recorded = sample_run(record("sgd"))
    assert torch.equal(flat(recorded, 20), recorded.final)


HALVES = torch.tensor([[0.0, 0, 2, 2, 1, 1], [1, 1, 0, 0, 0, 1]])
"""Of the tiny recorded run's clusters."""


def test_effects_of_single_clusters_are_added_up_where_even_these_drift(monkeypatch):
    run = tiny_recorded_run()

    def asked(rewind=None):
        known = {"trajectory": run.trajectory, "rows": run.train_dataset, "clusters": run.clusters}
        attributor = Attributor(run.model, **known, disable_tqdm=True)
        return attributor.replayed_values(run.queries, HALVES, rewind=rewind)

    attributor = Attributor(
        run.model, trajectory=run.trajectory, rows=run.train_dataset, clusters=run.clusters, disable_tqdm=True
    )
    own = attributor.replayed_values(run.queries, torch.ones(1, 6))
    replayed = attributor.replayed_values(run.queries, HALVES)
    scores = attributor.attribute(run.queries).scores
    added = own + (HALVES.numpy() - 1) @ scores.T
    assert not np.allclose(replayed, added, rtol=0.05, atol=0.05)
    drifts = iter([1.0] * 6)  # of models without single clusters, from wherever they begin
    monkeypatch.setattr(DriftMeter, "drifts", lambda self, models, masks: torch.full((len(masks),), next(drifts)))
    np.testing.assert_allclose(asked(), added, rtol=1e-4, atol=1e-4)
    drifts = iter([1.0, *[0.0] * 100])  # from the default only: single clusters are replayed from later on
    np.testing.assert_allclose(
        asked(), own + (HALVES.numpy() - 1) @ attributor.attribute(run.queries, rewind=0.4).scores.T, atol=1e-4
    )
    drifts = iter([1.0, *[0.0] * 100])
    # a rewind point that is asked for is taken
    np.testing.assert_allclose(asked(rewind=0.14), replayed, rtol=1e-4, atol=1e-4)
    drifts = iter([0.0, 1.0, *[0.0] * 100])  # of the halves alone: they begin later
    later = asked()
    assert not np.allclose(later, replayed, rtol=0.01) and not np.allclose(later, added, rtol=0.01)
