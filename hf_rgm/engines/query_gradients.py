"""Gradients of the objective of many queries, within bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_rgm.engines.gradient_form import GradientForm
from hf_rgm.engines.objectives import Objective, Queries
from hf_rgm.model.functional_model import FunctionalModel

logger = logging.getLogger(__name__)


class QueryGradients:
    """
    Gradients of an objective's values, kept where they fit into memory, otherwise taken anew for each part.

    Args:
        model (`FunctionalModel`): The model, within its `differentiable()`.
        objective (`Objective`): A differentiable one.
        parameters (`Tensor`): `(num_parameters,)`, where.
        queries (`Queries`): The queries.
        form ([`GradientForm`]): That of the gradients.
        num_values (`int`): Values of the objective.
        max_bytes (`int`): Memory for them. Those of objectives over a set are taken together all the same.

    Raises:
        ValueError: If all gradients are zero, or the objective has none.
    """

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
        # In short they are taken one by one: what is vectorised is whole.
        at_once = max(1, max_bytes // (8 * model.num_parameters)) if form.is_whole else 1
        self._at_once = at_once if objective.per_query else num_values
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
        if self._kept is not None:
            return self._kept[values.start : values.stop]
        return torch.cat(list(self.parts(values)))

    def parts(self, values: range) -> Iterator[Tensor]:
        """Gradients of some consecutive values, as many at once as fit."""
        if self._kept is not None:
            yield self._kept[values.start : values.stop]
            return
        for start in range(values.start, values.stop, self._at_once):
            part = range(start, min(start + self._at_once, values.stop))
            yield self._objective.gradients(self._model, self._parameters, self._chosen(part), form=self._form)

    def _chosen(self, part: range) -> Queries:
        if not self._objective.per_query:
            return self._queries
        chosen = slice(part.start, part.stop)
        inputs = {name: value[chosen] for name, value in self._queries.inputs.items()}
        return Queries(inputs, self._queries.labels[chosen])
