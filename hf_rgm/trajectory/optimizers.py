"""Update rules of torch optimizers as pure functions, and their constants."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Moments = dict[str, dict[str, Tensor]]

MOMENT_NAMES: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
_TORCH_CLASSES = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
MAX_CONSTANT = 1e6
"""Bound of learning rates and other constants, so that sums and ratios of them fit into float32."""
_UNSUPPORTED_OPTIONS = ("amsgrad", "maximize", "differentiable")


@dataclass(frozen=True)
class ParameterGroup:
    """Constants of one parameter group; the learning rate is recorded at every step instead."""

    names: tuple[str, ...]
    weight_decay: float = 0.0  # L2 penalty (SGD, Adam) or decoupled decay (AdamW)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` must be two numbers in [0, 1), got {self.betas}.")
        for name in ("weight_decay", "eps", "momentum"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("weight_decay", "eps", "momentum", "dampening"):
            # NaN is not within bounds either.
            if not abs(getattr(self, name)) <= MAX_CONSTANT:
                raise ValueError(f"`{name}` must be at most {MAX_CONSTANT:g}, got {getattr(self, name)}.")
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError(
                f"`nesterov` needs a momentum and no dampening, got momentum={self.momentum} and "
                f"dampening={self.dampening}."
            )


@dataclass(frozen=True)
class OptimizerRule:
    """Update rule of the training with its constants."""

    name: str  # a key of `MOMENT_NAMES`
    groups: tuple[ParameterGroup, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if self.name not in MOMENT_NAMES:
            raise ValueError(f"`name` must be one of {', '.join(MOMENT_NAMES)}, got {self.name!r}.")
        if not self.groups:
            raise ValueError("`groups` is empty. An optimizer rule needs at least one parameter group.")
        names = [name for group in self.groups for name in group.names]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise ValueError(f"Parameters {twice[:5]} are in more than one group. Keep each in one.")

    def check_alike(self) -> None:
        """Refuses parameter groups whose momentum differs; all share one recursion in time."""
        constants = [(g.betas[0], g.momentum, g.dampening, g.nesterov) for g in self.groups]
        if len(set(constants)) > 1:
            raise NotImplementedError(
                "Parameter groups with different (first beta, momentum, dampening, nesterov) are not supported, got "
                f"{constants[0]} and {next(c for c in constants if c != constants[0])}. Train all alike."
            )

    @property
    def moment_names(self) -> tuple[str, ...]:
        """Moments that this rule keeps, as torch names them; none for SGD without momentum."""
        if self.name == "sgd" and not any(group.momentum for group in self.groups):
            return ()
        return MOMENT_NAMES[self.name]

    @functools.cached_property
    def _group_indices(self) -> dict[str, int]:
        return {name: index for index, group in enumerate(self.groups) for name in group.names}

    def group_of(self, parameter_name: str) -> int:
        """Index of a parameter's group."""
        index = self._group_indices.get(parameter_name)
        if index is None:
            raise KeyError(f"Parameter {parameter_name!r} is in no group of this optimizer rule.")
        return index

    def to_dict(self) -> dict[str, Any]:
        """The rule as a JSON-safe dictionary."""
        groups = [asdict(group) for group in self.groups]
        return {
            "name": self.name,
            "groups": [group | {"names": list(group["names"]), "betas": list(group["betas"])} for group in groups],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> OptimizerRule:
        """The rule that `to_dict` wrote."""
        groups = content.get("groups")
        if (
            set(content) != {"name", "groups"}
            or not isinstance(content["name"], str)
            or not isinstance(groups, list)
            or not all(_is_written_group(group) for group in groups)
        ):
            raise ValueError(f"Not an optimizer rule written by this release of hf_rgm: {str(dict(content))[:300]!r}.")
        return cls(content["name"], tuple(ParameterGroup(**group) for group in groups))

    @classmethod
    def from_torch(
        cls, optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
    ) -> OptimizerRule:
        """Reads the rule off a torch optimizer: exactly `SGD`, `Adam` or `AdamW`, not a subclass."""
        name = _TORCH_CLASSES.get(type(optimizer))
        if name is None:
            kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            raise NotImplementedError(
                f"The optimizer is {kind}; only torch's SGD, Adam and AdamW can be replayed. Train with "
                '`TrainingArguments(optim="adamw_torch")` or `optim="sgd"`, or pass one of them in '
                "`Trainer(optimizers=...)`."
            )
        for option in _UNSUPPORTED_OPTIONS:
            if any(group.get(option) for group in optimizer.param_groups):
                raise NotImplementedError(f"The optimizer has `{option}=True`, which cannot be replayed. Turn it off.")
        if name == "adam":
            decoupled = {bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups}
            if len(decoupled) > 1:
                raise NotImplementedError("`decoupled_weight_decay` differs between parameter groups. Set it in all.")
            name = "adamw" if decoupled == {True} else "adam"
        names = {id(parameter): name for name, parameter in named_parameters if parameter.requires_grad}
        optimized = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        foreign = sum(id(parameter) not in names for parameter in optimized)
        if foreign:
            raise ValueError(
                f"The optimizer updates {foreign} parameters that the model does not have. Make them part of the "
                "model, or freeze them."
            )
        idle = sorted(set(names.values()) - {names[id(parameter)] for parameter in optimized})
        if idle:
            raise ValueError(
                f"Parameters {idle[:5]} ({len(idle)} in all) require a gradient but are not given to the optimizer. "
                "Freeze them with `requires_grad_(False)`, or add them to the optimizer."
            )
        return cls(name, tuple(_read_group(group, names) for group in optimizer.param_groups))


def _is_written_group(group: Any) -> bool:
    """Whether a group has the keys and types of `OptimizerRule.to_dict`."""
    if not isinstance(group, dict) or set(group) != {item.name for item in fields(ParameterGroup)}:
        return False
    if not isinstance(group["names"], list) or not isinstance(group["betas"], list):
        return False
    numbers = [*group["betas"], *(group[name] for name in ("weight_decay", "eps", "momentum", "dampening"))]
    return (
        all(isinstance(name, str) for name in group["names"])
        and all(type(number) in (int, float) for number in numbers)
        and isinstance(group["nesterov"], bool)
    )


def _read_group(group: Mapping[str, Any], names: Mapping[int, str]) -> ParameterGroup:
    constants: dict[str, Any] = {
        key: float(group[key]) for key in ("weight_decay", "eps", "momentum", "dampening") if key in group
    }
    if "betas" in group:
        constants["betas"] = tuple(float(beta) for beta in group["betas"])
    members = tuple(names[id(parameter)] for parameter in group["params"] if id(parameter) in names)
    return ParameterGroup(members, nesterov=bool(group.get("nesterov", False)), **constants)


def apply_update(
    rule: OptimizerRule,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    *,
    learning_rates: Sequence[float],
    step: int,
) -> tuple[Parameters, Moments]:
    """One optimizer update as a pure, differentiable function: the parameters and moments after it."""
    if len(learning_rates) != len(rule.groups):
        raise ValueError(
            f"`learning_rates` must have one value for each of the {len(rule.groups)} parameter groups, "
            f"got {len(learning_rates)}."
        )
    if step < 1:
        raise ValueError(f"`step` counts updates from 1, got {step}.")
    # Operation by operation as `torch.optim`: a parameter without a gradient stays as it is, moments included, and the
    # first momentum buffer of SGD is the gradient itself, without dampening.
    new_parameters = dict(parameters)
    new_moments = {kind: dict(moments.get(kind, {})) for kind in rule.moment_names}
    for name, gradient in gradients.items():
        index = rule.group_of(name)
        group, learning_rate = rule.groups[index], learning_rates[index]
        parameter = parameters[name]
        if group.weight_decay and rule.name == "adamw":
            parameter = parameter * (1 - learning_rate * group.weight_decay)
        elif group.weight_decay:
            gradient = gradient + group.weight_decay * parameter
        if rule.name != "sgd":
            beta1, beta2 = group.betas
            first, second = (new_moments[kind].get(name) for kind in rule.moment_names)
            first = (1 - beta1) * gradient if first is None else torch.lerp(first, gradient, 1 - beta1)
            second = (1 - beta2) * gradient**2 + (0 if second is None else beta2 * second)
            new_moments["exp_avg"][name], new_moments["exp_avg_sq"][name] = first, second
            denominator = second.sqrt() / (1 - beta2**step) ** 0.5 + group.eps
            new_parameters[name] = parameter - learning_rate / (1 - beta1**step) * first / denominator
            continue
        if group.momentum:
            buffer = new_moments["momentum_buffer"].get(name)
            buffer = gradient if buffer is None else group.momentum * buffer + (1 - group.dampening) * gradient
            new_moments["momentum_buffer"][name] = buffer
            gradient = gradient + group.momentum * buffer if group.nesterov else buffer
        new_parameters[name] = parameter - learning_rate * gradient
    return new_parameters, new_moments
