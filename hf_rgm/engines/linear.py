"""The linear engine: the recorded path to first order in the parameters, forwards and backwards."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_rgm.engines.engine import Engine, Outcome, probed
from hf_rgm.engines.gradient_form import GradientForm
from hf_rgm.engines.gradient_sources import ClusterGradients, force
from hf_rgm.engines.objectives import Objective
from hf_rgm.engines.perturbations import check_masks, leave_one_out
from hf_rgm.engines.recorded_run import RecordedRun
from hf_rgm.engines.request import Evaluation, Request
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.cost_estimates import PieceOfWork, measured

logger = logging.getLogger(__name__)


class LinearEngine(Engine):
    """
    Linearised replay, exact at every training step and in the cluster weights p (docs/method.md, the linear engine).

    The gradient at `theta_t + delta` is taken to be `sum_k p_k (G_k + C_k delta)`, with each cluster's gradient `G_k`
    and Gauss-Newton matrix `C_k` at the nearest recorded state: an absent cluster takes its curvature with it.
    """

    name = "linearized_replay"
    rewind = 0.14
    max_drift: ClassVar[float] = 0.25
    is_dear = False

    def __init__(self, run: RecordedRun) -> None:
        super().__init__(run)
        _ = run.rank  # too little memory is told before any work,
        if not run.form.is_whole:  # and so is what sketches cannot follow
            run.segments(self.rewind)

    @property
    def batch_size(self) -> int:
        """Models that fit in memory together."""
        # Deviation, momentum and force, each before and after a segment, and one on the way, float32.
        return max(1, self.run.shares.vectors // (7 * 4 * self.form.length))

    @property
    def form(self) -> GradientForm:
        """Whole gradients, or sketches of long ones."""
        return self.run.form

    def check(self, objective: Objective) -> None:
        """Refuses objectives without a gradient where there are sketches, and so no models."""
        if not objective.differentiable and not self.form.is_whole:
            raise ValueError(
                f"Objective {objective.name!r} has no gradient, and changes of {self.run.model.num_parameters} "
                "parameters are held in short, so that there is no model to evaluate. Use "
                '`engine="training_on"`, a differentiable objective, or raise `max_memory`.'
            )

    def gradients(self, rewind: float, *, of_few: bool = False) -> ClusterGradients:
        """The clusters' gradients along the path; those of a few are not worth a pass over all rows."""
        if of_few and self.run.rows is not None and self.form.is_whole:
            return self.run.rows.gradients_as_asked(self.run.path(rewind), self.form)
        return self.run.source.gradients(self.run.path(rewind), self.form)

    def replay(self, masks: Tensor, rewind: float, gradients: ClusterGradients | None = None) -> Tensor:
        """Changes of the final parameters under each row of `masks`, `(num_masks, length)`; 0 for p = 1."""
        run, path, gradients = self.run, self.run.path(rewind), gradients or self.gradients(rewind)
        deviation = torch.zeros(len(masks), self.form.length, device=run.model.device)
        momentum = torch.zeros_like(deviation)
        segments = tqdm(
            run.segments(rewind),
            desc=f"Replaying {len(masks)} models from step {path.start} (linearised)",
            leave=False,
            disable=run.disable_tqdm,
        )
        at, driving = None, torch.zeros_like(deviation)
        for segment in segments:
            if not segment.steps:
                continue
            if at != segment.state:
                at, driving = segment.state, self._force(gradients, segment.state, masks)
            deviation, momentum = run.map_of(path, segment).forward(deviation, momentum, driving, masks)
        bad = torch.nonzero(~torch.isfinite(deviation).all(1)).flatten().tolist()
        if bad:
            raise DivergenceError(
                f"The linearised replay of masks {bad[:5]} gave NaN or infinite parameters. Check the recorded "
                "gradients and states, or rewind less far."
            )
        return deviation

    def evaluate(self, evaluation: Evaluation, parameters: Tensor) -> Tensor:
        """To first order in the objective too, where it has a gradient."""
        return evaluation.to_first_order(parameters, self.form)

    def drifts(self, models: Tensor, masks: Tensor) -> Tensor:
        """Drift of changed parameters, `(num_models,)`, float64."""
        if self.form.is_whole:
            return super().drifts(self.to_parameters(models), masks)
        # There are no models to take losses of: these are expanded at the end of the run.
        run, path = self.run, self.run.path(self.rewind)
        state = path.segments()[-1][0]
        curvature = run.curvature_at(path, state)
        derivatives = models @ self.gradients(self.rewind)(state, range(run.clusters.num_clusters)).T
        bends = torch.zeros_like(derivatives).index_add_(1, curvature.clusters, (models @ curvature.rows.T).square())
        return run.drift_meter.relative(derivatives + bends / 2, derivatives, masks)

    def to_parameters(self, models: Tensor) -> Tensor:
        """The trained parameters and the changes."""
        self._check_whole()
        return self.run.final + models

    def parameters(self, masks: Tensor, rewind: float | None) -> Outcome:
        """Models under cluster weights, `(num_masks, num_parameters)`."""
        self._check_whole()
        return super().parameters(masks, rewind)

    def _check_whole(self) -> None:
        if not self.form.is_whole:
            raise ValueError(
                f"The {self.name} engine holds changes of {self.run.model.num_parameters} parameters in short, which "
                'gives values of differentiable objectives but no models. Use `engine="training_on"`, or raise '
                "`max_memory`."
            )

    def values(self, evaluation: Evaluation, masks: Tensor) -> Outcome:
        """The objective under cluster weights, `(num_masks, num_values)`."""
        # Where even replays without a single cluster drift, those without many are out of reach. Effects of single
        # clusters are then added up, which ranks halves better (docs/method.md, how far back).
        check_masks(masks, self.run.clusters.num_clusters)
        masks = masks.detach().float().cpu()
        changes = masks - 1
        if evaluation.request.rewind is None and bool((changes.abs().sum(1) > 1).any()):
            if self._single_drifts[self.rewind] > self.max_drift:
                single = self.scores(evaluation.asking(num_masks=None))
                return replace(single, values=evaluation.values.cpu() + changes @ single.values.T)
        return super().values(evaluation, masks)

    def rewind_of(self, request: Request) -> float:
        """Fraction of training to go back to for scores: asked for, or trusted for single clusters."""
        return self.trusted_rewind() if request.rewind is None else request.rewind

    def trusted_rewind(self) -> float:
        """First rewind from which replays without one cluster drift little, else that of the least drift."""
        drifts = self._single_drifts
        return min(drifts, key=lambda rewind: max(drifts[rewind], self.max_drift))

    @property
    def _single_drifts(self) -> dict[float, float]:
        """Mean drift of replays without one cluster, by rewind, until it is little."""
        if not self.run.single_drifts:
            self.run.single_drifts = self._measured_drifts()
        return self.run.single_drifts

    def _measured_drifts(self) -> dict[float, float]:
        run, num_clusters = self.run, self.run.clusters.num_clusters
        singles = leave_one_out(num_clusters)[probed(num_clusters)].to(run.model.device)

        def drift() -> float:
            try:
                return float(self.drifts(self.replay(singles, rewind, gradients), singles).mean())
            except DivergenceError:
                return float("inf")

        found: dict[float, float] = {}
        for rewind in (self.rewind, *self.later_rewinds):
            # Only the probes change: the gradients of many other clusters wait until it is known where from.
            gradients = self.gradients(rewind, of_few=num_clusters > 2 * len(singles))
            # One process decides: the last bits of the others may differ.
            found[rewind] = run.processes.gather(drift)[0]
            if found[rewind] <= self.max_drift:
                break
            logger.info(
                "Replays from step %d drift by %.3g, more than %.3g.",
                *(self.start(rewind), found[rewind], self.max_drift),
            )
        return found

    def directions(self, gradients: Tensor, rewind: float) -> dict[int, Tensor]:
        """
        Sensitivity of objectives, by their final gradients `(num_values, length)`, to the training gradient at each
        recorded step, `(num_values, length)`: adding `eps * g` there raises objective i by `eps * <direction_i, g>`.
        """
        bad = torch.nonzero(~torch.isfinite(gradients).all(1)).flatten().tolist()
        if bad:
            raise ValueError(
                f"The gradient of objective values {bad[:5]} is NaN or infinite. Check the queries and the objective."
            )
        path = self.run.path(rewind)
        sensitivity, momentum = gradients, torch.zeros_like(gradients)
        result: dict[int, Tensor] = {}
        for segment in reversed(self.run.segments(rewind)):
            if not segment.steps:
                continue
            sensitivity, momentum, own = self.run.map_of(path, segment).backward(sensitivity, momentum)
            result[segment.state] = result[segment.state] + own if segment.state in result else own
        return result

    def costs(self, num_masks: int, rewind: float | None) -> PieceOfWork:
        """The cost of a replay, from the curvature at one state and one segment."""
        run, rewind = self.run, self.rewind if rewind is None else rewind
        path, segments = run.path(rewind), run.segments(rewind)
        at_once = min(num_masks, self.batch_size)
        vectors = torch.zeros(at_once, self.form.length, device=run.model.device)
        masks = torch.ones(at_once, run.clusters.num_clusters, device=run.model.device)
        preparing = run.cost_of_map(path, segments[-1])
        segment_map = run.map_of(path, segments[-1])
        stepping = measured(lambda: segment_map.forward(vectors, vectors, vectors, masks))
        gradients = run.source.cost_of_gradients(run.final, self.form)
        batches = math.ceil(num_masks / at_once)
        return PieceOfWork(
            seconds=len(segments) * (preparing.seconds + gradients.seconds + batches * stepping.seconds),
            peak_bytes=self.states_bytes
            + self.kept_bytes(preparing, len(segments))
            + 3 * vectors.nbytes
            + max(gradients.peak_bytes, preparing.peak_bytes)
            + stepping.peak_bytes,
        )

    @property
    def states_bytes(self) -> int:
        """Recorded parameters and second moments in use."""
        return 8 * len(self.run.trajectory.state_steps) * self.run.model.num_parameters

    def kept_bytes(self, preparing: PieceOfWork, num_segments: int) -> int:
        """Memory of the maps of segments beside the one in use."""
        return (num_segments - 1) * preparing.held_bytes if self.run.keeps_maps else 0

    def _force(self, gradients: ClusterGradients, state: int, masks: Tensor) -> Tensor:
        return force(
            gradients,
            state,
            masks,
            length=self.form.length,
            max_bytes=self.run.shares.gradients,
        )
