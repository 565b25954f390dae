"""What an engine is asked, and the objective along one recorded run."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rgm.engines.gradient_form import GradientForm
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.engines.objectives import Objective, Queries
from hf_rgm.engines.query_gradients import QueryGradients
from hf_rgm.engines.recorded_run import RecordedRun


@dataclass(frozen=True, eq=False)
class Request:
    """
    What is asked; the same for every recorded run.

    Args:
        objective (`Objective`): What to explain.
        queries (`Queries`): On what.
        rewind (`float`, *optional*): Fraction of training to go back to. Defaults to the engine's.
        num_masks (`int`, *optional*): Regress on so many random halves of the clusters instead of leaving each out.
        seed (`int`, *optional*, defaults to `0`): Of these halves.
    """

    objective: Objective
    queries: Queries
    rewind: float | None = None
    num_masks: int | None = None
    seed: int = 0


class Evaluation:
    """
    The objective of a request at the parameters of one recorded run. Whatever is computed is computed once.

    Args:
        run (`RecordedRun`): The run.
        request (`Request`): What is asked.
    """

    def __init__(self, run: RecordedRun, request: Request) -> None:
        self.run = run
        self.request = request
        self._gradients: dict[GradientForm, QueryGradients] = {}

    @functools.cached_property
    def values(self) -> Tensor:
        """The objective of the trained model, `(num_values,)`, float32."""
        return self.at(self.run.final)

    def gradients(self, form: GradientForm) -> QueryGradients:
        """
        Gradients of the objective at the end of the run.

        Raises:
            ValueError: If the objective has none.
        """
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
        """
        The objective near the trained model, `(num_models, num_values)`, float32.

        Deviations, `(num_models, length)`, that are of first order are met by the objective's derivative, where it has
        one: those of random halves are large, and a margin far from where a deviation was computed says less than its
        derivative.
        """
        if not self.request.objective.differentiable:
            if not form.is_whole:
                raise ValueError(
                    f"Objective {self.request.objective.name!r} has no gradient, and changes of "
                    f"{self.run.model.num_parameters} parameters are held in short, so that there is no model to "
                    'evaluate. Use `engine="training_on"`, a differentiable objective, or raise `max_memory`.'
                )
            return self.of_models(self.run.final + deviations)
        gradients = self.gradients(form)
        changes = [deviations @ part.T for part in gradients.parts(range(len(gradients)))]
        return self.values + torch.cat(changes, dim=1)
