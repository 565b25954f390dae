"""Map of one segment of the recorded path, in the space of the curvature's rows."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from hf_rgm.engines.curvature import CurvatureRows
from hf_rgm.engines.segments import Segment

# Parameters whose share of the Gram matrix is computed at once.
COLUMNS_AT_ONCE = 2**16


class SegmentMap:
    """Recursion of one segment on its curvature's rows B, `(rank, length)` (docs/method.md, the linear engine)."""

    # With C = B' B a deviation stays in the span of what it began with and of B's rows:
    # delta = a delta_0 + b D m_0 + c D f + D B' s, and likewise the momentum. A training step costs rank^2 for each
    # model; vectors of parameters are touched at the ends of the segment only.

    def __init__(self, segment: Segment, curvature: CurvatureRows) -> None:
        self._segment = segment
        self._rows = curvature.rows
        self._clusters = curvature.clusters
        self._precondition = segment.precondition
        # Elements that do not move are not affected by curvature, and add nothing to it.
        self._moving = (segment.precondition > 0).to(curvature.rows)

    @functools.cached_property
    def _gram(self) -> Tensor:
        """K = `B D B'`, `(rank, rank)`."""
        # In parts: all of `B D` would take the memory of the rows again.
        gram = self._rows.new_zeros(len(self._rows), len(self._rows))
        for start in range(0, self._rows.shape[1], COLUMNS_AT_ONCE):
            part = slice(start, start + COLUMNS_AT_ONCE)
            scale = self._precondition if len(self._precondition) == 1 else self._precondition[part]
            gram.addmm_(self._rows[:, part] * scale, self._rows[:, part].T)
        return gram

    @functools.cached_property
    def _spectrum(self) -> tuple[np.ndarray, Tensor]:
        """Eigenvalues `(rank,)`, ascending, and eigenvectors `(rank, rank)` of K."""
        values, vectors = torch.linalg.eigh(self._gram)
        largest = float(values[-1]) if len(values) else 0.0
        # Smaller eigenvalues are rounding: their response is that of the floor.
        return values.double().cpu().numpy().clip(min=max(1e-7 * largest, 1e-30)), vectors

    def prepare(self) -> None:
        """Does the work of the first use now."""
        _ = self._spectrum

    def forward(self, deviation: Tensor, momentum: Tensor, force: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Deviation and momentum, `(num_masks, length)`, from the segment's start to its end under cluster weights."""
        segment = self._segment
        if segment.outer_decay is not None:
            deviation = segment.outer_decay * deviation
        if segment.frozen_rate is not None:
            force = force + segment.frozen_rate * deviation
        rows, gram = self._stable(float(masks.max()))
        weights = masks[:, self._clusters]  # P: an absent cluster takes its curvature with it
        # B times delta_0, D m_0 and D f, (3, num_masks, rank).
        starts = (self._moving * deviation, self._precondition * momentum, self._precondition * force)
        projected = torch.stack([start @ rows.T for start in starts])
        del starts
        # Of delta and of m: the numbers a, b and c, and the coefficients s and q of B's rows, (num_masks, rank).
        own, along = np.eye(2, 3), (torch.zeros_like(projected[0]), torch.zeros_like(projected[0]))
        for step in segment.steps:
            change = along[0] @ gram + torch.tensordot(projected.new_tensor(own[0]), projected, dims=1)  # B delta
            along = step.advance(*along, step.scale * (weights * change) + step.coupled * along[0])
            own = np.stack(step.advance(*own, step.scale * np.eye(3)[2] + step.coupled * own[0]))
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
        Transpose of `forward` at p = 1: sensitivities `(num_values, length)` to deviation and momentum at the start.

        The third is that to the force. In closed form along the eigenvectors of K.
        """
        segment, precondition = self._segment, self._precondition
        if segment.outer_decay is not None:
            sensitivity = segment.outer_decay * sensitivity
        values, vectors = self._spectrum
        stable = values.clip(max=segment.stable_curvature)
        phi, gamma = segment.responses(stable)
        rest_phi, rest_gamma = (response[..., 0] for response in segment.responses(np.zeros(1)))
        rows = self._rows
        # phi(C) x = phi(0) x + V (phi(Lambda) - phi(0)) V' x, written without D^1/2.
        bent = precondition * sensitivity
        inside = torch.stack([bent @ rows.T, (self._moving * momentum) @ rows.T]) @ vectors

        def beyond(to_delta: np.ndarray, to_momentum: np.ndarray, rest: np.ndarray) -> Tensor:
            """Change of a response by the curvature, mapped back by B."""
            factors = torch.from_numpy(np.stack([to_delta - rest[0], to_momentum - rest[1]]) / values).to(inside)
            return (inside * factors[:, None]).sum(0) @ vectors.T @ rows

        before = rest_phi[0, 0] * sensitivity + self._moving * beyond(phi[0, 0], phi[1, 0], rest_phi[:, 0])
        if rest_phi[1, 0]:
            before += rest_phi[1, 0] * momentum / precondition
        carried = rest_phi[0, 1] * bent + rest_phi[1, 1] * momentum
        carried += precondition * beyond(phi[0, 1], phi[1, 1], rest_phi[:, 1])
        force = rest_gamma[0] * bent + rest_gamma[1] * momentum
        force += precondition * beyond(gamma[0], gamma[1], rest_gamma)
        if segment.frozen_rate is not None:
            before = before + segment.frozen_rate * force
        if segment.outer_decay is not None:
            before = segment.outer_decay * before
        return before, carried, force

    def _stable(self, largest_weight: float) -> tuple[Tensor, Tensor]:
        """Rows and Gram matrix with eigenvalues lowered to where the recursion is stable under these weights."""
        limit = self._segment.stable_curvature / max(1.0, largest_weight)
        if float(torch.linalg.matrix_norm(self._gram)) <= limit or self._spectrum[0][-1] <= limit:
            return self._rows, self._gram
        values, vectors = self._spectrum
        kept = torch.from_numpy(values.clip(max=limit)).to(vectors)
        root = (kept / torch.from_numpy(values).to(vectors)).sqrt()
        return (vectors * root) @ (vectors.T @ self._rows), (vectors * kept) @ vectors.T
