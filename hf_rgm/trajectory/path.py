"""The recorded optimizer path, linearised: later effects of a small change of a gradient."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_rgm.model.functional_model import ParameterSpace
from hf_rgm.trajectory.trajectory import Trajectory

MAX_INTEGRATION_STEPS = 100
MIN_STATES, MAX_STATES = 3, 8
"""Recorded states used for gradients and curvature; docs/method.md says what fewer cost."""


def automatic_stride(trajectory: Trajectory, rewind: float) -> int:
    """Smallest stride with at most 100 integration steps from `rewind` to the end of training."""
    return max(1, math.ceil(round((1 - rewind) * trajectory.num_steps) / MAX_INTEGRATION_STEPS))


def states_by_epochs(trajectory: Trajectory) -> int:
    """Number of recorded states for gradients and curvature: one per epoch, within bounds."""
    # A state costs at least a pass over the rows: as much as training if that saw each row once, else much less.
    return int(np.clip(round(float(trajectory.steps.epoch[-1])), MIN_STATES, MAX_STATES))


def states_in_use(trajectory: Trajectory, max_states: int | None) -> list[int]:
    """Recorded steps whose gradients and curvature are taken: all, or so many evenly spaced, without the initial."""
    recorded = trajectory.state_steps
    if max_states is None or len(recorded) <= max_states:
        return list(recorded)
    updated = np.array([step for step in recorded if step > 0])
    return updated[np.unique(np.linspace(0, len(updated) - 1, max_states).round().astype(int))].tolist()


@dataclass(frozen=True)
class LinearStep:
    """Coefficients of one integration step of the deviation `delta` from the recorded path."""

    # With the change `a` of the gradient:
    #   d = momentum_share * m + gradient_share * (a + coupled_decay * delta)
    #   m <- momentum * m + gain * (a + coupled_decay * delta)
    #   delta <- (1 - decoupled_decay) * delta - precondition * d
    # A stride of several training steps composes the optimizer's steps for a constant `a`; shares are means over it.

    step: int
    nearest_state: int
    precondition: Tensor  # learning rate over Adam's root of second moment, `(num_parameters,)` or `(1,)`
    gradient_scale: float  # recorded clipping factor, and share of micro-batches
    momentum: float
    gain: float
    momentum_share: float
    gradient_share: float
    coupled_decay: Tensor  # weight decay of SGD and Adam
    decoupled_decay: Tensor  # learning rate times weight decay of AdamW


class LinearSteps(Sequence[LinearStep]):
    """Integration steps made on access, as each holds vectors as long as the parameters."""

    def __init__(self, starts: range, make: Callable[[int], LinearStep]) -> None:
        self._starts = starts
        self._make = make

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        return self._make(self._starts[index])


class RecordedPath:
    """Integration steps along a recorded trajectory, from a rewind point to the end of training."""

    # Second moments are frozen at their recorded values. They and the parameters are interpolated between states.

    def __init__(
        self,
        trajectory: Trajectory,
        space: ParameterSpace,
        device: torch.device,
        *,
        rewind: float,
        stride: int,
        max_states: int | None = None,
        like: RecordedPath | None = None,
    ) -> None:
        if not 0 <= rewind < 1:
            raise ValueError(f"`rewind` must be at least 0 and below 1 (a fraction of training), got {rewind}.")
        if stride < 1:
            raise ValueError(f"`stride` must be at least 1 training step, got {stride}.")
        trajectory.optimizer.check_alike()
        self.trajectory = trajectory
        self.space = space
        self.device = device
        self.start = min(round(rewind * trajectory.num_steps), trajectory.num_steps - 1)
        self.stride = stride
        self._states = np.array(states_in_use(trajectory, max_states))
        self._parameters: dict[int, Tensor] = {} if like is None else like._parameters
        self._second_moments: dict[int, Tensor] = {} if like is None else like._second_moments

    @property
    def used_states(self) -> list[int]:
        """Recorded steps whose gradients and curvature stand for those near them."""
        return self._states.tolist()

    @property
    def is_adaptive(self) -> bool:
        return self.trajectory.optimizer.name != "sgd"

    def steps(self) -> LinearSteps:
        """Integration steps in training order."""
        end = self.trajectory.num_steps
        return LinearSteps(range(self.start, end, self.stride), lambda t: self._step(t, min(self.stride, end - t)))

    def segments(self) -> list[tuple[int, int, int]]:
        """Recorded steps in use, each with the range `first, last` of training steps that it is nearest to."""
        steps = range(self.start, self.trajectory.num_steps)
        groups = [(state, [*members]) for state, members in itertools.groupby(steps, self._nearest_used)]
        return [(state, members[0], members[-1] + 1) for state, members in groups]

    def parameters_at(self, step: float) -> Tensor:
        """Parameters interpolated between recorded states, `(num_parameters,)`, float32."""
        return self._interpolate(step, self.trajectory.state_steps, self.state)

    def nearest_state(self, step: float, *, before: float = math.inf) -> int:
        """The recorded step below `before` that is nearest to `step`; of two equally near ones, the later."""
        steps = [s for s in self.trajectory.state_steps if s < before]
        if not steps:
            raise ValueError(
                f"No state before step {before} is recorded, only {list(self.trajectory.state_steps)}. Record more "
                "states with `TrajectoryCallback(num_states=...)`."
            )
        return min(reversed(steps), key=lambda s: abs(s - step))

    def _nearest_used(self, step: float) -> int:
        """The nearest step of the states that segments use; of two equally near ones, the later."""
        later_first = self._states[::-1]
        return int(later_first[np.abs(later_first - step).argmin()])

    def _step(self, start: int, span: int) -> LinearStep:
        trajectory, rule = self.trajectory, self.trajectory.optimizer
        table = trajectory.steps
        covered = slice(start, start + span)
        zero = torch.zeros(1, device=self.device)
        active = ~table.skipped[covered]
        nearest = self._nearest_used(start + (span - 1) / 2)
        if not active.any():
            return LinearStep(start, nearest, zero, 0.0, 1.0, 0.0, 0.0, 0.0, zero, zero)
        learning_rates = table.learning_rates[covered][active]
        updates = trajectory.update_numbers[covered][active]
        lengths = learning_rates
        if self.is_adaptive:
            lengths = learning_rates / (1 - rule.groups[0].betas[0] ** updates[:, None])
        # Steps with learning rate 0 (the first of a warm-up) still feed the momentum.
        weights = lengths.sum(1) if lengths.any() else np.ones(len(lengths))
        momentum, gain, momentum_share, gradient_share = self._momentum(updates, weights / weights.sum())
        precondition = self.space.expand_groups(lengths.sum(0).tolist(), rule.group_of, self.device)
        if self.is_adaptive:
            precondition = precondition * self.inverse_root_moment(start + (span + 1) / 2)
        decay = self.space.expand_groups([g.weight_decay for g in rule.groups], rule.group_of, self.device)
        decoupled = rule.name == "adamw"
        rates = self.space.expand_groups(learning_rates.sum(0).tolist(), rule.group_of, self.device)
        return LinearStep(
            step=start,
            nearest_state=nearest,
            precondition=precondition,
            gradient_scale=float(np.average(trajectory.gradient_scales[covered][active], weights=weights)),
            momentum=momentum,
            gain=gain,
            momentum_share=momentum_share,
            gradient_share=gradient_share,
            coupled_decay=zero if decoupled else decay,
            decoupled_decay=rates * decay if decoupled else zero,
        )

    def momentum_of(self, update: int) -> tuple[float, float, float, float]:
        """Momentum, gain and the two shares of one update, as in `LinearStep`."""
        return self._momentum(np.array([update]), np.ones(1))

    def inverse_root_moment(self, step: float) -> Tensor:
        """Adam's `1 / (sqrt(v) + eps)` after a training step, interpolated: `(num_parameters,)`, float32."""
        made = self.trajectory.update_numbers
        # Before the first update, which loss scaling may have skipped, there is no second moment.
        recorded = [s for s in self.trajectory.state_steps if s > 0 and made[s - 1] > 0]
        moment = self._interpolate(step, recorded, self.second_moment)
        rule = self.trajectory.optimizer
        eps = self.space.expand_groups([group.eps for group in rule.groups], rule.group_of, self.device)
        return (1 / (moment.sqrt() + eps)).where(moment > 0, 0.0)

    def _momentum(self, updates: np.ndarray, weights: np.ndarray) -> tuple[float, float, float, float]:
        """Momentum, gain and the two shares of several updates, whose directions count by `weights`."""
        group = self.trajectory.optimizer.groups[0]
        decay = group.betas[0] if self.is_adaptive else group.momentum
        momentum, gain, momentum_share, gradient_share = 1.0, 0.0, 0.0, 0.0
        for update, weight in zip(updates.tolist(), weights.tolist(), strict=True):
            own = 1 - decay if self.is_adaptive else 1 - group.dampening
            if not self.is_adaptive and (update == 1 or not decay):
                own = 1.0  # torch's first buffer is the gradient itself
            momentum, gain = decay * momentum, decay * gain + own
            momentum_share += weight * (decay * momentum if group.nesterov else momentum)
            gradient_share += weight * (1.0 + decay * gain if group.nesterov else gain)
        return momentum, gain, momentum_share, gradient_share

    def _interpolate(self, step: float, recorded, read) -> Tensor:
        step = min(max(step, recorded[0]), recorded[-1])
        index = bisect_left(recorded, step)
        if recorded[index] == step:
            return read(recorded[index])
        earlier, later = recorded[index - 1], recorded[index]
        return torch.lerp(read(earlier), read(later), (step - earlier) / (later - earlier))

    def state(self, step: int) -> Tensor:
        """Parameters of a recorded state, `(num_parameters,)`, float32."""
        if step not in self._parameters:
            self._parameters[step] = self.space.flatten(self.trajectory.state(step).parameters).to(self.device)
        return self._parameters[step]

    def second_moment(self, step: int) -> Tensor:
        """Bias-corrected second moment of Adam at a recorded state, `(num_parameters,)`, float32."""
        if step not in self._second_moments:
            rule, state = self.trajectory.optimizer, self.trajectory.state(step)
            updates = max(1, int(self.trajectory.update_numbers[step - 1]))
            corrections = [1 - group.betas[1] ** updates for group in rule.groups]
            moments = state.moments.get("exp_avg_sq", {})
            # A parameter that never received a gradient has no moments, and no effect.
            corrected = {
                name: moments.get(name, torch.zeros_like(value)) / corrections[rule.group_of(name)]
                for name, value in state.parameters.items()
            }
            self._second_moments[step] = self.space.flatten(corrected).to(self.device)
        return self._second_moments[step]


def deviation_step(step: LinearStep, deviation: Tensor, momentum: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Next deviation and momentum, each `(batch_size, num_parameters)`, given the change of the gradient."""
    # In place where it is our own: every vector is as large as all models that are replayed together.
    gradient = (step.gradient_scale * gradient).addcmul_(step.coupled_decay, deviation)
    direction = (step.momentum_share * momentum).add_(gradient, alpha=step.gradient_share)
    deviation = ((1 - step.decoupled_decay) * deviation).addcmul_(step.precondition, direction, value=-1)
    return deviation, torch.mul(momentum, step.momentum, out=direction).add_(gradient, alpha=step.gain)
