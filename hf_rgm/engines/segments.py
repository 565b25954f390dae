"""Segments of the recorded path: the training steps nearest to one recorded state, as one linear recursion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_rgm.trajectory.path import RecordedPath

SECOND_MOMENTS_LOOKED_AT = 4
"""Steps of a segment whose second moments its preconditioner is the mean of."""

MAX_FROZEN_DECAY, MAX_PIECES = 0.1, 16
"""A coupled decay that differs between elements is held at a segment's start. Segments are cut for that, so that no
element loses more than this in a piece, if so many pieces are enough."""


@dataclass(frozen=True)
class StepConstants:
    """
    One training step of the recursion; `direction = momentum_share * m + gradient_share * g`, `m <- momentum * m +
    gain * g`, `delta <- (1 - decay) * delta - rate * D * direction`, `g = scale * (f + C delta) + coupled * delta`.
    """

    rate: float
    scale: float
    momentum: float
    gain: float
    momentum_share: float
    gradient_share: float
    decay: float
    coupled: float


@dataclass(frozen=True)
class Segment:
    """
    Steps nearest to one recorded state (docs/method.md, the linear engine).

    Within a segment one preconditioner serves all steps, each with a rate of its own: rates sum to 1.

    Args:
        state (`int`): The recorded step whose gradients and curvature stand for the segment.
        first, last (`int`): Its training steps, the last one excluded.
        precondition (`Tensor`): D, `(num_parameters,)` or `(1,)`, float32: learning rates over Adam's root of the
            second moment, summed over the steps.
        steps (`tuple[StepConstants, ...]`): Those that were not skipped.
        outer_decay (`Tensor`, *optional*): `(num_parameters,)`, what a decoupled decay that differs between elements
            leaves over half of the segment; applied before and after it.
        frozen_decay (`Tensor`, *optional*): `(num_parameters,)`, a coupled decay that differs between elements: held
            at what it is when the segment begins.
    """

    state: int
    first: int
    last: int
    precondition: Tensor
    steps: tuple[StepConstants, ...]
    outer_decay: Tensor | None = None
    frozen_decay: Tensor | None = None

    def responses(self, curvature: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """
        The segment's map along directions of given curvature.

        Args:
            curvature (`np.ndarray`): `(num_directions,)`, float64, eigenvalues of `D^1/2 C D^1/2`.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: Phi, `(2, 2, num_directions)`, and Gamma, `(2, num_directions)`, float64:
            `(delta, m)` at the end is `Phi (delta, m) + Gamma f`, all scaled by `D^-1/2`, `D^1/2` and `D^1/2`.
        """
        phi = np.zeros((2, 2, len(curvature)))
        phi[0, 0] = phi[1, 1] = 1.0
        state = np.concatenate([phi, np.zeros((2, 1, len(curvature)))], axis=1)  # columns: delta, m, f
        force = np.zeros_like(state[0])
        force[2] = 1.0
        for step in self.steps:
            gradient = step.scale * (force + curvature * state[0]) + step.coupled * state[0]
            direction = step.momentum_share * state[1] + step.gradient_share * gradient
            state = np.stack(
                [(1 - step.decay) * state[0] - step.rate * direction, step.momentum * state[1] + step.gain * gradient]
            )
        return state[:, :2], state[:, 2]

    @property
    def stable_curvature(self) -> float:
        """The largest eigenvalue of `D^1/2 C D^1/2` at which no step of the segment amplifies a deviation."""
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
    """
    The segments of a path, in training order.

    Args:
        path (`RecordedPath`): The path.
        uniform_decay (`bool`, *optional*, defaults to `False`): Let all elements decay as most of them do.
    """
    return [
        segment
        for state, first, last in path.segments()
        for segment in _pieces(path, state, first, last, uniform_decay)
    ]


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
    total = float(lengths.sum())
    rates = lengths.sum(1) / total if total > 0 else np.full(len(lengths), 1 / len(lengths))
    precondition = space.expand_groups(lengths.sum(0).tolist(), rule.group_of, path.device)
    if path.is_adaptive:
        looked_at = np.unique(np.linspace(first, last - 1, SECOND_MOMENTS_LOOKED_AT).round()) + 1
        inverse = torch.stack([path.inverse_root_moment(float(step)) for step in looked_at]).mean(0)
        precondition = precondition * inverse
    weight_decays = [group.weight_decay for group in rule.groups]
    decoupled = rule.name == "adamw"
    most = np.bincount([rule.group_of(name) for name in space.names], space.sizes, len(rule.groups)).argmax()
    decays, couplings = np.zeros(len(rates)), np.zeros(len(rates))
    outer, frozen = None, None
    if decoupled and any(weight_decays):
        kept = np.prod(1 - learning_rates * np.array(weight_decays), axis=0)  # (num_groups,)
        per_step = learning_rates * np.array(weight_decays)
        if uniform_decay or (per_step == per_step[:, :1]).all():
            decays = per_step[:, most]
        else:
            outer = space.expand_groups(kept.tolist(), rule.group_of, path.device).clamp_min(0).sqrt()
    elif any(weight_decays):
        decay = space.expand_groups(weight_decays, rule.group_of, path.device)
        if decay.numel() == 1 and precondition.numel() == 1:
            couplings = np.full(len(rates), float(decay) * float(precondition))
        else:
            frozen = decay.expand(space.num_parameters)
    constants = [path.momentum_of(int(update)) for update in updates]
    steps = tuple(
        StepConstants(
            rate=float(rate),
            scale=float(scale),
            momentum=momentum,
            gain=gain,
            momentum_share=momentum_share,
            gradient_share=gradient_share,
            decay=float(decay),
            coupled=float(coupled),
        )
        for rate, scale, (momentum, gain, momentum_share, gradient_share), decay, coupled in zip(
            rates, table.clip_factor[covered][active], constants, decays, couplings, strict=True
        )
    )
    return Segment(state, first, last, precondition, steps, outer, frozen)
