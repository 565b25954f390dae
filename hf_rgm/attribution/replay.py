"""The replay engine: continue the recorded optimizer on a perturbed synset."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.func import grad, vmap
from tqdm.auto import tqdm

from hf_rgm.attribution.forces import ClusterGradients, force, gradients_of_synset
from hf_rgm.attribution.memory import MemoryShares
from hf_rgm.attribution.perturbations import check_masks
from hf_rgm.exceptions import DivergenceError
from hf_rgm.modeling import FunctionalModel
from hf_rgm.synset.costs import PieceOfWork, measured
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.samples import SyntheticSamples, broadcast_masks, soft_cross_entropy
from hf_rgm.trajectory.optimizers import apply_update
from hf_rgm.trajectory.path import RecordedPath, automatic_stride, deviation_step

logger = logging.getLogger(__name__)

MAX_MODELS_AT_ONCE = 64


class ReplayEngine:
    """
    Trains on the synset with some clusters down-weighted, from a recorded state to the end; see docs/method.md.

    Args:
        model (`FunctionalModel`): The trained model.
        inputs (`InputSpace`): The space of the synthetic inputs.
        samples (`SyntheticSamples`): The synset's samples, on the model's device.
        trajectory (`Trajectory`): The recorded run.
        rewind (`float`, *optional*, defaults to `0.14`): Fraction of training at which the replay starts.
        stride (`int`, *optional*): Training steps per integration step, 1 if not anchored. Defaults to the smallest
            that needs at most 100 integration steps.
        anchored (`bool`, *optional*, defaults to `True`): Follow the recorded path and integrate only the deviation
            from it, so that the unperturbed replay is the trained model exactly. Otherwise start from the recorded
            state nearest to the rewind point, the last one excepted, and replay the optimizer itself.
        cluster_gradients (`ClusterGradients`, *optional*): The data's gradients at recorded states. Where the synset's
            differ from them, anchored replay adds the difference: exact to first order, as it is at p = 1.
        with_rows (`bool`, *optional*, defaults to `False`): Whether these come of rows, which share the memory.
        max_bytes (`int`, *optional*, defaults to `2**30`): Memory, beside the recorded states; see [`MemoryShares`].
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bar.
    """

    name = "replay"
    max_drift = 0.75
    """Of replays that are trusted; see [`~hf_rgm.attribution.drift.DriftMeter`] and docs/method.md."""

    def __init__(
        self,
        model: FunctionalModel,
        inputs: InputSpace,
        samples: SyntheticSamples,
        trajectory,
        *,
        rewind: float = 0.14,
        stride: int | None = None,
        anchored: bool = True,
        cluster_gradients: ClusterGradients | None = None,
        with_rows: bool = False,
        max_bytes: int = 2**30,
        disable_tqdm: bool = False,
    ) -> None:
        if stride is None:
            stride = automatic_stride(trajectory, rewind) if anchored else 1
        if not anchored and stride != 1:
            raise ValueError(f"Plain replay takes every recorded step, got `stride={stride}`. Use `anchored=True`.")
        self.model = model
        self.inputs = inputs
        self.samples = samples
        self.trajectory = trajectory
        self.path = RecordedPath(trajectory, model.space, model.device, rewind=rewind, stride=stride)
        self.anchored = anchored
        self.cluster_gradients = cluster_gradients
        self.disable_tqdm = disable_tqdm
        # Deviation, momentum, where gradients are taken, these, and what a step makes of them.
        shares = MemoryShares.of(max_bytes, with_rows=with_rows, with_jacobians=False)
        self._max_gradient_bytes, vectors = shares.gradients, shares.vectors
        self.batch_size = max(1, min(MAX_MODELS_AT_ONCE, vectors // (24 * model.num_parameters)))

    @property
    def start(self) -> int:
        """Training step at which the replay starts."""
        if self.anchored:
            return self.path.start
        return self.path.nearest_state(self.path.start, before=self.trajectory.num_steps)

    def parameters(self, masks: Tensor) -> Tensor:
        """
        Final parameters under each perturbation.

        Args:
            masks (`Tensor`): `(num_masks, num_clusters)`, the weight p of each cluster, in [0, 1].

        Returns:
            `Tensor`: `(num_masks, num_parameters)`, float32.

        Raises:
            ValueError: If the masks have another number of clusters, or entries that are negative or not finite.
            DivergenceError: If parameters become NaN or infinite.
        """
        check_masks(masks, len(self.samples.log_weights))
        masks = masks.to(self.model.device, torch.float32)
        result = self._anchored(masks) if self.anchored else self._plain(masks)
        bad = torch.nonzero(~torch.isfinite(result).all(1)).flatten().tolist()
        if bad:
            raise DivergenceError(
                f"The replay of masks {bad[:5]} gave NaN or infinite parameters. Rewind less far (now from step "
                f"{self.path.start}) or use a smaller stride (now {self.path.stride})."
            )
        return result

    def costs(self, num_masks: int, data_gradients: PieceOfWork | None = None) -> PieceOfWork:
        """
        What [`ReplayEngine.parameters`] of so many masks takes, in batches, from one gradient and one step.

        Args:
            num_masks (`int`): Masks; those that fit in memory together go together.
            data_gradients (`PieceOfWork`, *optional*): What the data's gradients at a state take, where they are used.
        """
        at_once = min(num_masks, self.batch_size)
        final = self.path.state(self.trajectory.num_steps)
        everything = torch.ones(1, len(self.samples.log_weights), device=self.model.device)
        gradient = measured(lambda: self._gradients(final[None], everything))
        vectors = torch.zeros(at_once, len(final), device=self.model.device)
        last = self.path.steps()[-1]
        stepping = measured(lambda: deviation_step(last, vectors, vectors, vectors))
        steps = len(self.path.steps()) if self.anchored else self.trajectory.num_steps - self.start
        batches = -(-num_masks // at_once)
        num_gradients = num_masks + (batches if self.anchored else 0)
        # Parameters and second moments of each state; deviation, momentum, where gradients are taken, and these.
        held = 8 * len(self.trajectory.state_steps) * len(final) + 4 * vectors.nbytes
        data = data_gradients or PieceOfWork(0.0, 0)
        # Gradients of a batch are put together once all are there, on the CPU.
        return PieceOfWork(
            seconds=steps * (num_gradients * gradient.seconds + batches * stepping.seconds)
            + batches * len(self.path.segments()) * data.seconds,
            peak_bytes=held + max(gradient.peak_bytes, vectors.nbytes, stepping.peak_bytes, data.peak_bytes),
        )

    def _anchored(self, masks: Tensor) -> Tensor:
        deviation = torch.zeros(len(masks), self.model.num_parameters, device=self.model.device)
        momentum = torch.zeros_like(deviation)
        everything = torch.ones(1, masks.shape[1], device=self.model.device)
        lacking, at = None, None
        for step in self._progress(self.path.steps(), len(masks)):
            if lacking is None or at != step.nearest_state:
                at, lacking = step.nearest_state, self._lacking(step.nearest_state, masks)
            anchor = self.path.parameters_at(step.step)
            base = self._gradients(anchor[None], everything)
            change = self._gradients(anchor + deviation, masks).sub_(base).add_(lacking)
            deviation, momentum = deviation_step(step, deviation, momentum, change)
        return self.path.state(self.trajectory.num_steps) + deviation

    def _lacking(self, state: int, masks: Tensor) -> Tensor:
        """What the synset's change of the gradient at a recorded step lacks: `(num_masks, num_parameters)`, or 0."""
        data = self.cluster_gradients
        if data is None:
            return torch.zeros(1, device=self.model.device)
        own = gradients_of_synset(self.model, self.inputs, self.samples, self.path)
        return force(
            lambda step, clusters: data(step, clusters) - own(step, clusters),
            state,
            masks,
            num_parameters=self.model.num_parameters,
            max_bytes=self._max_gradient_bytes,
        )

    def _plain(self, masks: Tensor) -> Tensor:
        start = self.start
        recorded = self.trajectory.state(start)
        table, rule, space = self.trajectory.steps, self.trajectory.optimizer, self.model.space
        current = space.flatten(recorded.parameters).to(self.model.device).expand(len(masks), -1).clone()
        moments = {
            name: {k: v.to(self.model.device).expand(len(masks), *v.shape) for k, v in values.items()}
            for name, values in recorded.moments.items()
        }
        for t in self._progress(range(start, self.trajectory.num_steps), len(masks)):
            if table.skipped[t]:
                continue
            gradient = float(table.clip_factor[t]) * self._gradients(current, masks)
            updated, moments = apply_update(
                rule,
                space.unflatten(current),
                space.unflatten(gradient),
                moments,
                learning_rates=table.learning_rates[t].tolist(),
                step=int(self.trajectory.update_numbers[t]),
            )
            current = space.flatten(updated)
        return current

    def _progress(self, steps, num_masks: int):
        said = f"Replaying {num_masks} models from step {self.start}"
        return tqdm(steps, desc=said, leave=False, disable=self.disable_tqdm)

    def _gradients(self, parameters: Tensor, masks: Tensor) -> Tensor:
        """Synset gradient at each row of `parameters` under the mask of the same row: same shape as `parameters`."""
        if self.model.device.type != "cpu":
            named = self.model.space.unflatten(parameters)
            return self.model.space.flatten(vmap(grad(self._loss))(named, masks))
        rows = []
        for vector, mask in zip(parameters, masks, strict=True):
            named = {k: v.detach().requires_grad_() for k, v in self.model.space.unflatten(vector).items()}
            with torch.enable_grad():
                loss = self._loss(named, mask)
            gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            rows.append(self.model.space.flatten(dict(zip(named, gradients, strict=True))))
        return torch.stack(rows)

    def _loss(self, parameters: dict[str, Tensor], mask: Tensor) -> Tensor:
        flat = self.samples.flatten()
        log_weights = flat.log_weights + broadcast_masks(mask.log(), self.samples).flatten(0, 1)
        logits = self.model.logits(parameters, self.inputs.to_forward(flat))
        return soft_cross_entropy(logits, flat.targets, log_weights, flat.target_ids)
