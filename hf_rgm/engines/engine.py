"""What every engine offers: scores, values and models under cluster weights, from as far back as can be trusted."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_rgm.engines.gradient_form import GradientForm, WholeGradients
from hf_rgm.engines.objectives import Objective
from hf_rgm.engines.perturbations import check_masks, leave_one_out, random_subsets, ridge_scores
from hf_rgm.engines.recorded_run import RecordedRun
from hf_rgm.engines.request import Evaluation, Request
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.cost_estimates import PieceOfWork

logger = logging.getLogger(__name__)

LATER_REWINDS = (0.4, 0.6, 0.8, 0.9)
"""Fractions of training to go back to where the engine's own is too far (docs/method.md, how far back)."""

NUM_PROBES = 4
"""Masks of a question whose replays are checked for drift."""


@dataclass(frozen=True)
class Outcome:
    """
    The answer of an engine.

    Args:
        values (`Tensor`): On the CPU, float32: scores `(num_values, num_clusters)`, values of an objective
            `(num_masks, num_values)` or parameters `(num_masks, num_parameters)`.
        start (`int`): Training step that the engine went back to.
        drift (`float`, *optional*): Mean drift of the probed models; see [`~hf_rgm.engines.drift.DriftMeter`].
    """

    values: Tensor
    start: int
    drift: float | None = None


class Engine(ABC):
    """
    A way to the models, or to effects, under other cluster weights along one recorded run.

    An engine goes back as far as the request says. Where it says nothing, it goes back to its own default, or to the
    first of [`LATER_REWINDS`] from which the replayed models drift little.
    """

    name: ClassVar[str]
    needs: ClassVar[str] = ""
    """`"rows"`, `"samples"` or `"responses"`, without which the engine cannot work; else rows or samples suffice."""
    takes_rows: ClassVar[bool] = True
    replays: ClassVar[bool] = True
    """Whether there are models under any cluster weights."""
    anchored: ClassVar[bool] = True
    """Whether p = 1 gives the trained model, against which others are then compared."""
    rewind: float
    """Fraction of training to go back to where nothing is asked for."""
    max_drift: ClassVar[float | None] = None
    """Drift of replays that are trusted; `None` where it is not measured."""
    is_dear: ClassVar[bool] = True
    """Whether every model takes its time, so that the probes are tried first."""

    def __init__(self, run: RecordedRun) -> None:
        self.run = run
        self.later_rewinds = LATER_REWINDS
        if run.exposure.is_ordered:  # rows that were seen before a rewind point would have no effect
            self.rewind, self.later_rewinds = 0.0, ()

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Models that fit in memory together."""

    @property
    def form(self) -> GradientForm:
        """The form of the clusters' gradients."""
        return WholeGradients(self.run.model.space)

    @abstractmethod
    def replay(self, masks: Tensor, rewind: float) -> Tensor:
        """
        Models under cluster weights `(num_masks, num_clusters)`, from a fraction of training on: final parameters
        `(num_masks, num_parameters)`, float32, unless the engine says otherwise.

        Raises:
            DivergenceError: If parameters explode.
        """

    @abstractmethod
    def costs(self, num_masks: int, rewind: float | None) -> PieceOfWork:
        """The cost of [`Engine.replay`] of so many masks, from a little of each part of the work."""

    def start(self, rewind: float) -> int:
        """Training step at a fraction of training."""
        return self.run.path(rewind).start

    def evaluate(self, evaluation: Evaluation, models: Tensor) -> Tensor:
        """The objective of replayed models, `(num_models, num_values)`."""
        return evaluation.of_models(models)

    def drifts(self, models: Tensor, masks: Tensor) -> Tensor:
        """Drift of replayed models, `(num_models,)`, float64."""
        return self.run.drift_meter.drifts(models, masks)

    def to_parameters(self, models: Tensor) -> Tensor:
        """Final parameters of replayed models, `(num_models, num_parameters)`."""
        return models

    def check(self, objective: Objective) -> None:  # noqa: B027
        """Refuses an objective that the engine cannot evaluate, with a `ValueError`."""

    def prepare(self, rewind: float) -> None:
        """Takes the clusters' gradients, which all processes take together before they share the masks."""
        if self.run.rows is not None and self.takes_rows:
            self.run.rows.gradients(self.run.path(rewind), self.form)

    def rewind_of(self, request: Request) -> float | None:
        """Fraction of training to go back to for scores; `None`: to be searched for."""
        return request.rewind

    def scores(self, evaluation: Evaluation) -> Outcome:
        """Effect of each cluster's presence, `(num_values, num_clusters)`: left out, or by regression on halves."""
        request, num_clusters = evaluation.request, self.run.clusters.num_clusters
        self.check(request.objective)
        if request.num_masks is not None:
            masks = random_subsets(num_clusters, request.num_masks, seed=request.seed)
            found = self.values(evaluation, masks)
            return replace(found, values=ridge_scores(masks, found.values))
        masks = leave_one_out(num_clusters)
        if not self.anchored:
            masks = torch.cat([masks, torch.ones(1, num_clusters)])
        found = self.follow(masks, functools.partial(self.evaluate, evaluation), self.rewind_of(request))
        everything = evaluation.values.cpu() if self.anchored else found.values[-1]
        return replace(found, values=(everything - found.values[:num_clusters]).T)

    def values(self, evaluation: Evaluation, masks: Tensor) -> Outcome:
        """The objective under cluster weights, `(num_masks, num_values)`."""
        self.check(evaluation.request.objective)
        return self.follow(masks, functools.partial(self.evaluate, evaluation), evaluation.request.rewind)

    def parameters(self, masks: Tensor, rewind: float | None) -> Outcome:
        """Models under cluster weights, `(num_masks, num_parameters)`."""
        return self.follow(masks, self.to_parameters, rewind)

    def follow(self, masks: Tensor, evaluate: Callable[[Tensor], Tensor], rewind: float | None) -> Outcome:
        """Replays all masks, some at a time, each process its share, and evaluates the models."""
        check_masks(masks, self.run.clusters.num_clusters)
        search = _Search(self, len(masks), rewind)
        for chosen, positions, probes in search.attempts():
            self.prepare(chosen)
            parts = self.run.processes.parts(len(positions), at_most=self.batch_size)
            with self.run.processes.sharing(parts) as work:
                for part in work.mine:
                    own = positions[part.start : part.stop]
                    some = masks[own].to(self.run.model.device, torch.float32)
                    try:
                        models = self.replay(some, chosen)
                        values = evaluate(models).cpu()
                    except DivergenceError as error:
                        work.add((None, [], str(error)))
                        continue
                    probed = [index for index, position in enumerate(own) if position in probes]
                    work.add((values, self.drifts(models[probed], some[probed]).tolist() if probed else [], ""))
                    models = values = None  # not held beside those of the next part
            search.add(work.results)
            del work
        return search.outcome()


def probed(num_masks: int) -> list[int]:
    """Positions of the masks whose replays are checked for drift."""
    return np.unique(np.linspace(0, num_masks - 1, NUM_PROBES).round().astype(int)).tolist()


@dataclass(frozen=True)
class _Attempt:
    """Replays from one rewind: values of some masks, or why there are none; drift is the mean over the probes."""

    rewind: float
    positions: list[int]
    values: Tensor | None
    drift: float
    failure: str


class _Search:
    """The search for a rewind point from which replays can be trusted."""

    def __init__(self, engine: Engine, num_masks: int, rewind: float | None) -> None:
        self._engine = engine
        self._every = list(range(num_masks))
        self._rewind = rewind
        self._probes = [] if engine.max_drift is None else probed(num_masks)
        self._limit = float("inf") if engine.max_drift is None else engine.max_drift
        self._best = _Attempt(0.0, [], None, float("inf"), "")
        self._rest: _Attempt | None = None
        self._current: tuple[float, list[int], bool] = (0.0, [], False)

    def attempts(self) -> Iterator[tuple[float, list[int], list[int]]]:
        """What is to be replayed next: the rewind, positions of masks, and those among them to check for drift."""
        first = self._engine.rewind if self._rewind is None else self._rewind
        # A dear engine tries the probes before everything else.
        tries_first = self._engine.is_dear and self._rewind is None
        positions = self._probes if tries_first and self._probes else self._every
        yield from self._attempt(first, positions)
        for later in self._engine.later_rewinds if self._rewind is None else ():
            if self._best.drift <= self._limit:
                break
            if later > first:
                self._say_that_it_goes_on(self._best, later)
                yield from self._attempt(later, positions)
        if rest := sorted({*self._every} - {*positions}):
            self._complete(self._best)
            yield from self._attempt(self._best.rewind, rest, is_rest=True)

    def add(self, found: list[tuple[Tensor | None, list[float], str]]) -> None:
        """Takes the results of the last attempt: for each part its values, drifts and failure."""
        rewind, positions, is_rest = self._current
        failure = next((failure for _, _, failure in found if failure), "")
        drifts = [drift for _, some, _ in found for drift in some]
        values = None if failure else torch.cat([values for values, _, _ in found if values is not None])
        drift = float("inf") if failure else float(np.mean(drifts)) if drifts else 0.0
        attempt = _Attempt(rewind, positions, values, drift, failure)
        if is_rest:
            self._rest = attempt
        elif attempt.drift <= self._best.drift:  # values of other attempts are not held
            self._best = attempt

    def outcome(self) -> Outcome:
        """
        The values of the best attempt, in the order of the masks.

        Raises:
            DivergenceError: If there are none.
        """
        best = self._best
        values = self._complete(best)
        if self._rest is not None:
            order = torch.tensor([*best.positions, *self._rest.positions])
            values = torch.cat([values, self._complete(self._rest)])[order.argsort()]
        if best.drift > self._limit:
            run = self._engine.run
            instead = "pass the training rows as `rows`, " if run.rows is None and self._engine.takes_rows else ""
            logger.warning(
                "Replays leave what training could lead to (drift %.3g from step %d of %d on, the least of what was "
                "tried; up to %.3g is trusted): do not rely on them, but %sdistil again with more "
                "`samples_per_cluster`, record more states, or remove less at once.",
                *(best.drift, self._engine.start(best.rewind), run.trajectory.num_steps, self._limit, instead),
            )
        return Outcome(values, self._engine.start(best.rewind), best.drift if self._probes else None)

    def _attempt(
        self, rewind: float, positions: list[int], *, is_rest: bool = False
    ) -> Iterator[tuple[float, list[int], list[int]]]:
        self._current = rewind, positions, is_rest
        yield rewind, positions, [] if is_rest else self._probes

    def _complete(self, attempt: _Attempt) -> Tensor:
        if attempt.values is None:
            raise DivergenceError(attempt.failure)
        return attempt.values

    def _say_that_it_goes_on(self, attempt: _Attempt, later: float) -> None:
        logger.info(
            "Replays from step %d diverge or drift by %.3g, more than %.3g. Trying again from %.0f%% of training.",
            *(self._engine.start(attempt.rewind), attempt.drift, self._limit, 100 * later),
        )
