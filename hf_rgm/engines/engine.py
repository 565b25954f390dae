"""What every engine offers: scores, values and models under cluster weights, as far back as can be trusted."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_rgm.engines.gradient_form import GradientForm, WholeGradients
from hf_rgm.engines.perturbations import check_masks, leave_one_out, random_subsets, ridge_scores
from hf_rgm.engines.recorded_run import RecordedRun
from hf_rgm.engines.request import Evaluation
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.cost_estimates import PieceOfWork

logger = logging.getLogger(__name__)

LATER_REWINDS = (0.4, 0.6, 0.8, 0.9)
"""Fractions of training to go back to where the engine's own is too far."""

NUM_PROBES = 4
"""Masks of a question whose replays are looked at."""


@dataclass(frozen=True)
class Outcome:
    """
    What came of a question.

    Args:
        values (`Tensor`): On the CPU, float32: scores `(num_values, num_clusters)`, values of an objective
            `(num_masks, num_values)` or parameters `(num_masks, num_parameters)`.
        start (`int`): Training step that the engine went back to.
        drift (`float`, *optional*): Mean drift of the models that were looked at; see
            [`~hf_rgm.engines.drift.DriftMeter`]. `None` where none were.
    """

    values: Tensor
    start: int
    drift: float | None = None


class Engine(ABC):
    """
    A way to the models, or to effects, under other cluster weights.

    An engine goes back as far as the request says or, where nothing is said, as far as it can be trusted: its own
    default, or the first of [`LATER_REWINDS`] from which the replayed models drift little.

    Args:
        run (`RecordedRun`): The recorded run.
    """

    name: ClassVar[str]
    needs: ClassVar[str] = ""
    """`"rows"`, `"samples"` or `"responses"`, without which the engine cannot work; else either rows or samples."""
    takes_rows: ClassVar[bool] = True
    replays: ClassVar[bool] = True
    """Whether there are models under any cluster weights."""
    anchored: ClassVar[bool] = True
    """Whether p = 1 gives the trained model, against which others are then compared."""
    rewind: ClassVar[float]
    max_drift: ClassVar[float | None] = None
    """Drift of replays that are trusted; `None` where it is not measured."""
    is_dear: ClassVar[bool] = True
    """Whether every model takes its time, so that a few are tried first."""

    def __init__(self, run: RecordedRun) -> None:
        self.run = run

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Models that fit in memory together."""

    @property
    def form(self) -> GradientForm:
        """The form that it takes the clusters' gradients in."""
        return WholeGradients(self.run.model.space)

    @abstractmethod
    def replay(self, masks: Tensor, rewind: float) -> Tensor:
        """
        Models under cluster weights.

        Args:
            masks (`Tensor`): `(num_masks, num_clusters)`, float32, on the model's device.
            rewind (`float`): Fraction of training at which the replay starts.

        Returns:
            `Tensor`: final parameters, `(num_masks, num_parameters)`, float32, unless the engine says otherwise.

        Raises:
            DivergenceError: If parameters explode.
        """

    @abstractmethod
    def costs(self, num_masks: int, rewind: float | None) -> PieceOfWork:
        """What [`Engine.replay`] of so many masks takes, from a little of each part of the work."""

    def start(self, rewind: float) -> int:
        """Training step that a fraction of training stands for."""
        return self.run.path(rewind).start

    def evaluate(self, evaluation: Evaluation, parameters: Tensor) -> Tensor:
        """The objective of replayed models, `(num_models, num_values)`."""
        return evaluation.of_models(parameters)

    def drifts(self, models: Tensor, masks: Tensor) -> Tensor:
        """Drift of replayed models, `(num_models,)`, float64."""
        return self.run.drift_meter.drifts(models, masks)

    def to_parameters(self, models: Tensor) -> Tensor:
        """Final parameters of replayed models, `(num_models, num_parameters)`."""
        return models

    def scores(self, evaluation: Evaluation) -> Outcome:
        """
        Effect of each cluster's presence: each left out, or by regression on random halves.

        Returns:
            [`Outcome`]: its values are `(num_values, num_clusters)`.
        """
        request, num_clusters = evaluation.request, self.run.clusters.num_clusters
        if request.num_masks is not None:
            masks = random_subsets(num_clusters, request.num_masks, seed=request.seed)
            found = self.values(evaluation, masks)
            return replace(found, values=ridge_scores(masks, found.values))
        masks = leave_one_out(num_clusters)
        if self.anchored:
            found = self.values(evaluation, masks)
            return replace(found, values=(evaluation.values.cpu() - found.values).T)
        found = self.values(evaluation, torch.cat([masks, torch.ones(1, num_clusters)]))
        return replace(found, values=(found.values[-1] - found.values[:-1]).T)

    def values(self, evaluation: Evaluation, masks: Tensor) -> Outcome:
        """
        The objective of models under cluster weights.

        Returns:
            [`Outcome`]: its values are `(num_masks, num_values)`.
        """
        return self._trusted(masks, lambda models: self.evaluate(evaluation, models), evaluation.request.rewind)

    def parameters(self, masks: Tensor, rewind: float | None) -> Outcome:
        """
        Models under cluster weights.

        Returns:
            [`Outcome`]: its values are `(num_masks, num_parameters)`.
        """
        return self._trusted(masks, self.to_parameters, rewind)

    def _trusted(self, masks: Tensor, evaluate: Callable[[Tensor], Tensor], rewind: float | None) -> Outcome:
        """Evaluates all masks from as far back as is said, or as can be trusted."""
        check_masks(masks, self.run.clusters.num_clusters)
        every = list(range(len(masks)))
        probes = probed(len(masks))
        limit = self.max_drift if self.max_drift is not None else float("inf")
        first = probes if self.is_dear and rewind is None and self.max_drift is not None else every
        looked_at = [] if self.max_drift is None else [first.index(probe) for probe in probes]
        chosen = self.rewind if rewind is None else rewind
        attempt = self._attempt(chosen, masks[first], looked_at, evaluate)
        for later in LATER_REWINDS if rewind is None else ():
            if attempt.drift <= limit:
                break
            if later <= chosen:
                continue
            logger.info(
                "Replays from step %d diverge or drift by %.3g, more than %.3g. Trying again from %.0f%% of training.",
                *(self.start(chosen), attempt.drift, limit, 100 * later),
            )
            again = self._attempt(later, masks[first], looked_at, evaluate)
            if again.drift <= attempt.drift:
                chosen, attempt = later, again
        values = attempt.complete()
        rest = sorted({*every} - {*first})
        if rest:
            more = self._attempt(chosen, masks[rest], [], evaluate).complete()
            values = torch.cat([values, more])[torch.tensor([*first, *rest]).argsort()]
        if attempt.drift > limit:
            instead = "pass the training rows as `rows`, " if self.run.rows is None and self.takes_rows else ""
            logger.warning(
                "Replays leave what training could lead to (drift %.3g from step %d of %d on, the least of what was "
                "tried; up to %.3g is trusted): do not rely on them, but %sdistil again with more "
                "`samples_per_cluster`, record more states, or remove less at once.",
                *(attempt.drift, self.start(chosen), self.run.trajectory.num_steps, limit, instead),
            )
        return Outcome(values, self.start(chosen), attempt.drift if looked_at else None)

    def _attempt(
        self, rewind: float, masks: Tensor, looked_at: list[int], evaluate: Callable[[Tensor], Tensor]
    ) -> _Attempt:
        """Evaluates some masks at a time, each process its share, and looks at the models of some of them."""
        parts = self.run.processes.parts(len(masks), at_most=self.batch_size)
        self.prepare(rewind)

        def work(part: range) -> tuple[Tensor | None, list[float], str]:
            some = masks[part.start : part.stop].to(self.run.model.device, torch.float32)
            try:
                models = self.replay(some, rewind)
                values = evaluate(models)
            except DivergenceError as error:
                return None, [], str(error)
            own = [probe - part.start for probe in looked_at if probe in part]
            drifts = self.drifts(models[own], some[own]).tolist() if own else []
            return values.cpu(), drifts, ""

        found = self.run.processes.map(work, parts)
        failures = [failure for _, _, failure in found if failure]
        if failures:
            return _Attempt(None, float("inf"), failures[0])
        drifts = [drift for _, some, _ in found for drift in some]
        values = torch.cat([values for values, _, _ in found if values is not None])
        return _Attempt(values, float(np.mean(drifts)) if drifts else 0.0)

    def prepare(self, rewind: float) -> None:
        """Takes the clusters' gradients, which all processes take together before they share the masks."""
        if self.run.rows is not None and self.takes_rows:
            self.run.rows.gradients(self.run.path(rewind), self.form)


def probed(num_masks: int) -> list[int]:
    """Positions of the masks whose replays are looked at."""
    return np.unique(np.linspace(0, num_masks - 1, NUM_PROBES).round().astype(int)).tolist()


@dataclass(frozen=True)
class _Attempt:
    """Values under all masks, or why there are none; drift is the mean over the masks that are looked at."""

    values: Tensor | None
    drift: float
    failure: str = ""

    def complete(self) -> Tensor:
        """
        The values.

        Raises:
            DivergenceError: If there are none.
        """
        if self.values is None:
            raise DivergenceError(self.failure)
        return self.values
