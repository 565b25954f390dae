"""Linearised replay: finite changes of the cluster weights, first order in the parameters."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_rgm.attribution.curvature import PathCurvature, RowSample
from hf_rgm.attribution.forces import ClusterGradients, force, gradients_of_synset
from hf_rgm.attribution.memory import MemoryShares
from hf_rgm.attribution.perturbations import check_masks
from hf_rgm.exceptions import DivergenceError
from hf_rgm.modeling import FunctionalModel
from hf_rgm.synset.costs import PieceOfWork, measured
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.trajectory.path import RecordedPath, deviation_step

logger = logging.getLogger(__name__)

MAX_INTEGRATION_STEPS = 200
MAX_DEVIATION = 3.0
"""In units of what the recorded run moved the parameters by; stable deviations were at most 0.6 on the digits."""


class LinearizedReplayEngine:
    """
    Follows the recorded path and integrates the deviation from it with every cluster's gradient linearised there.

    Under cluster weights p the gradient at `theta_t + delta` is taken to be `sum_k p_k (G_k + C_k delta)`, with the
    cluster's gradient `G_k` and its synthetic samples' Gauss-Newton matrix `C_k` at the recorded state. Exact in p, so
    that an absent cluster takes its curvature with it (which the adjoint, a derivative at p = 1, leaves in place), and
    free of the Hessian's residual term, which is noise for soft-labelled synthetic samples (and part of anchored
    replay). All weights go through the recursion together, as matrix products.

    Args:
        model (`FunctionalModel`): The trained model.
        inputs (`InputSpace`): The space of the synthetic inputs.
        samples (`SyntheticSamples`): The synset's samples, on the model's device.
        trajectory (`Trajectory`): The recorded run.
        rewind (`float`, *optional*, defaults to `0.14`): Fraction of training down to which effects are followed.
        stride (`int`, *optional*): Training steps per integration step. Defaults to the smallest that needs at most
            200 integration steps; halved where the deviation explodes, which weights above 1 make more likely.
        cluster_gradients (`ClusterGradients`, *optional*): The data's gradients `G_k`. Defaults to the synset's,
            which are an approximation.
        rows (`RowSample`, *optional*): Rows whose curvature stands in for the synset's where the two differ
            much; see [`~hf_rgm.attribution.curvature.PathCurvature`].
        max_bytes (`int`, *optional*, defaults to `2**30`): Memory, beside the recorded states; see [`MemoryShares`].
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bar.
    """

    name = "linearized_replay"
    anchored = True
    max_drift = 0.25
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
        cluster_gradients: ClusterGradients | None = None,
        rows: RowSample | None = None,
        max_bytes: int = 2**30,
        disable_tqdm: bool = False,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.samples = samples
        if stride is None:
            stride = max(1, -(-round((1 - rewind) * trajectory.num_steps) // MAX_INTEGRATION_STEPS))
        self.path = RecordedPath(trajectory, model.space, model.device, rewind=rewind, stride=stride)
        self.disable_tqdm = disable_tqdm
        shares = MemoryShares.of(max_bytes, with_rows=rows is not None)
        self.batch_size = max(1, shares.vectors // (16 * model.num_parameters))
        self._max_gradient_bytes = shares.gradients
        self.cluster_gradients = cluster_gradients or gradients_of_synset(model, inputs, samples, self.path)
        self._curvature = PathCurvature(
            model, inputs, samples, rows=rows, max_bytes=shares.jacobian, max_row_bytes=shares.row_jacobian
        )

    @property
    def start(self) -> int:
        """Training step at which the replay starts."""
        return self.path.start

    def parameters(self, masks: Tensor) -> Tensor:
        """
        Final parameters under each perturbation, `(num_masks, num_parameters)`; see
        [`LinearizedReplayEngine.deviations`].
        """
        return self.path.state(self.path.trajectory.num_steps) + self.deviations(masks)

    def deviations(self, masks: Tensor) -> Tensor:
        """
        Change of the final parameters under each perturbation.

        Args:
            masks (`Tensor`): `(num_masks, num_clusters)`, the weight p of each cluster, not negative.

        Returns:
            `Tensor`: `(num_masks, num_parameters)`, float32; exactly 0 for p = 1.

        Raises:
            ValueError: If the masks have another number of clusters, or entries that are negative or not finite.
            DivergenceError: If the deviation explodes, one training step at a time.
        """
        check_masks(masks, len(self.samples.log_weights))
        masks = masks.to(self.model.device, torch.float32)
        while True:
            try:
                return self._deviations(masks)
            except DivergenceError as error:
                if self.path.stride == 1:
                    raise
                self.path.stride //= 2
                logger.info("%s Trying again with a stride of %d.", error, self.path.stride)

    def costs(self, num_masks: int, gradients: PieceOfWork | None = None) -> PieceOfWork:
        """
        What [`LinearizedReplayEngine.deviations`] of so many masks takes, from one state and one step.

        Args:
            num_masks (`int`): Masks; those that fit in memory together go together.
            gradients (`PieceOfWork`, *optional*): What the clusters' gradients at a state take, where they are not
                the synset's.
        """
        path, at_once = self.path, min(num_masks, self.batch_size)
        state, last = path.trajectory.num_steps, path.steps()[-1]
        preparing = measured(lambda: self._curvature.at(path, state))
        curvature = self._curvature.at(path, state)
        masks = torch.ones(at_once, len(self.samples.log_weights), device=self.model.device)
        vectors = torch.zeros(at_once, self.model.num_parameters, device=self.model.device)
        stepping = measured(
            lambda: deviation_step(last, vectors, vectors, vectors + curvature.product(vectors, masks))
        )
        if gradients is None:
            self.force(state, masks)  # decides how to vectorise
            gradients = measured(lambda: self.force(state, masks))
        segments = len(path.segments())
        # Parameters and second moments of each state; deviation, momentum and force.
        held = 8 * segments * self.model.num_parameters + 3 * vectors.nbytes
        following = preparing.held_bytes + max(gradients.peak_bytes, stepping.peak_bytes)
        return PieceOfWork(
            seconds=-(-num_masks // at_once)
            * (segments * (preparing.seconds + gradients.seconds) + len(path.steps()) * stepping.seconds),
            peak_bytes=held + max(following, preparing.peak_bytes),
        )

    def _deviations(self, masks: Tensor) -> Tensor:
        path = self.path
        deviation = torch.zeros(len(masks), self.model.num_parameters, device=self.model.device)
        momentum = torch.zeros_like(deviation)
        moved = (path.state(path.trajectory.num_steps) - path.parameters_at(path.start)).norm()
        bound = MAX_DEVIATION * moved * (masks - 1).abs().amax(dim=1).clamp_min(1.0)
        curvature, driving, at = None, None, None
        steps = tqdm(
            path.steps(),
            desc=f"Replaying {len(masks)} models from step {path.start} (linearised)",
            leave=False,
            disable=self.disable_tqdm,
        )
        for step in steps:
            if curvature is None or driving is None or at != step.nearest_state:
                at, curvature = step.nearest_state, None  # what it holds goes before the next one is made
                curvature = self._curvature.at(path, at)
                driving = self.force(at, masks)
            change = driving + curvature.product(deviation, masks)
            deviation, momentum = deviation_step(step, deviation, momentum, change)
            norm = deviation.norm(dim=1)
            if not bool((norm <= bound).all()):
                worst = int((norm / bound).nan_to_num(nan=torch.inf).argmax())
                raise DivergenceError(
                    f"The linearised replay of mask {worst} diverged at training step {step.step}: the parameters "
                    f"moved by {float(norm[worst]):.3g}, but by {float(moved):.3g} in the recorded run, with a stride "
                    f"of {path.stride}. Use a later `rewind` (now from step {path.start}), or record more states."
                )
        return deviation

    def force(self, state: int, masks: Tensor) -> Tensor:
        """Change of the training gradient at a recorded step under each mask: `(num_masks, num_parameters)`."""
        return force(
            self.cluster_gradients,
            state,
            masks,
            num_parameters=self.model.num_parameters,
            max_bytes=self._max_gradient_bytes,
        )
