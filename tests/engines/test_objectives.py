from __future__ import annotations

import pytest
import torch
from torch.func import jacrev

from hf_rgm.engines.objectives import OBJECTIVES, Objective, Queries, log_odds_margin, resolve_objective
from hf_rgm.model.functional_model import FunctionalModel
from tests.recorded import TinyNet
from tests.vision import vit


def setup(model=None, count=4):
    functional = FunctionalModel(model or TinyNet())
    shape = (5,) if model is None else (1, 4, 4)
    inputs = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    queries = Queries({functional.main_input_name: inputs}, torch.arange(count) % 3)
    return functional, functional.space.flatten(functional.parameters()), queries


def test_margin_is_the_log_odds():
    logits, labels = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_odds_margin(logits, labels), torch.log(p / (1 - p)))


def test_margin_is_finite_where_probabilities_saturate():
    logits = torch.tensor([[200.0, 0.0, -1.0]])
    assert log_odds_margin(logits, torch.tensor([0])).item() == pytest.approx(
        200 - torch.tensor([0.0, -1.0]).logsumexp(0)
    )


def test_values_of_the_named_objectives():
    model, parameters, queries = setup()
    logits = model.logits(model.parameters(), queries.inputs)
    chosen = logits.log_softmax(-1)[torch.arange(4), queries.labels]
    values = {name: objective.values(model, parameters, queries) for name, objective in OBJECTIVES.items()}
    torch.testing.assert_close(values["log_probability"], chosen)
    torch.testing.assert_close(values["loss"], -chosen)
    torch.testing.assert_close(values["mean_loss"], -chosen.mean().reshape(1))
    assert values["accuracy"].tolist() == [(logits.argmax(-1) == queries.labels).float().mean()]
    assert not any(value.requires_grad for value in values.values())


@pytest.mark.parametrize("name", ["margin", "loss", "log_probability"])
@pytest.mark.parametrize("model", [None, vit(initializer_range=0.3)], ids=["perceptron", "vit"])
def test_gradients_query_by_query_equal_the_generic_ones(name, model):
    functional, parameters, queries = setup(model)
    objective = OBJECTIVES[name]
    generic = Objective(name, objective.function, per_query=False)
    with functional.differentiable():
        fast = objective.gradients(functional, parameters, queries)
        slow = generic.gradients(functional, parameters, queries)

        def values(vector):
            logits = functional.logits(functional.space.unflatten(vector), queries.inputs)
            return objective.function(lambda _: logits, queries)

        oracle = jacrev(values)(parameters)
    torch.testing.assert_close(fast, oracle, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(slow, oracle, atol=1e-5, rtol=1e-4)


def test_a_user_function_of_a_set():
    model, parameters, queries = setup()
    gap = Objective("gap", lambda forward, q: (forward(q.inputs)[:2].mean() - forward(q.inputs)[2:].mean()).reshape(1))
    step = 1e-2
    gradient = gap.gradients(model, parameters, queries)
    assert gradient.shape == (1, model.num_parameters)
    direction = gradient[0] / gradient.norm()
    up, down = (gap.values(model, parameters + sign * step * direction, queries) for sign in (1, -1))
    torch.testing.assert_close((up - down) / (2 * step), gradient @ direction, atol=1e-3, rtol=1e-3)


def test_an_objective_that_is_not_differentiable_says_so():
    with pytest.raises(ValueError, match="'accuracy' is not differentiable.*engine=\"replay\""):
        OBJECTIVES["accuracy"].gradients(*setup())


@pytest.mark.parametrize(
    ("function", "got"),
    [(lambda f, q: f(q.inputs).sum(), r"\(\)"), (lambda f, q: f(q.inputs), r"\(4, 3\)"), (lambda f, q: 1.0, "float")],
)
def test_values_of_another_shape_are_refused(function, got):
    objective = Objective("odd", function)
    for compute in (objective.values, objective.gradients):
        with pytest.raises(ValueError, match=f"'odd' must return a tensor of shape .num_values,., got {got}"):
            compute(*setup())


@pytest.mark.parametrize("label", [-1, 3])
def test_query_labels_out_of_range_are_refused(label):
    model, parameters, queries = setup()
    queries.labels[2] = label
    for objective in OBJECTIVES.values():
        with pytest.raises(ValueError, match=f"Label {label} is out of range"):
            objective.values(model, parameters, queries)


def test_names_are_resolved():
    own = Objective("margin", lambda forward, queries: forward(queries.inputs)[:, 0])
    assert resolve_objective(own) is own
    assert resolve_objective("loss").name == "loss"
    with pytest.raises(ValueError, match="Unknown objective 'f1'. Use one of margin, loss"):
        resolve_objective("f1")
