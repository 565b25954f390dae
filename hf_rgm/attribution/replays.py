"""Replays along one recorded run: the engine, from as far back as it can be trusted, among all processes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_rgm.attribution.drift import DriftMeter
from hf_rgm.attribution.linearized import LinearizedReplayEngine
from hf_rgm.attribution.objectives import Objective, Queries
from hf_rgm.attribution.query_gradients import QueryGradients
from hf_rgm.attribution.replay import ReplayEngine
from hf_rgm.attribution.training_rows import TrainingRows
from hf_rgm.clusters import ClusterMap
from hf_rgm.exceptions import DivergenceError
from hf_rgm.modeling import FunctionalModel
from hf_rgm.processes import Processes
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.storage import Trajectory

logger = logging.getLogger(__name__)

REPLAY_ENGINES = ("linearized_replay", "replay", "plain_replay")
ENGINES = ("adjoint", *REPLAY_ENGINES)
ENGINES_OF_ROWS = ("adjoint", "linearized_replay", "replay")
LATER_REWINDS = (0.4, 0.6, 0.8, 0.9)
"""Fractions of training to go back to where the engine's own is too far."""

NUM_PROBES = 16
"""Masks of a question whose replays are looked at."""

Engine = LinearizedReplayEngine | ReplayEngine


def check_rows(engine: str) -> None:
    """Raises a `ValueError` unless the engine can make use of training rows."""
    if engine not in ENGINES_OF_ROWS:
        known = f"{', '.join(ENGINES_OF_ROWS[:-1])} and {ENGINES_OF_ROWS[-1]}"
        raise ValueError(f"`rows` are for engines {known}, got {engine!r}.")


def check_engine(engine: str, known: tuple[str, ...] = ENGINES) -> None:
    """Raises a `ValueError` that names the known engines."""
    if engine not in known:
        raise ValueError(f"Unknown engine {engine!r}. Use one of {', '.join(known)}.")


@dataclass(frozen=True)
class Replayed:
    """
    What came of a replay.

    Args:
        values (`Tensor`): `(num_masks, ...)`, on the CPU: values of an objective, or parameters.
        start, stride (`int`): First training step and steps per integration step of the engine.
        drift (`float`, *optional*): Mean drift of the models that were looked at; see [`DriftMeter`]. `None` for plain
            replay and for what is no replay.
    """

    values: Tensor
    start: int
    stride: int
    drift: float | None = None


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


class Replays:
    """
    Replays of one recorded run.

    An engine goes back as far as the caller says or, where nothing is said, as far as it can be trusted: its own
    default, or the first of [`LATER_REWINDS`] from which the replayed models drift little; see [`DriftMeter`]. Plain
    replay, which drifts without any perturbation, always goes back as far as its default says.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        inputs (`InputSpace`): The space of the synthetic inputs.
        samples (`SyntheticSamples`): The synset's samples, on the model's device.
        clusters (`ClusterMap`): The clusters of the training rows.
        trajectory (`Trajectory`): The recorded run.
        max_bytes (`int`): Memory for the engines, beside the recorded states.
        processes (`Processes`): Among which masks are split.
        disable_tqdm (`bool`): No progress bars.
    """

    def __init__(
        self,
        model: FunctionalModel,
        inputs: InputSpace,
        samples: SyntheticSamples,
        clusters: ClusterMap,
        trajectory: Trajectory,
        *,
        max_bytes: int,
        processes: Processes,
        disable_tqdm: bool,
    ) -> None:
        self.model = model
        self.clusters = clusters
        self.trajectory = trajectory
        self.final = self._flat(trajectory.final)
        self.parts = (model, inputs, samples, trajectory)
        self.max_bytes = max_bytes
        self.processes = processes
        self._disable_tqdm = disable_tqdm

    def engine(self, name: str, *, rows: TrainingRows | None = None, **settings: Any) -> Engine:
        """
        Builds a replay engine: `"linearized_replay"`, `"replay"` (anchored) or `"plain_replay"`.

        Raises:
            ValueError: If there is no such replay engine, or it cannot make use of rows.
        """
        check_engine(name, REPLAY_ENGINES)
        if rows is not None:
            check_rows(name)
        own = {
            "max_bytes": self.max_bytes,
            "disable_tqdm": self._disable_tqdm or not self.processes.shows_progress,
        }
        if name != "linearized_replay":
            return ReplayEngine(*self.parts, anchored=name == "replay", with_rows=rows is not None, **own, **settings)
        sample = None if rows is None else rows.sample
        return LinearizedReplayEngine(*self.parts, rows=sample, **own, **settings)

    def parameters(self, name: str, masks: Tensor, *, rows: TrainingRows | None = None, **settings: Any) -> Replayed:
        """
        Final parameters under cluster weights; arguments as in [`Replays.values`].

        Returns:
            [`Replayed`]: its values are `(num_masks, num_parameters)`.
        """

        def evaluate(engine: Engine, some: Tensor) -> tuple[Tensor, Tensor]:
            parameters = engine.parameters(some)
            return parameters, parameters

        return self._trusted(name, masks, evaluate, rows, settings)

    def values(
        self,
        name: str,
        objective: Objective,
        queries: Queries,
        masks: Tensor,
        *,
        gradients: QueryGradients | None,
        rows: TrainingRows | None = None,
        **settings: Any,
    ) -> Replayed:
        """
        The objective of models replayed under cluster weights.

        Linearised replay is of first order in the objective too, where it has a gradient: the deviations of random
        halves are large, and a margin far from where the deviation was computed says less than its derivative.

        Args:
            name (`str`): The engine.
            objective (`Objective`): What to evaluate.
            queries (`Queries`): On what.
            masks (`Tensor`): `(num_masks, num_clusters)`, the weight p of each cluster.
            gradients (`QueryGradients`, *optional*): Those of the objective, for linearised replay.
            rows (`TrainingRows`, *optional*): Training rows, whose clusters' gradients are taken by all processes
                together.
            settings: `rewind` and `stride`, where they are given.

        Returns:
            [`Replayed`]: its values are `(num_masks, num_values)`.

        Raises:
            DivergenceError: If the replay explodes from wherever it starts.
            ValueError: If there is no such replay engine, or it cannot make use of rows.
        """
        final = self.final

        def evaluate(engine: Engine, some: Tensor) -> tuple[Tensor, Tensor]:
            if gradients is not None and isinstance(engine, LinearizedReplayEngine):
                deviations = engine.deviations(some)
                changes = [deviations @ own.T for own in gradients.parts(range(len(gradients)))]
                return at_end + torch.cat(changes, dim=1), final + deviations
            models = engine.parameters(some)
            return torch.stack([objective.values(self.model, vector, queries) for vector in models]), models

        at_end = objective.values(self.model, final, queries)
        return self._trusted(name, masks, evaluate, rows, settings)

    @functools.cached_property
    def _drift_meter(self) -> DriftMeter:
        model, inputs, samples, trajectory = self.parts
        sizes = torch.from_numpy(self.clusters.sizes)
        initial = self._flat(trajectory.state(trajectory.state_steps[0]))
        return DriftMeter(model, inputs, samples, sizes, initial=initial, final=self.final)

    def _flat(self, state: TrajectoryState) -> Tensor:
        return self.model.space.flatten(state.parameters).to(self.model.device)

    def _trusted(
        self,
        name: str,
        masks: Tensor,
        evaluate: Callable[[Engine, Tensor], tuple[Tensor, Tensor]],
        rows: TrainingRows | None,
        settings: dict[str, Any],
    ) -> Replayed:
        """Evaluates all masks by an engine that goes back as far as it is told, or as far as it can be trusted."""
        engine = self._built(name, rows, settings)
        every = list(range(len(masks)))
        probes = np.unique(np.linspace(0, len(masks) - 1, NUM_PROBES).round().astype(int)).tolist()
        # Linearised replay takes about as long for all models as for some, the others their time for each.
        first = probes if isinstance(engine, ReplayEngine) and "rewind" not in settings else every
        attempt = self._attempt(engine, masks[first], [first.index(probe) for probe in probes], evaluate)
        for rewind in () if "rewind" in settings else LATER_REWINDS:
            if attempt.drift <= engine.max_drift:
                break
            logger.info(
                "Replays from step %d diverge or drift by %.3g, more than %.3g. Trying again from %.0f%% of training.",
                engine.start,
                attempt.drift,
                engine.max_drift,
                100 * rewind,
            )
            later = self._built(name, rows, {**settings, "rewind": rewind})
            again = self._attempt(later, masks[first], [first.index(probe) for probe in probes], evaluate)
            if again.drift <= attempt.drift:
                engine, attempt = later, again
        values = attempt.complete()
        rest = sorted({*every} - {*first})
        if rest:
            more = self._attempt(engine, masks[rest], [], evaluate).complete()
            values = torch.cat([values, more])[torch.tensor([*first, *rest]).argsort()]
        if attempt.drift > engine.max_drift:
            instead = "pass the training rows as `rows`, " if rows is None and name in ENGINES_OF_ROWS else ""
            logger.warning(
                "Replays leave what training could lead to (drift %.3g from step %d of %d on, the least of what was "
                "tried; up to %.3g is trusted): do not rely on them, but %sdistil again with more "
                "`samples_per_cluster`, record more states, or remove less at once.",
                attempt.drift,
                engine.start,
                self.trajectory.num_steps,
                engine.max_drift,
                instead,
            )
        return Replayed(values, engine.start, engine.path.stride, attempt.drift if engine.anchored else None)

    def _built(self, name: str, rows: TrainingRows | None, settings: dict[str, Any]) -> Engine:
        engine = self.engine(name, rows=rows, **settings)
        if rows is not None:
            engine.cluster_gradients = rows.gradients(engine.path)
        return engine

    def _attempt(
        self,
        engine: Engine,
        masks: Tensor,
        probes: list[int],
        evaluate: Callable[[Engine, Tensor], tuple[Tensor, Tensor]],
    ) -> _Attempt:
        """
        Evaluates some masks at a time, each process its share, and all with the stride that all can take; looks at the
        models of some of them.
        """
        parts = self.processes.parts(len(masks), at_most=engine.batch_size)
        probes = probes if engine.anchored else []

        def work(part: range) -> tuple[Tensor | None, int, list[float], str]:
            some = masks[part.start : part.stop]
            try:
                values, parameters = evaluate(engine, some)
            except DivergenceError as error:
                return None, engine.path.stride, [], str(error)
            looked_at = [probe - part.start for probe in probes if probe in part]
            drifts = self._drift_meter.drifts(parameters[looked_at], some[looked_at]).tolist() if looked_at else []
            return values.cpu(), engine.path.stride, drifts, ""

        while True:
            stride = engine.path.stride
            found = self.processes.map(work, parts)
            engine.path.stride = min(taken for _, taken, _, _ in found)
            failures = [failure for _, _, _, failure in found if failure]
            if failures:
                return _Attempt(None, float("inf"), failures[0])
            if engine.path.stride == stride:
                drifts = [drift for _, _, some, _ in found for drift in some]
                values = torch.cat([values for values, _, _, _ in found if values is not None])
                return _Attempt(values, float(np.mean(drifts)) if drifts else 0.0)
