from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_rgm.attribution.adjoint import AdjointEngine
from hf_rgm.attribution.attributor import Attributor
from hf_rgm.engines.objectives import OBJECTIVES
from hf_rgm.exceptions import DivergenceError
from hf_rgm.rows import RowReader
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.recorded import engine_parts, record

RUN = tiny_recorded_run()


def engine(**settings):
    a = Attributor(RUN.model, tiny_synset(), disable_tqdm=True)
    adjoint = AdjointEngine(a.model, a.inputs, a.samples, RUN.trajectory, **settings)
    gradients = torch.randn(3, a.model.num_parameters, generator=torch.Generator().manual_seed(0))
    return adjoint, gradients, RowReader(RUN.train_dataset, a.model)


def test_row_scores_are_directions_times_row_gradients():
    adjoint, gradients, reader = engine()
    directions = adjoint.directions(gradients)
    scores = adjoint.row_scores(directions, reader, range(48))
    for row in (0, 17, 47):
        inputs, labels = reader.batch([row])
        expected = torch.zeros(3)
        for step, direction in directions.items():
            parameters = RUN.trajectory.state(step).parameters
            gradient = torch.func.grad(lambda p: cross_entropy(adjoint.model.logits(p, inputs), labels))(parameters)  # noqa: B023
            expected += direction @ adjoint.model.space.flatten(gradient) / 48
        torch.testing.assert_close(scores[:, row], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("max_bytes", [1, 20_000])
def test_memory_limits_do_not_change_the_scores(max_bytes):
    plain, gradients, reader = engine()
    tight = engine(max_bytes=max_bytes)[0]
    assert tight.rows_at_once < plain.rows_at_once and tight.queries_at_once < plain.queries_at_once
    directions, some = plain.directions(gradients), range(5, 31)
    torch.testing.assert_close(tight.row_scores(directions, reader, some), plain.row_scores(directions, reader, some))
    torch.testing.assert_close(tight.cluster_scores(gradients), plain.cluster_scores(gradients), atol=1e-5, rtol=1e-3)


def test_scores_are_linear_in_the_objective():
    adjoint, gradients, _ = engine()
    mixed = torch.stack([gradients[0] + 2 * gradients[1], 0 * gradients[0]])
    scores = adjoint.cluster_scores(gradients)
    torch.testing.assert_close(
        adjoint.cluster_scores(mixed), torch.stack([scores[0] + 2 * scores[1], 0 * scores[0]]), atol=1e-5, rtol=1e-3
    )


def test_growing_sensitivities_raise_instead_of_returning_scores():
    run = record("sgd", learning_rate=0.5)
    model, inputs, samples = engine_parts(run, rows_per_cluster=3)
    samples = dataclasses.replace(samples, log_weights=samples.log_weights + 6)
    adjoint = AdjointEngine(model, inputs, samples, run.trajectory, rewind=0)
    with pytest.raises(DivergenceError, match="diverged at training step .* stride of 1.*later `rewind`"):
        adjoint.cluster_scores(torch.ones(1, model.num_parameters))


def test_nan_gradients_raise():
    adjoint, gradients, _ = engine()
    gradients[1, 0] = float("nan")
    with pytest.raises(DivergenceError, match="objective value 1"):
        adjoint.cluster_scores(gradients)


def test_default_stride_bounds_the_number_of_integration_steps(monkeypatch):
    monkeypatch.setattr("hf_rgm.trajectory.path.MAX_INTEGRATION_STEPS", 10)
    adjoint = engine()[0]
    assert adjoint.path.stride == 5
    assert len(adjoint.path.steps()) <= 10


def test_larger_strides_approximate_small_ones():
    (fine, gradients, _), coarse = engine(), engine(stride=2)[0]
    scores = torch.stack([fine.cluster_scores(gradients).flatten(), coarse.cluster_scores(gradients).flatten()])
    assert torch.corrcoef(scores)[0, 1] > 0.9


def test_margin_gradients_of_a_saturated_query_give_zero_scores():
    adjoint, gradients, _ = engine()
    assert not adjoint.cluster_scores(0 * gradients).any()
    assert OBJECTIVES["margin"].differentiable
