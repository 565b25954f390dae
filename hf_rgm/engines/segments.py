"""Segments of the recorded path: the training steps nearest to one recorded state, as one linear recursion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_rgm.trajectory.path import RecordedPath

Values = TypeVar("Values", NDArray[np.float64], Tensor)

# Segments are cut so that no element loses more than this share to a frozen decay, into so many pieces at most
# (docs/method.md, the linear engine: unequal decays).
MAX_FROZEN_DECAY, MAX_PIECES = 0.1, 16


@dataclass(frozen=True)
class StepConstants:
    """Constants of one training step of the recursion, with `g = scale * (f + C delta) + coupled * delta`."""

    rate: float
    scale: float
    momentum: float
    gain: float
    momentum_share: float
    gradient_share: float
    decay: float
    coupled: float

    def advance(self, delta: Values, m: Values, g: Values) -> tuple[Values, Values]:
        """Deviation and momentum after the step, without the preconditioner D."""
        direction = self.momentum_share * m + self.gradient_share * g
        return (1 - self.decay) * delta - self.rate * direction, self.momentum * m + self.gain * g


@dataclass(frozen=True)
class Segment:
    """Steps nearest to one recorded state, with one preconditioner D (docs/method.md, the linear engine)."""

    state: int  # recorded step whose gradients and curvature stand for the segment
    first: int
    last: int  # excluded
    precondition: Tensor  # D, (num_parameters,) or (1,): learning rates over Adam's root of the second moment, summed
    steps: tuple[StepConstants, ...]  # without the skipped ones; their rates sum to 1
    # Unequal decays, (num_parameters,). Decoupled: what is left over half of the segment, applied before and after it.
    outer_decay: Tensor | None = None
    # Coupled: the decay itself, of what an element is when the segment begins.
    frozen_decay: Tensor | None = None

    def responses(self, curvature: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """
        The map Phi `(2, 2, num_directions)` and Gamma `(2, num_directions)` along eigenvalues of `D^1/2 C D^1/2`.

        `(delta, m)` at the end is `Phi (delta, m) + Gamma f`, in coordinates scaled by `D^-1/2`, `D^1/2` and `D^1/2`.
        """
        state = np.repeat(np.eye(2, 3)[:, :, None], len(curvature), axis=2)  # columns: delta, m, f
        force = np.zeros_like(state[0])
        force[2] = 1.0
        for step in self.steps:
            gradient = step.scale * (force + curvature * state[0]) + step.coupled * state[0]
            state = np.stack(step.advance(*state, gradient))
        return state[:, :2], state[:, 2]

    @property
    def frozen_rate(self) -> Tensor | None:
        """What a frozen decay adds to the force for each unit of the deviation, `(num_parameters,)`."""
        if self.frozen_decay is None:
            return None
        # Decay is not clipped, forces are: divided by the clipping factor beforehand.
        scale = np.mean([step.scale for step in self.steps] or [1.0])
        return self.frozen_decay / float(scale or 1.0)

    @property
    def stable_curvature(self) -> float:
        """Largest eigenvalue of `D^1/2 C D^1/2` at which no step of the segment amplifies a deviation."""
        limits = [
            _stable(step.momentum, step.gain, step.momentum_share, step.gradient_share) / (step.rate * step.scale)
            for step in self.steps
            if step.rate * step.scale > 0
        ]
        return min(limits, default=np.inf)


def _stable(momentum: float, gain: float, momentum_share: float, gradient_share: float) -> float:
    """Largest rate times curvature at which both eigenvalues of a step stay within the unit circle."""
    # Characteristic polynomial z^2 - T z + Q with T = 1 + momentum - h * gradient_share and
    # Q = momentum - h * (momentum * gradient_share - gain * momentum_share); Jury: |T| <= 1 + Q and |Q| <= 1.
    slope = momentum * gradient_share - gain * momentum_share
    limits = []
    if gradient_share + slope > 0:
        limits.append(2 * (1 + momentum) / (gradient_share + slope))
    if slope > 0:
        limits.append((1 + momentum) / slope)
    if slope < 0:
        limits.append((1 - momentum) / -slope)
    return min(limits, default=np.inf)


def segments_of(path: RecordedPath, *, uniform_decay: bool = False) -> list[Segment]:
    """Segments of a path, in training order; with `uniform_decay` all elements decay as most of them do."""
    return [piece for own in path.segments() for piece in _pieces(path, *own, uniform_decay)]


def _pieces(path: RecordedPath, state: int, first: int, last: int, uniform_decay: bool) -> Iterator[Segment]:
    whole = _segment(path, state, first, last, uniform_decay)
    pieces = 1
    if whole.frozen_decay is not None and whole.steps:
        # What a step of the gradient adds to the direction in the end, with the momentum it leaves behind.
        step = whole.steps[-1]
        lasting = step.gradient_share + step.momentum_share * step.gain / (1 - step.momentum)
        lost = float((whole.frozen_decay * whole.precondition).max()) * lasting
        pieces = int(min(max(1, np.ceil(lost / MAX_FROZEN_DECAY)), MAX_PIECES, last - first))
    if pieces == 1:
        yield whole
        return
    edges = np.linspace(first, last, pieces + 1).round().astype(int).tolist()
    for begin, end in zip(edges, edges[1:], strict=False):
        yield _segment(path, state, begin, end, uniform_decay)


def _segment(path: RecordedPath, state: int, first: int, last: int, uniform_decay: bool) -> Segment:
    trajectory, rule, space = path.trajectory, path.trajectory.optimizer, path.space
    table, covered = trajectory.steps, slice(first, last)
    active = ~table.skipped[covered]
    if not active.any():
        return Segment(state, first, last, torch.zeros(1, device=path.device), ())
    learning_rates = table.learning_rates[covered][active]  # (num_steps, num_groups)
    updates = trajectory.update_numbers[covered][active]
    lengths = learning_rates
    if path.is_adaptive:
        lengths = learning_rates / (1 - rule.groups[0].betas[0] ** updates[:, None])
    # Step t has the share rho_t of the preconditioner.
    total = float(lengths.sum())
    rates = lengths.sum(1) / total if total > 0 else np.full(len(lengths), 1 / len(lengths))
    precondition = space.expand_groups(lengths.sum(0).tolist(), rule.group_of, path.device)
    if path.is_adaptive:
        # Adam's inverse root of the second moment: the mean over up to four steps.
        looked_at = np.unique(np.linspace(first, last - 1, 4).round()) + 1
        inverse = torch.stack([path.inverse_root_moment(float(step)) for step in looked_at]).mean(0)
        precondition = precondition * inverse
    # A decay that is the same for all elements is in the recursion; others would leave the space of B.
    weight_decays = [group.weight_decay for group in rule.groups]
    decays, couplings = np.zeros(len(rates)), np.zeros(len(rates))
    outer, frozen = None, None
    if rule.name == "adamw" and any(weight_decays):
        per_step = learning_rates * np.array(weight_decays)  # (num_steps, num_groups)
        most = np.bincount([rule.group_of(name) for name in space.names], space.sizes, len(rule.groups)).argmax()
        if uniform_decay or (per_step == per_step[:, :1]).all():
            decays = per_step[:, most]
        else:
            kept = np.prod(1 - per_step, axis=0)
            outer = space.expand_groups(kept.tolist(), rule.group_of, path.device).clamp_min(0).sqrt()
    elif any(weight_decays):
        decay = space.expand_groups(weight_decays, rule.group_of, path.device)
        if decay.numel() == 1 and precondition.numel() == 1:
            couplings = np.full(len(rates), float(decay) * float(precondition))
        else:
            frozen = decay.expand(space.num_parameters)
    scales = trajectory.gradient_scales[covered][active]
    steps = tuple(
        StepConstants(float(rate), float(scale), *path.momentum_of(int(update)), float(decay), float(coupled))
        for rate, scale, update, decay, coupled in zip(rates, scales, updates, decays, couplings, strict=True)
    )
    return Segment(state, first, last, precondition, steps, outer, frozen)
