"""Full-batch training runs recorded in memory, exact in every step: the oracle of the engines' tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.trajectory.optimizers import OptimizerRule, ParameterGroup, apply_update
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.steps import StepTable
from hf_rgm.trajectory.trajectory import Trajectory

CONSTANTS = {
    "sgd": {"momentum": 0.8, "weight_decay": 0.02},
    "nesterov": {"momentum": 0.8, "weight_decay": 0.02, "nesterov": True},
    "adam": {"betas": (0.8, 0.99), "weight_decay": 0.02},
    "adamw": {"betas": (0.8, 0.99), "weight_decay": 0.02},
}


class Linear(nn.Module):
    """Logistic regression, whose Gauss-Newton matrix is its Hessian."""

    def __init__(self, num_features: int = 5, num_labels: int = 3) -> None:
        super().__init__()
        self.classifier = nn.Linear(num_features, num_labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(features)


class TinyNet(nn.Module):
    """One hidden layer."""

    def __init__(self, num_features: int = 5, num_labels: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_features, 6), nn.Tanh(), nn.Linear(6, num_labels))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


@dataclass
class Run:
    """A recorded full-batch run on random rows, and the synset that is the real rows themselves."""

    model: nn.Module
    rule: OptimizerRule
    learning_rates: list[float]
    features: Tensor
    labels: Tensor
    trajectory: Trajectory
    initial: dict[str, Tensor]

    def train(self, row_weights: Tensor, *, frozen_second_moments: bool = False) -> Tensor:
        """Final parameters `(num_parameters,)` of training with weighted rows, differentiable in the weights."""
        functional = FunctionalModel(self.model.double())
        parameters, moments = dict(self.initial), {}
        for step, learning_rate in enumerate(self.learning_rates):
            gradients = _gradients(functional, parameters, self.features, self.labels, row_weights)
            if frozen_second_moments:
                parameters, moments = self._frozen_step(step, parameters, gradients, moments)
            else:
                parameters, moments = apply_update(
                    self.rule, parameters, gradients, moments, learning_rates=[learning_rate], step=step + 1
                )
        return functional.space.flatten(parameters)

    def _frozen_step(self, step, parameters, gradients, moments):
        group = self.rule.groups[0]
        first, second = group.betas
        recorded = self.trajectory.state(step + 1).moments["exp_avg_sq"]
        moments = moments or {name: torch.zeros_like(value) for name, value in parameters.items()}
        result, next_moments = {}, {}
        learning_rate = self.learning_rates[step]
        for name, value in parameters.items():
            gradient = gradients[name]
            if self.rule.name == "adam":
                gradient = gradient + group.weight_decay * value
            else:
                value = (1 - learning_rate * group.weight_decay) * value
            next_moments[name] = first * moments[name] + (1 - first) * gradient
            root = (recorded[name].double() / (1 - second ** (step + 1))).sqrt() + group.eps
            result[name] = value - learning_rate / (1 - first ** (step + 1)) * next_moments[name] / root
        return result, next_moments


def record(
    optimizer: str,
    *,
    model_class: type[nn.Module] = Linear,
    num_rows: int = 12,
    num_steps: int = 20,
    learning_rate: float = 0.05,
    seed: int = 0,
) -> Run:
    """Trains on all rows at every step and records every state."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, 5, generator=generator).double()
    labels = torch.randint(3, (num_rows,), generator=generator)
    torch.manual_seed(seed)
    model = model_class().double()
    rule = OptimizerRule(
        name="sgd" if optimizer == "nesterov" else optimizer,
        groups=(ParameterGroup(names=tuple(n for n, _ in model.named_parameters()), **CONSTANTS[optimizer]),),
    )
    initial = {name: value.detach().clone() for name, value in model.named_parameters()}
    functional = FunctionalModel(model)
    functional.module.double()
    parameters, moments = dict(initial), {}
    states = {0: TrajectoryState(0, _float(parameters), {})}
    learning_rates = [learning_rate * (1 - step / num_steps) for step in range(num_steps)]
    for step in range(num_steps):
        gradients = _gradients(functional, parameters, features, labels, torch.ones(num_rows))
        parameters, moments = apply_update(
            rule, parameters, gradients, moments, learning_rates=[learning_rates[step]], step=step + 1
        )
        states[step + 1] = TrajectoryState(
            step + 1, _float(parameters), {name: _float(values) for name, values in moments.items()}
        )
    for name, parameter in model.named_parameters():
        parameter.data = parameters[name].detach().clone()
    trajectory = Trajectory(
        optimizer=rule,
        parameter_shapes={name: tuple(value.shape) for name, value in initial.items()},
        steps=StepTable(
            epoch=[float(step) for step in range(num_steps)],
            learning_rates=[[rate] for rate in learning_rates],
            gradient_norm=[1.0] * num_steps,
            clip_factor=[1.0] * num_steps,
            skipped=[False] * num_steps,
        ),
        states=states,
        num_rows=num_rows,
        dataset_fingerprint="",
    )
    return Run(model, rule, learning_rates, features, labels, trajectory, initial)


def engine_parts(run: Run, rows_per_cluster: int):
    """Model, inputs and samples for an engine whose synset is the real rows, consecutive rows forming clusters."""
    model = FunctionalModel(run.model.float())
    num_rows = len(run.labels)
    shape = (num_rows // rows_per_cluster, rows_per_cluster)
    one_hot = F.one_hot(run.labels, 3).float()
    samples = SyntheticSamples(
        inputs=run.features.float().reshape(*shape, -1),
        targets=torch.log(one_hot + 1e-12).reshape(*shape, -1),
        log_weights=torch.full(shape, 1 / num_rows).log(),
    )
    return model, ContinuousInputs(model), samples


def _gradients(model, parameters, features, labels, row_weights):
    def loss(p):
        logits = torch.func.functional_call(model.module, p, (features,))
        return (F.cross_entropy(logits, labels, reduction="none") * row_weights).sum() / len(labels)

    return torch.func.grad(loss)(parameters)


def _float(values):
    return {name: value.detach().float().clone() for name, value in values.items()}
