"""Update rules of torch optimizers as pure functions, and their constants as plain data."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
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
"""No training uses larger learning rates or other constants, whose sums and ratios must fit into float32."""
_UNSUPPORTED_OPTIONS = ("amsgrad", "maximize", "differentiable")


@dataclass(frozen=True)
class ParameterGroup:
    """
    Constants of one parameter group. The learning rate is not among them: it changes from step to step.

    Args:
        names (`tuple[str, ...]`): Parameter names, as in `model.named_parameters()`. May be empty.
        weight_decay (`float`, *optional*, defaults to `0.0`): L2 penalty (SGD, Adam) or decoupled decay (AdamW).
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): Adam and AdamW only.
        eps (`float`, *optional*, defaults to `1e-8`): Adam and AdamW only.
        momentum (`float`, *optional*, defaults to `0.0`): SGD only.
        dampening (`float`, *optional*, defaults to `0.0`): SGD only.
        nesterov (`bool`, *optional*, defaults to `False`): SGD only.
    """

    names: tuple[str, ...] = field(metadata={"help": "Parameter names, as in model.named_parameters()."})
    weight_decay: float = field(default=0.0, metadata={"help": "L2 penalty (SGD, Adam) or decoupled decay (AdamW)."})
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"help": "Adam and AdamW only."})
    eps: float = field(default=1e-8, metadata={"help": "Adam and AdamW only."})
    momentum: float = field(default=0.0, metadata={"help": "SGD only."})
    dampening: float = field(default=0.0, metadata={"help": "SGD only."})
    nesterov: bool = field(default=False, metadata={"help": "SGD only."})

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
    """
    Which update rule trained the model, with its constants.

    Args:
        name (`str`): `"sgd"`, `"adam"` or `"adamw"`.
        groups (`tuple[ParameterGroup, ...]`): Parameter groups, in the optimizer's order.

    Raises:
        ValueError: If the name is unknown, there is no group, or a parameter is in two groups.

    Example:

    ```python
    >>> import torch
    >>> from hf_rgm.trajectory.optimizers import OptimizerRule

    >>> model = torch.nn.Linear(3, 2)
    >>> rule = OptimizerRule.from_torch(torch.optim.AdamW(model.parameters()), model.named_parameters())
    >>> rule.name, rule.groups[0].names, rule.groups[0].weight_decay
    ('adamw', ('weight', 'bias'), 0.01)
    >>> OptimizerRule.from_dict(rule.to_dict()) == rule
    True

    ```
    """

    name: str = field(metadata={"help": "sgd, adam or adamw."})
    groups: tuple[ParameterGroup, ...] = field(metadata={"help": "Parameter groups, in the optimizer's order."})

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

    @property
    def moment_names(self) -> tuple[str, ...]:
        """Names of the moments this rule keeps, as in torch's optimizer state. Empty for SGD without momentum."""
        if self.name == "sgd" and not any(group.momentum for group in self.groups):
            return ()
        return MOMENT_NAMES[self.name]

    @functools.cached_property
    def _group_indices(self) -> dict[str, int]:
        return {name: index for index, group in enumerate(self.groups) for name in group.names}

    def group_of(self, parameter_name: str) -> int:
        """
        Index of the group a parameter is in.

        Raises:
            KeyError: If it is in none.
        """
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
        """
        The rule that [`~OptimizerRule.to_dict`] wrote.

        Raises:
            ValueError: If keys are missing or unknown.
        """
        known = {item.name for item in fields(ParameterGroup)}
        message = f"Not an optimizer rule written by this release of hf_rgm: {str(dict(content))[:300]!r}."
        if set(content) != {"name", "groups"} or not isinstance(content["name"], str):
            raise ValueError(message)
        if not isinstance(content["groups"], list):
            raise ValueError(message)
        for group in content["groups"]:
            if not isinstance(group, dict) or set(group) != known or not _is_plain(group):
                raise ValueError(message)
        return cls(content["name"], tuple(ParameterGroup(**group) for group in content["groups"]))

    @classmethod
    def from_torch(
        cls, optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
    ) -> OptimizerRule:
        """
        Reads the rule off a torch optimizer (single-tensor, foreach, fused or capturable: the arithmetic is the same).

        Args:
            optimizer (`torch.optim.Optimizer`): Exactly `SGD`, `Adam` or `AdamW`, not a subclass.
            named_parameters (`Iterable[tuple[str, Parameter]]`): `model.named_parameters()`. Parameters that do not
                require a gradient are left out.

        Raises:
            NotImplementedError: If the optimizer or one of its options is not supported.
            ValueError: If a trainable parameter is not optimized, or an optimized one is not the model's.
        """
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


def _is_plain(group: Mapping[str, Any]) -> bool:
    """Whether all constants of a group have the types they are written in."""
    numbers = [group[name] for name in ("weight_decay", "eps", "momentum", "dampening")]
    return (
        isinstance(group["names"], list)
        and all(isinstance(name, str) for name in group["names"])
        and isinstance(group["betas"], list)
        and all(
            isinstance(number, int | float) and not isinstance(number, bool) for number in (*group["betas"], *numbers)
        )
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
    """
    One optimizer update as a pure, differentiable function: nothing that is passed is changed.

    The arithmetic follows `torch.optim` operation by operation. As there, a parameter without a gradient is left as it
    is, moments included, and the first momentum buffer of SGD is the gradient itself, without dampening.

    Args:
        rule (`OptimizerRule`): The update rule.
        parameters (`Mapping[str, Tensor]`): Values before the update, of any shape and floating dtype.
        gradients (`Mapping[str, Tensor]`): Gradients, already clipped. Names may be missing.
        moments (`Mapping[str, Mapping[str, Tensor]]`): Moment name to parameter name to tensor of the parameter's
            shape, as in [`TrajectoryState`]. Missing ones count as not initialised.
        learning_rates (`Sequence[float]`): One per group.
        step (`int`): Number of this update, starting at 1 (Adam's bias correction).

    Returns:
        `tuple[Parameters, Moments]`: parameters and moments after the update.

    Raises:
        ValueError: If `step` or the number of learning rates is wrong.
        KeyError: If a parameter with a gradient is in no group of the rule.

    Example:

    ```python
    >>> import torch
    >>> from hf_rgm.trajectory.optimizers import OptimizerRule, ParameterGroup, apply_update

    >>> rule = OptimizerRule("sgd", (ParameterGroup(("w",), momentum=0.5),))
    >>> parameters, moments = {"w": torch.tensor([1.0])}, {}
    >>> for step in (1, 2):
    ...     gradients = {"w": parameters["w"]}
    ...     parameters, moments = apply_update(
    ...         rule, parameters, gradients, moments, learning_rates=[0.1], step=step
    ...     )
    >>> parameters["w"]
    tensor([0.7600])

    ```
    """
    if len(learning_rates) != len(rule.groups):
        raise ValueError(
            f"`learning_rates` must have one value for each of the {len(rule.groups)} parameter groups, "
            f"got {len(learning_rates)}."
        )
    if step < 1:
        raise ValueError(f"`step` counts updates from 1, got {step}.")
    new_parameters = dict(parameters)
    new_moments = {kind: dict(moments.get(kind, {})) for kind in rule.moment_names}
    update = _sgd if rule.name == "sgd" else _adam
    for name, gradient in gradients.items():
        index = rule.group_of(name)
        group, learning_rate = rule.groups[index], learning_rates[index]
        decay = group.weight_decay
        parameter = parameters[name]
        if decay and rule.name == "adamw":
            parameter = parameter * (1 - learning_rate * decay)
        elif decay:
            gradient = gradient + decay * parameter
        new_parameters[name] = update(name, parameter, gradient, new_moments, group, learning_rate, step)
    return new_parameters, new_moments


def _sgd(
    name: str,
    parameter: Tensor,
    gradient: Tensor,
    moments: Moments,
    group: ParameterGroup,
    learning_rate: float,
    step: int,
) -> Tensor:
    if group.momentum:
        previous = moments["momentum_buffer"].get(name)
        buffer = gradient if previous is None else group.momentum * previous + (1 - group.dampening) * gradient
        moments["momentum_buffer"][name] = buffer
        gradient = gradient + group.momentum * buffer if group.nesterov else buffer
    return parameter - learning_rate * gradient


def _adam(
    name: str,
    parameter: Tensor,
    gradient: Tensor,
    moments: Moments,
    group: ParameterGroup,
    learning_rate: float,
    step: int,
) -> Tensor:
    beta1, beta2 = group.betas
    first = moments["exp_avg"].get(name)
    second = moments["exp_avg_sq"].get(name)
    first = (1 - beta1) * gradient if first is None else torch.lerp(first, gradient, 1 - beta1)
    second = (1 - beta2) * gradient**2 + (0 if second is None else beta2 * second)
    moments["exp_avg"][name], moments["exp_avg_sq"][name] = first, second
    denominator = second.sqrt() / (1 - beta2**step) ** 0.5 + group.eps
    return parameter - learning_rate / (1 - beta1**step) * first / denominator
