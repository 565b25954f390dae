"""Objectives: what is explained, functions of a model and some queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_rgm.model.functional_model import FunctionalModel, ToVector
from hf_rgm.model.losses import IGNORED_LABEL, LossFunction, check_labels, label_losses, squared_errors
from hf_rgm.model.vectorize import grad, jacobian, map_rows

# A model at some parameters: maps the forward's keyword arguments to logits.
Forward = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass
class Queries:
    """
    Collated queries.

    Args:
        inputs (`dict[str, Tensor]`): The forward's keyword arguments, first dimension `num_queries`.
        labels (`Tensor`): `(num_queries,)`, or `(num_queries, length)` for labels of tokens, int64; -100 is ignored.
            Those of a causal language model stand where they are predicted. Of regression and several labels a row
            float32, one for each logit.
        row_loss (`Callable`, *optional*): The loss of rows by logits and labels where labels are numbers.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    row_loss: LossFunction | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Objective:
    """
    An evaluation objective `f(model, queries)`.

    Args:
        name (`str`): Its name in results.
        function (`Callable`): Takes `forward` (keyword arguments of the model to logits) and `queries`
            ([`Queries`]) and returns a tensor `(num_values,)`: one value per query, or fewer for objectives over a
            set.
        differentiable (`bool`, *optional*, defaults to `True`): Whether the adjoint engine can be used.
        per_query (`bool`, *optional*, defaults to `False`): Whether value i depends on query i alone, which lets
            gradients be taken for many queries at once.
        maximize (`bool`, *optional*, defaults to `True`): Whether higher is better: what counts as helping.

    Example:

    ```python
    >>> import torch
    >>> from hf_rgm import Objective
    >>> confidence = Objective("mean confidence", lambda forward, queries: (
    ...     forward(queries.inputs).softmax(-1).amax(-1).mean(0, keepdim=True)
    ... ))
    >>> confidence.differentiable
    True

    ```
    """

    name: str
    function: Callable[[Forward, Queries], Tensor]
    differentiable: bool = True
    per_query: bool = False
    maximize: bool = True

    def values(self, model: FunctionalModel, parameters: Tensor, queries: Queries) -> Tensor:
        """
        The objective at the given parameters.

        Args:
            model (`FunctionalModel`): The model.
            parameters (`Tensor`): `(num_parameters,)`.
            queries (`Queries`): The queries.

        Returns:
            `Tensor`: `(num_values,)`, float32.

        Raises:
            NotImplementedError: If a named objective is asked for labels that it is not for.
            ValueError: If a label or output is out of range, or the values have another shape.
        """
        named = model.space.unflatten(parameters)

        def forward(inputs: Mapping[str, Tensor]) -> Tensor:
            logits = model.logits(named, inputs)
            if OBJECTIVES.get(self.name) is self:
                _check_labels(self.name, logits, queries)
            return logits

        with torch.no_grad():
            return self._checked(self.function(forward, queries))

    def gradients(
        self,
        model: FunctionalModel,
        parameters: Tensor,
        queries: Queries,
        *,
        form: ToVector | None = None,
    ) -> Tensor:
        """
        Gradient of each value with respect to the parameters: `(num_values, num_parameters)`, float32.

        Args:
            model (`FunctionalModel`): The model.
            parameters (`Tensor`): `(num_parameters,)`.
            queries (`Queries`): The queries.
            form (`Callable`, *optional*): Makes vectors of named gradients. Defaults to `model.space.flatten`.

        Raises:
            ValueError: If the objective is not differentiable.
        """
        if not self.differentiable:
            raise ValueError(
                f"Objective {self.name!r} is not differentiable, which the adjoint engine needs. Use "
                '`engine="replay"`, or a differentiable stand-in such as "margin" for "accuracy".'
            )
        named, make = model.space.unflatten(parameters), form or model.space.flatten

        def values(p: dict[str, Tensor], some: Queries) -> Tensor:
            return self.function(lambda inputs: model.logits(p, inputs), some)

        if not self.per_query:
            return make(jacobian(lambda p: self._checked(values(p, queries)), named))

        def gradient(inputs: dict[str, Tensor], label: Tensor) -> Tensor:
            query = replace(queries, inputs={name: value[None] for name, value in inputs.items()}, labels=label[None])
            return make(grad(lambda p: values(p, query)[0])(named))

        return map_rows(gradient, queries.inputs, queries.labels)

    def _checked(self, values: Tensor) -> Tensor:
        if not isinstance(values, Tensor) or values.dim() != 1:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"Objective {self.name!r} must return a tensor of shape (num_values,), got {shape}. For a single "
                "number use `value.reshape(1)`."
            )
        return values


def log_odds_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`logit_y - logsumexp(other logits)`, in nats: the shape of `labels`; labels of -100 count as 0."""
    labels = labels.clamp_min(0)[..., None]
    others = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == labels, float("-inf"))
    return logits.gather(-1, labels)[..., 0] - others.logsumexp(-1)


def _per_query(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Forward, Queries], Tensor]:
    """Each query's mean over its labels that are not -100, of values of the labels' shape: `(num_queries,)`."""

    def values(forward: Forward, queries: Queries) -> Tensor:
        found = function(forward(queries.inputs), queries.labels)
        if found.dim() == 1:
            return found
        known = (queries.labels != IGNORED_LABEL).flatten(1)
        return (found.flatten(1) * known).sum(1) / known.sum(1).clamp_min(1)

    return values


def _loss(forward: Forward, queries: Queries) -> Tensor:
    if queries.row_loss is not None and queries.labels.is_floating_point():
        return queries.row_loss(forward(queries.inputs), queries.labels)
    return _per_query(label_losses)(forward, queries)


def _check_labels(name: str, logits: Tensor, queries: Queries) -> None:
    """Refuses labels that a named objective is not for."""
    if not queries.labels.is_floating_point():
        check_labels(logits, queries.labels)
    elif name not in ("loss", "mean_loss") or queries.row_loss is None:
        raise NotImplementedError(
            f'Objective {name!r} is for classes, and the labels are numbers. Use `objective="predicted_value"` '
            '(regression), "probability:0" (of label 0 of several), or "loss".'
        )


_accuracies = _per_query(lambda logits, labels: (logits.argmax(-1) == labels).float())

OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("margin", _per_query(log_odds_margin), per_query=True),
        Objective("loss", _loss, per_query=True, maximize=False),
        Objective("log_probability", lambda forward, queries: -_loss(forward, queries), per_query=True),
        Objective("mean_loss", lambda *asked: _loss(*asked).mean(0, keepdim=True), maximize=False),
        Objective("accuracy", lambda *asked: _accuracies(*asked).mean(0, keepdim=True), differentiable=False),
    )
}


OF_OUTPUTS = ("predicted_value", "probability")
"""Objectives of one output of the model, named after a colon (`"probability:2"`), by label or number."""


def _of_output(kind: str, index: int | None) -> Objective:
    """The logit of an output, or the probability of a label."""

    def values(forward: Forward, queries: Queries) -> Tensor:
        logits, labels = forward(queries.inputs), queries.labels
        if not (0 if index is None else index) < logits.shape[-1] or (index is None and logits.shape[-1] > 1):
            raise ValueError(f'The model has {logits.shape[-1]} outputs. Say which, from `objective="{kind}:0"` on.')
        if kind == "probability" and queries.row_loss is squared_errors:
            raise NotImplementedError('Regression has no probabilities. Use `objective="predicted_value"`.')
        if kind == "probability":
            logits = logits.sigmoid() if labels.is_floating_point() else logits.softmax(-1)
        return _per_query(lambda logits, _: logits[..., index or 0])(lambda _: logits, queries)

    return Objective(kind if index is None else f"{kind}:{index}", values, per_query=True)


def resolve_objective(objective: str | Objective, model: FunctionalModel | None = None) -> Objective:
    """Objective of a name, or the objective itself; the model knows the names of its outputs."""
    if isinstance(objective, Objective):
        return objective
    if objective in OBJECTIVES:
        return OBJECTIVES[objective]
    kind, _, output = objective.partition(":")
    names = getattr(None if model is None else model.config, "label2id", None) or {}
    index = names.get(output, int(output) if output.isdecimal() else None)
    if kind not in OF_OUTPUTS or (index is None and objective != "predicted_value"):
        known = [*OBJECTIVES, "predicted_value", *(f"{name}:OUTPUT" for name in OF_OUTPUTS)]
        raise ValueError(
            f"Unknown objective {objective!r}. Use one of {', '.join(known)} (an output by its number, or its name in "
            "the model's `label2id`), or `Objective(name, function)`."
        )
    return _of_output(kind, index)
