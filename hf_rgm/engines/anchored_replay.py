"""Anchored replay: the deviation from the recorded path, integrated with the gradients of a perturbed synset."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap
from tqdm.auto import tqdm

from hf_rgm.engines.engine import Engine
from hf_rgm.engines.gradient_sources import SampleSource, force
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.engines.recorded_run import RecordedRun, given
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.synset.samples import broadcast_masks, soft_cross_entropies
from hf_rgm.trajectory.path import RecordedPath, automatic_stride, deviation_step

MAX_MODELS_AT_ONCE = 64


class AnchoredReplayEngine(Engine):
    """
    Integrates the deviation from the recorded path with the synset's own gradients (docs/method.md, anchored replay).

    p = 1 gives the trained model exactly. Not of first order, so that it stays near where much of the data is absent;
    with rows it is exact to first order too.
    """

    name = "replay"
    needs = "samples"
    rewind = 0.14
    max_drift = 0.75
    stride: int | None = None
    """Training steps per integration step; by default the smallest that needs at most 100 integration steps."""

    def __init__(self, run: RecordedRun) -> None:
        super().__init__(run)
        self._shares = MemoryShares.of(run.max_bytes, with_rows=run.rows is not None, with_curvature=False)

    @property
    def batch_size(self) -> int:
        """Models whose deviation, momentum, gradients and temporaries of a step fit in memory."""
        return max(1, min(MAX_MODELS_AT_ONCE, self._shares.vectors // (24 * self.run.model.num_parameters)))

    @property
    def _samples(self) -> SampleSource:
        return given(self.run.samples, "a synset")

    def _path(self, rewind: float) -> RecordedPath:
        return self.run.path(rewind, self.stride or automatic_stride(self.run.trajectory, rewind))

    def replay(self, masks: Tensor, rewind: float) -> Tensor:
        """Final parameters `(num_masks, num_parameters)` under `masks`, `(num_masks, num_clusters)`."""
        run, path, samples = self.run, self._path(rewind), self._samples
        deviation = torch.zeros(len(masks), run.model.num_parameters, device=run.model.device)
        momentum = torch.zeros_like(deviation)
        everything = torch.ones(1, masks.shape[1], device=run.model.device)
        lacking, at = None, None
        for step in progress(path.steps(), len(masks), path.start, disable=run.disable_tqdm):
            if lacking is None or at != step.nearest_state:
                at, lacking = step.nearest_state, self._lacking(step.nearest_state, masks, rewind)
            # g(S, p; theta_t + delta) - g(S, 1; theta_t), and what this lacks on the path: 0 for p = 1.
            anchor = path.parameters_at(step.step)
            base = mask_gradients(samples, anchor[None], everything)
            change = mask_gradients(samples, anchor + deviation, masks).sub_(base).add_(lacking)
            deviation, momentum = deviation_step(step, deviation, momentum, change)
        return finite(run.final + deviation, path.start)

    def costs(self, num_masks: int, rewind: float | None) -> PieceOfWork:
        """Cost of so many models, from one gradient and one step."""
        run, path = self.run, self._path(self.rewind if rewind is None else rewind)
        at_once = min(num_masks, self.batch_size)
        everything = torch.ones(1, run.clusters.num_clusters, device=run.model.device)
        gradient = measured(lambda: mask_gradients(self._samples, run.final[None], everything))
        vectors = torch.zeros(at_once, run.model.num_parameters, device=run.model.device)
        last = path.steps()[-1]
        stepping = measured(lambda: deviation_step(last, vectors, vectors, vectors))
        batches = math.ceil(num_masks / at_once)
        data = run.rows.cost_of_gradients(run.final, self.form) if run.rows is not None else PieceOfWork(0.0, 0)
        # Parameters and second moments of each state; deviation, momentum, the point of the gradients, and these.
        held = 8 * len(run.trajectory.state_steps) * run.model.num_parameters + 4 * vectors.nbytes
        return PieceOfWork(
            seconds=len(path.steps()) * ((num_masks + batches) * gradient.seconds + batches * stepping.seconds)
            + len(path.segments()) * data.seconds,
            peak_bytes=held + max(gradient.peak_bytes, vectors.nbytes, stepping.peak_bytes, data.peak_bytes),
        )

    def _lacking(self, state: int, masks: Tensor, rewind: float) -> Tensor:
        """Sum of `(p_k - 1)(G_k - g_k(S))` at a recorded step: `(num_masks, num_parameters)`, or 0 without rows."""
        run = self.run
        if run.rows is None:
            return torch.zeros(1, device=run.model.device)
        path = run.path(rewind)
        data, own = (source.gradients(path, self.form) for source in (run.rows, self._samples))
        return force(
            lambda step, clusters: data(step, clusters) - own(step, clusters),
            state,
            masks,
            length=run.model.num_parameters,
            max_bytes=self._shares.gradients,
        )


def mask_gradients(samples: SampleSource, parameters: Tensor, masks: Tensor) -> Tensor:
    """Synset gradients at parameters `(num_models, num_parameters)` under masks `(num_models, num_clusters)`."""
    model, flat = samples.model, samples.samples.flatten()

    def loss(named: dict[str, Tensor], mask: Tensor) -> Tensor:
        log_weights = flat.log_weights + broadcast_masks(mask.log(), samples.samples).flatten(0, 1)
        logits = model.logits(named, samples.inputs.to_forward(flat))
        return soft_cross_entropies(logits, flat.targets, log_weights, flat.target_ids).sum()

    if model.device.type != "cpu":
        return model.space.flatten(vmap(grad(loss))(model.space.unflatten(parameters), masks))
    # On the CPU one after the other is faster.
    pairs = zip(parameters, masks, strict=True)
    return torch.stack([loss_gradient(model, vector, functools.partial(loss, mask=mask)) for vector, mask in pairs])


def loss_gradient(model: FunctionalModel, vector: Tensor, loss: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """Gradient `(num_parameters,)` of a loss of named parameters at a vector, by plain autograd."""
    named = {name: value.detach().requires_grad_() for name, value in model.space.unflatten(vector).items()}
    with torch.enable_grad():
        value = loss(named)
    gradients = torch.autograd.grad(value, list(named.values()), materialize_grads=True)
    return model.space.flatten(dict(zip(named, gradients, strict=True)))


def progress(steps, num_models: int, start: int, *, disable: bool) -> tqdm:
    """Progress bar of a replay."""
    return tqdm(steps, desc=f"Replaying {num_models} models from step {start}", leave=False, disable=disable)


def finite(parameters: Tensor, start: int) -> Tensor:
    """Replayed parameters `(num_models, num_parameters)`; raises a `DivergenceError` if some are not finite."""
    bad = torch.nonzero(~torch.isfinite(parameters).all(1)).flatten().tolist()
    if bad:
        raise DivergenceError(
            f"The replay of masks {bad[:5]} gave NaN or infinite parameters. Rewind less far (now from step {start})."
        )
    return parameters
