from __future__ import annotations

import pytest
import torch

from hf_rgm.engines.objectives import OBJECTIVES, Queries
from hf_rgm.engines.request import Evaluation, Request
from tests.engines.parts import sample_run
from tests.recorded import TinyNet, record


def evaluation(objective):
    run = record("sgd", model_class=TinyNet)
    queries = Queries({"features": run.features.float()[:5]}, run.labels[:5])
    return Evaluation(sample_run(run), Request(OBJECTIVES[objective], queries))


@pytest.mark.parametrize("objective", ["margin", "loss", "mean_loss"])
def test_to_first_order_it_is_the_derivative_along_the_deviation(objective):
    found = evaluation(objective)
    deviations = torch.randn(3, found.run.model.num_parameters, generator=torch.Generator().manual_seed(0))
    step = 1e-3
    up, down = (found.of_models(found.run.final + sign * step * deviations) for sign in (1, -1))
    expected = found.values + (up - down) / (2 * step)
    torch.testing.assert_close(found.to_first_order(deviations, found.run.form), expected, atol=5e-3, rtol=5e-3)
    assert torch.equal(found.to_first_order(0 * deviations, found.run.form), found.values.expand(3, -1))


def test_an_objective_without_gradient_is_that_of_the_models():
    found = evaluation("accuracy")
    deviations = torch.randn(3, found.run.model.num_parameters, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.to_first_order(deviations, found.run.form), found.of_models(found.run.final + deviations))


def test_values_and_gradients_are_computed_once(monkeypatch):
    found = evaluation("margin")
    assert found.values is found.values and found.gradients(found.run.form) is found.gradients(found.run.form)
    monkeypatch.setattr(type(found), "at", lambda *_: pytest.fail("computed again"))
    found.to_first_order(torch.zeros(1, found.run.model.num_parameters), found.run.form)
