import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rgm.trajectory.optimizers import OptimizerRule, ParameterGroup, apply_update

SHAPES = {"a": (3, 2), "b": (4,), "c": ()}
RATES = [0.05, 0.01]
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"betas": (0.7, 0.9), "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"betas": (0.7, 0.9), "eps": 1e-3}),
    "adam_foreach": (torch.optim.Adam, {"foreach": True}),
    "adamw_fused": (torch.optim.AdamW, {"fused": True}),
}


class Module(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, torch.nn.Parameter(value))


def make_optimizer(kind, module, weight_decay=0.1):
    cls, constants = OPTIMIZERS[kind]
    groups = [
        {"params": [module.a], "weight_decay": weight_decay, "lr": RATES[0]},
        {"params": [module.b, module.c], "weight_decay": 0.0, "lr": RATES[1]},
    ]
    return cls(groups, **constants)


def run_both(kind, *, gradients, weight_decay=0.1):
    """The same gradients through torch and through our rule; yields both after every update."""
    module = Module()
    optimizer = make_optimizer(kind, module, weight_decay)
    rule = OptimizerRule.from_torch(optimizer, module.named_parameters())
    parameters = {name: p.detach().clone() for name, p in module.named_parameters()}
    moments = {}
    for step, gradient in enumerate(gradients, 1):
        for name, parameter in module.named_parameters():
            parameter.grad = gradient.get(name)
        optimizer.step()
        parameters, moments = apply_update(rule, parameters, gradient, moments, learning_rates=RATES, step=step)
        yield module, optimizer, parameters, moments


def random_gradients(num_steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        for _ in range(num_steps)
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_update_is_that_of_torch(kind):
    for module, optimizer, parameters, moments in run_both(kind, gradients=random_gradients(5)):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameters[name], parameter.data, rtol=1e-12, atol=1e-12)
            for moment, members in moments.items():
                torch.testing.assert_close(members[name], optimizer.state[parameter][moment], rtol=1e-12, atol=1e-12)
        assert moments.keys() == {key for key in optimizer.state[module.a] if key != "step"}


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    weight_decay=st.floats(0, 1),
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e3),
)
def test_update_is_that_of_torch_for_any_decay_and_scale(kind, weight_decay, seed, scale):
    gradients = [{name: g * scale for name, g in step.items()} for step in random_gradients(3, seed)]
    for module, _, parameters, _ in run_both(kind, gradients=gradients, weight_decay=weight_decay):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameters[name], parameter.data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["nesterov", "adam", "adamw"])
def test_parameter_without_gradient_is_left_alone_as_in_torch(kind):
    gradients = random_gradients(3)
    for gradient in gradients:
        del gradient["b"]
    for module, optimizer, parameters, moments in run_both(kind, gradients=gradients):
        torch.testing.assert_close(parameters["b"], module.b.data, rtol=0, atol=0)
        assert module.b not in optimizer.state or "exp_avg" not in optimizer.state[module.b]
        assert all("b" not in members for members in moments.values())


def test_arguments_are_not_changed():
    module = Module()
    rule = OptimizerRule.from_torch(make_optimizer("adam", module), module.named_parameters())
    gradients = random_gradients(2)
    parameters = {name: p.detach().clone() for name, p in module.named_parameters()}
    _, moments = apply_update(rule, parameters, gradients[0], {}, learning_rates=RATES, step=1)
    before = [{n: t.clone() for n, t in tree.items()} for tree in (parameters, gradients[1], *moments.values())]
    apply_update(rule, parameters, gradients[1], moments, learning_rates=RATES, step=2)
    for tree, copy in zip((parameters, gradients[1], *moments.values()), before, strict=True):
        assert all(torch.equal(tree[name], copy[name]) for name in copy)


@pytest.mark.parametrize("kind", ["nesterov", "adam", "adamw"])
def test_update_is_differentiable(kind):
    module = Module()
    rule = OptimizerRule.from_torch(make_optimizer(kind, module), module.named_parameters())
    first, second = random_gradients(2)

    def two_updates(parameter, gradient):
        parameters = {"a": parameter, "b": first["b"], "c": first["c"]}
        parameters, moments = apply_update(rule, parameters, first | {"a": gradient}, {}, learning_rates=RATES, step=1)
        parameters, _ = apply_update(rule, parameters, second, moments, learning_rates=RATES, step=2)
        return parameters["a"]

    inputs = (module.a.detach().requires_grad_(), first["a"].requires_grad_())
    assert torch.autograd.gradcheck(two_updates, inputs)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rule_round_trips_through_json(kind):
    module = Module()
    rule = OptimizerRule.from_torch(make_optimizer(kind, module), module.named_parameters())
    assert OptimizerRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert [rule.group_of(name) for name in SHAPES] == [0, 1, 1]
    assert rule.groups[0].weight_decay == 0.1
    with pytest.raises(KeyError, match="'x' is in no group"):
        rule.group_of("x")


def test_rule_leaves_frozen_parameters_out_and_keeps_empty_groups():
    module = Module()
    module.a.requires_grad_(False)
    rule = OptimizerRule.from_torch(make_optimizer("adamw", module), module.named_parameters())
    assert [group.names for group in rule.groups] == [(), ("b", "c")]


def test_adam_with_decoupled_decay_is_adamw():
    module = Module()
    optimizer = torch.optim.Adam(module.parameters(), decoupled_weight_decay=True, weight_decay=0.1)
    assert OptimizerRule.from_torch(optimizer, module.named_parameters()).name == "adamw"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.RMSprop(p), "torch.optim.rmsprop.RMSprop"),
        (lambda p: type("MyAdam", (torch.optim.Adam,), {})(p), "MyAdam"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad=True"),
        (lambda p: torch.optim.SGD(p, maximize=True), "maximize=True"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "differentiable=True"),
    ],
)
def test_other_optimizers_are_refused(make, message):
    module = Module()
    with pytest.raises(NotImplementedError, match=message):
        OptimizerRule.from_torch(make(module.parameters()), module.named_parameters())


def test_optimizer_of_other_parameters_is_refused():
    module = Module()
    with pytest.raises(ValueError, match="updates 3 parameters that the model does not have"):
        OptimizerRule.from_torch(torch.optim.SGD(Module().parameters()), module.named_parameters())
    with pytest.raises(ValueError, match=r"\['b', 'c'\] \(2 in all\) require a gradient"):
        OptimizerRule.from_torch(torch.optim.SGD([module.a]), module.named_parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerRule("lion", (ParameterGroup(("a",)),)), "sgd, adam, adamw, got 'lion'"),
        (lambda: OptimizerRule("sgd", ()), "is empty"),
        (lambda: OptimizerRule("sgd", (ParameterGroup(("a",)), ParameterGroup(("a",)))), r"\['a'\] are in more"),
        (lambda: ParameterGroup(("a",), betas=(0.9, 1.0)), r"`betas` must be two numbers in \[0, 1\)"),
        (lambda: ParameterGroup(("a",), weight_decay=-1.0), "`weight_decay` must not be negative, got -1.0"),
        (lambda: ParameterGroup(("a",), nesterov=True), "needs a momentum"),
        (lambda: OptimizerRule.from_dict({"name": "sgd", "groups": [{"names": ["a"]}]}), "Not an optimizer rule"),
    ],
)
def test_wrong_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_update_arguments_are_refused():
    rule = OptimizerRule("sgd", (ParameterGroup(("a",)),))
    values = {"a": torch.ones(2)}
    with pytest.raises(ValueError, match="each of the 1 parameter groups, got 2"):
        apply_update(rule, values, values, {}, learning_rates=[0.1, 0.1], step=1)
    with pytest.raises(ValueError, match="counts updates from 1, got 0"):
        apply_update(rule, values, values, {}, learning_rates=[0.1], step=0)
    with pytest.raises(KeyError, match="'b' is in no group"):
        apply_update(rule, values, {"b": torch.ones(2)}, {}, learning_rates=[0.1], step=1)
