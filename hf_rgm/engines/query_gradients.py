"""Gradients of the objective of many queries, within bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_rgm.engines.gradient_form import GradientForm
from hf_rgm.engines.memory_shares import ranges
from hf_rgm.engines.objectives import Objective, Queries
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.warn_once import warn_once

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class QueryGradients:
    """Gradients of an objective's values `(num_values, length)`, kept if they fit into memory, else computed again."""

    model: FunctionalModel
    objective: Objective
    parameters: Tensor  # (num_parameters,)
    queries: Queries
    form: GradientForm
    num_values: int = field(kw_only=True)
    max_bytes: int = field(kw_only=True)
    _kept: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Raises a `ValueError` if all gradients are zero; warns if some are."""
        # An objective over a set gives all its gradients together, whether they fit or not.
        keeps = 8 * self.num_values * self.form.length <= self.max_bytes or not self.objective.per_query
        flat, fitting = 0, []
        for gradients in self.parts(range(self.num_values)):
            flat += int((gradients == 0).all(1).sum())
            if keeps:
                fitting.append(gradients)
        if fitting:
            self._kept = torch.cat(fitting)
        if flat == self.num_values:
            raise ValueError(
                f"Objective {self.objective.name!r} has a gradient of zero everywhere: the adjoint would score "
                'everything 0. Declare it `differentiable=False` and use `engine="linearized_replay"`.'
            )
        if flat:
            told = "Objective %r has a gradient of zero for %d of its values: their scores are 0."
            warn_once(logger, told, self.objective.name, flat)

    def __len__(self) -> int:
        return self.num_values

    def __call__(self, values: range) -> Tensor:
        """Gradients of some consecutive values, `(len(values), length)`, float32."""
        parts = list(self.parts(values))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, values: range) -> Iterator[Tensor]:
        """Gradients of some consecutive values, as many at once as fit."""
        if self._kept is not None:
            yield self._kept[values.start : values.stop]
            return
        if not self.objective.per_query:
            yield self.objective.gradients(self.model, self.parameters, self.queries, form=self.form)
            return
        # float32, and once more for what is made of them
        for part in ranges(len(values), self.form.at_once(self.max_bytes // 2)):
            chosen = slice(values.start + part.start, values.start + part.stop)
            inputs = {name: value[chosen] for name, value in self.queries.inputs.items()}
            queries = replace(self.queries, inputs=inputs, labels=self.queries.labels[chosen])
            yield self.objective.gradients(self.model, self.parameters, queries, form=self.form)
