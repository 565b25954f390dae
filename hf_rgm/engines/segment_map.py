"""One segment of the recorded path as a linear map, in the space of the curvature's rows."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from hf_rgm.engines.curvature import CurvatureRows
from hf_rgm.engines.segments import Segment

EIGENVALUE_FLOOR = 1e-7
"""Of the largest: below it an eigenvalue is rounding, and its response is that of the floor."""

COLUMNS_AT_ONCE = 2**16
"""Parameters whose share of the Gram matrix is taken at once."""


class SegmentMap:
    """
    One segment's recursion in the space of its curvature's rows.

    With `C = B' B` a deviation stays in the span of what it began with and of B's rows: `delta = a delta_0 + b D m_0 +
    c D f + D B' s`, and as much for the momentum. A training step costs `rank^2` for each model, and parameters are
    touched at the ends of the segment only.

    Args:
        segment (`Segment`): Preconditioner and constants of its steps.
        curvature (`CurvatureRows`): B, at the segment's state.
    """

    def __init__(self, segment: Segment, curvature: CurvatureRows) -> None:
        self._segment = segment
        self._rows = curvature.rows
        self._clusters = curvature.clusters
        self._precondition = segment.precondition
        # What does not move neither bends nor is bent.
        self._moving = (segment.precondition > 0).to(curvature.rows)

    @functools.cached_property
    def _gram(self) -> Tensor:
        """`B D B'`, `(rank, rank)`, by columns: the scaled rows as a whole would take their memory again."""
        gram = self._rows.new_zeros(len(self._rows), len(self._rows))
        for start in range(0, self._rows.shape[1], COLUMNS_AT_ONCE):
            part = slice(start, start + COLUMNS_AT_ONCE)
            scale = self._precondition if len(self._precondition) == 1 else self._precondition[part]
            gram.addmm_(self._rows[:, part] * scale, self._rows[:, part].T)
        return gram

    @functools.cached_property
    def _spectrum(self) -> tuple[np.ndarray, Tensor]:
        values, vectors = torch.linalg.eigh(self._gram)
        largest = float(values[-1]) if len(values) else 0.0
        return values.double().cpu().numpy().clip(min=max(EIGENVALUE_FLOOR * largest, 1e-30)), vectors

    def prepare(self) -> None:
        """Takes now what the first use would take."""
        _ = self._spectrum

    def forward(self, deviation: Tensor, momentum: Tensor, force: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """
        Deviation and momentum at the end of the segment.

        Args:
            deviation, momentum, force (`Tensor`): `(num_masks, num_parameters)`, at its start.
            masks (`Tensor`): `(num_masks, num_clusters)`: an absent cluster takes its curvature along.
        """
        segment = self._segment
        if segment.outer_decay is not None:
            deviation = segment.outer_decay * deviation
        if segment.frozen_decay is not None:
            scale = np.mean([step.scale for step in segment.steps] or [1.0])
            force = force + segment.frozen_decay / float(scale or 1.0) * deviation
        rows, gram = self._stable(float(masks.max()))
        weights = masks[:, self._clusters]
        # Projections of delta_0, D m_0 and D f; then the same three numbers, and s and q, for delta and momentum.
        starts = (self._moving * deviation, self._precondition * momentum, self._precondition * force)
        projected = torch.stack([start @ rows.T for start in starts])
        del starts
        own, along = np.eye(2, 3), [torch.zeros_like(projected[0]), torch.zeros_like(projected[0])]
        for step in segment.steps:
            change = along[0] @ gram + torch.tensordot(projected.new_tensor(own[0]), projected, dims=1)
            gradient = step.coupled * own[0] + step.scale * np.eye(3)[2]
            pull = torch.add(step.coupled * along[0], weights * change, alpha=step.scale)
            turned = step.momentum_share * along[1] + step.gradient_share * pull
            along = [
                torch.sub((1 - step.decay) * along[0], turned, alpha=step.rate),
                torch.add(step.momentum * along[1], pull, alpha=step.gain),
            ]
            direction = step.momentum_share * own[1] + step.gradient_share * gradient
            own = np.stack(
                [(1 - step.decay) * own[0] - step.rate * direction, step.momentum * own[1] + step.gain * gradient]
            )
        (a, b, c), (d, e, f) = own.tolist()
        ahead = a * deviation + self._precondition * (b * momentum + c * force + along[0] @ rows)
        left = e * momentum + f * force + self._moving * (along[1] @ rows)
        if d:  # a coupled decay, whose preconditioner is one number
            left += d * deviation / self._precondition
        if segment.outer_decay is not None:
            ahead = segment.outer_decay * ahead
        return ahead, left

    def backward(self, sensitivity: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        The transpose of [`SegmentMap.forward`] with all clusters present, in closed form along the eigenvectors.

        Args:
            sensitivity, momentum (`Tensor`): `(num_values, num_parameters)`, of objectives to the deviation and the
                momentum at the segment's end.

        Returns:
            `tuple[Tensor, Tensor, Tensor]`: to both at its start, and to the force.
        """
        segment, precondition = self._segment, self._precondition
        if segment.outer_decay is not None:
            sensitivity = segment.outer_decay * sensitivity
        values, vectors = self._spectrum
        stable = values.clip(max=segment.stable_curvature)
        phi, gamma = segment.responses(stable)
        rest_phi, rest_gamma = (response[..., 0] for response in segment.responses(np.zeros(1)))
        rows = self._rows
        bent = precondition * sensitivity
        inside = torch.stack([bent @ rows.T, (self._moving * momentum) @ rows.T]) @ vectors

        def beyond(to_delta: np.ndarray, to_momentum: np.ndarray, rest: np.ndarray) -> Tensor:
            """What the curvature adds to the response without any."""
            factors = torch.from_numpy(np.stack([to_delta - rest[0], to_momentum - rest[1]]) / values).to(inside)
            return (inside * factors[:, None]).sum(0) @ vectors.T @ rows

        before = rest_phi[0, 0] * sensitivity + self._moving * beyond(phi[0, 0], phi[1, 0], rest_phi[:, 0])
        if rest_phi[1, 0]:
            before += rest_phi[1, 0] * momentum / precondition
        carried = rest_phi[0, 1] * bent + rest_phi[1, 1] * momentum
        carried += precondition * beyond(phi[0, 1], phi[1, 1], rest_phi[:, 1])
        force = rest_gamma[0] * bent + rest_gamma[1] * momentum
        force += precondition * beyond(gamma[0], gamma[1], rest_gamma)
        if segment.frozen_decay is not None:
            scale = np.mean([step.scale for step in segment.steps] or [1.0])
            before = before + segment.frozen_decay / float(scale or 1.0) * force
        if segment.outer_decay is not None:
            before = segment.outer_decay * before
        return before, carried, force

    def _stable(self, largest_weight: float) -> tuple[Tensor, Tensor]:
        """Rows and Gram matrix without what would make the recursion itself explode under such cluster weights."""
        limit = self._segment.stable_curvature / max(1.0, largest_weight)
        if float(torch.linalg.matrix_norm(self._gram)) <= limit or self._spectrum[0][-1] <= limit:
            return self._rows, self._gram
        values, vectors = self._spectrum
        kept = torch.from_numpy(values.clip(max=limit)).to(vectors)
        root = (kept / torch.from_numpy(values).to(vectors)).sqrt()
        return (vectors * root) @ (vectors.T @ self._rows), (vectors * kept) @ vectors.T
