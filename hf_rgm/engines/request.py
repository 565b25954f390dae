"""What an engine is asked, and the objective along one recorded run."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_rgm.engines.gradient_form import GradientForm
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.engines.objectives import Objective, Queries
from hf_rgm.engines.query_gradients import QueryGradients
from hf_rgm.engines.recorded_run import RecordedRun


@dataclass(frozen=True, eq=False)
class Request:
    """A question, the same for every recorded run."""

    objective: Objective
    queries: Queries
    rewind: float | None = None
    """Fraction of training to go back to; by default the engine's."""
    num_masks: int | None = None
    """Regress on so many random halves of the clusters instead of leaving each out."""
    seed: int = 0


class Evaluation:
    """The objective of a request along one recorded run, with everything computed once."""

    def __init__(self, run: RecordedRun, request: Request) -> None:
        self.run = run
        self.request = request
        self._gradients: dict[GradientForm, QueryGradients] = {}

    def asking(self, **changes: Any) -> Evaluation:
        """The same with another rewind or other masks, and with all that is known."""
        other = copy.copy(self)
        other.request = replace(self.request, **changes)
        return other

    @functools.cached_property
    def values(self) -> Tensor:
        """The objective of the trained model, `(num_values,)`, float32."""
        return self.at(self.run.final)

    def gradients(self, form: GradientForm) -> QueryGradients:
        """Gradients of the objective at the end of the run; raises `ValueError` if it has none."""
        if form not in self._gradients:
            self._gradients[form] = QueryGradients(
                self.run.model,
                self.request.objective,
                self.run.final,
                self.request.queries,
                form,
                num_values=len(self.values),
                max_bytes=MemoryShares.of(self.run.max_bytes, with_rows=True).gradients,
            )
        return self._gradients[form]

    def at(self, vector: Tensor) -> Tensor:
        """The objective at `(num_parameters,)`: `(num_values,)`, float32."""
        return self.request.objective.values(self.run.model, vector, self.request.queries)

    def of_models(self, parameters: Tensor) -> Tensor:
        """The objective of several models, `(num_models, num_parameters)`: `(num_models, num_values)`, float32."""
        return torch.stack([self.at(vector) for vector in parameters])

    def to_first_order(self, deviations: Tensor, form: GradientForm) -> Tensor:
        """The objective near the trained model by deviations `(num_models, length)`: `(num_models, num_values)`."""
        # Deviations of first order go with the objective's derivative: those of random halves are large, and a margin
        # far from where a deviation was computed says less than its derivative.
        if not self.request.objective.differentiable:
            return self.of_models(self.run.final + deviations)
        gradients = self.gradients(form)
        changes = [deviations @ part.T for part in gradients.parts(range(len(gradients)))]
        return self.values + torch.cat(changes, dim=1)
