"""Gradients of the objective of many queries, within bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_rgm.engines.gradient_form import GradientForm
from hf_rgm.engines.memory_shares import ranges
from hf_rgm.engines.objectives import Objective, Queries
from hf_rgm.model.functional_model import FunctionalModel

logger = logging.getLogger(__name__)


class QueryGradients:
    """Gradients of an objective's values `(num_values, length)`, kept if they fit into memory, else computed again."""

    def __init__(
        self,
        model: FunctionalModel,
        objective: Objective,
        parameters: Tensor,
        queries: Queries,
        form: GradientForm,
        *,
        num_values: int,
        max_bytes: int,
    ) -> None:
        self._model = model
        self._objective = objective
        self._parameters = parameters
        self._queries = queries
        self._num_values = num_values
        self._form = form
        # Once more for what is made of them. Objectives over a set give all gradients together in any case.
        self._at_once = form.at_once(max_bytes // 2) if objective.per_query else num_values
        self._kept: Tensor | None = None
        flat, fitting = 0, []
        for gradients in self.parts(range(num_values)):
            flat += int((gradients == 0).all(1).sum())
            if 8 * num_values * form.length <= max_bytes or not objective.per_query:
                fitting.append(gradients)
        if fitting:
            self._kept = torch.cat(fitting)
        if flat == num_values:
            raise ValueError(
                f"Objective {objective.name!r} has a gradient of zero everywhere: the adjoint would score everything "
                '0. Declare it `differentiable=False` and use `engine="linearized_replay"`.'
            )
        if flat:
            logger.warning(
                "Objective %r has a gradient of zero for %d of its values: their scores are 0.", objective.name, flat
            )

    def __len__(self) -> int:
        return self._num_values

    def __call__(self, values: range) -> Tensor:
        """Gradients of some consecutive values, `(len(values), length)`, float32."""
        parts = list(self.parts(values))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, values: range) -> Iterator[Tensor]:
        """Gradients of some consecutive values, as many at once as fit."""
        if self._kept is not None:
            yield self._kept[values.start : values.stop]
            return
        for part in ranges(len(values), self._at_once):
            queries = self._queries
            if self._objective.per_query:
                chosen = slice(values.start + part.start, values.start + part.stop)
                inputs = {name: value[chosen] for name, value in queries.inputs.items()}
                queries = Queries(inputs, queries.labels[chosen])
            yield self._objective.gradients(self._model, self._parameters, queries, form=self._form)
