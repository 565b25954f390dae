"""The recorded optimizer path, linearised: what a small change of a gradient does to the parameters later."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_rgm.model.functional_model import ParameterSpace
from hf_rgm.trajectory.trajectory import Trajectory

logger = logging.getLogger(__name__)

MAX_GROWTH = 100.0
MAX_INTEGRATION_STEPS = 100
POWER_ITERATIONS = 8
MIN_STATES, MAX_STATES = 3, 8
"""Recorded states that gradients and curvature are taken at; see docs/method.md, record, for what fewer cost."""


def automatic_stride(trajectory: Trajectory, rewind: float) -> int:
    """The smallest stride that needs at most 100 integration steps from `rewind` to the end of training."""
    return max(1, -(-round((1 - rewind) * trajectory.num_steps) // MAX_INTEGRATION_STEPS))


def states_by_epochs(trajectory: Trajectory) -> int:
    """
    How many recorded states gradients and curvature are taken at: as many as epochs, within bounds.

    Every state costs a pass over the training rows, or several: as much as training itself where that saw each row
    once, and next to nothing where it saw them often.
    """
    return int(np.clip(round(float(trajectory.steps.epoch[-1])), MIN_STATES, MAX_STATES))


@dataclass(frozen=True)
class LinearStep:
    """
    One integration step of the deviation `delta` from the recorded path, with gradient deviation `a`:

    `d = momentum_share * m + gradient_share * (a + coupled_decay * delta)`,
    `m <- momentum * m + gain * (a + coupled_decay * delta)`,
    `delta <- (1 - decoupled_decay) * delta - precondition * d`.

    Over a stride of several training steps these are the optimizer's own steps composed, for a gradient that does not
    change meanwhile.

    Args:
        step (`int`): Training step the integration step starts at.
        nearest_state (`int`): Recorded step whose parameters are nearest.
        precondition (`Tensor`): D, `(num_parameters,)` or `(1,)`: learning rate over Adam's root of second moment.
        gradient_scale (`float`): The recorded clipping factor.
        momentum, gain (`float`): What is left of the momentum, and what the gradient adds to it.
        momentum_share, gradient_share (`float`): What the momentum before the step and the gradient add to the
            direction `d`, mean over the stride.
        coupled_decay (`Tensor`): Weight decay that goes through the gradient (SGD, Adam).
        decoupled_decay (`Tensor`): Learning rate times weight decay (AdamW).
    """

    step: int
    nearest_state: int
    precondition: Tensor
    gradient_scale: float
    momentum: float
    gain: float
    momentum_share: float
    gradient_share: float
    coupled_decay: Tensor
    decoupled_decay: Tensor


class LinearSteps(Sequence[LinearStep]):
    """
    Integration steps that are made when they are asked for: each holds vectors as long as the parameters.

    Args:
        starts (`range`): Training steps they start at.
        make (`Callable`): Makes the one that starts at a training step.
    """

    def __init__(self, starts: range, make: Callable[[int], LinearStep]) -> None:
        self._starts = starts
        self._make = make

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._starts[index]
        return LinearSteps(chosen, self._make) if isinstance(chosen, range) else self._make(chosen)


class RecordedPath:
    """
    Integration steps over a recorded trajectory, from a rewind point to the end of training.

    Second moments are frozen at their recorded values and interpolated, as are the parameters, between recorded
    states. Anchored replay takes these steps; the linear engine takes the path by segments (docs/method.md).

    Args:
        trajectory (`Trajectory`): The recorded run.
        space (`ParameterSpace`): Order of the flat vectors.
        device (`torch.device`): Where vectors live.
        rewind (`float`): Fraction of training at which integration starts, in [0, 1).
        stride (`int`): Training steps per integration step.
        max_states (`int`, *optional*): Most recorded states that segments are made of, spread evenly over those with
            an update behind them. Defaults to all.
        like (`RecordedPath`, *optional*): Another path of the run, which has read some states already.

    Raises:
        NotImplementedError: If parameter groups differ in momentum (betas, eps, dampening).
        ValueError: If `rewind` or `stride` is out of range.
    """

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
        constants = [(g.betas, g.eps, g.momentum, g.dampening, g.nesterov) for g in trajectory.optimizer.groups]
        if len(set(constants)) > 1:
            raise NotImplementedError(
                "Parameter groups with different (betas, eps, momentum, dampening, nesterov) are not supported, got "
                f"{constants[0]} and {next(c for c in constants if c != constants[0])}. Train all alike."
            )
        self.trajectory = trajectory
        self.space = space
        self.device = device
        self.start = min(round(rewind * trajectory.num_steps), trajectory.num_steps - 1)
        self.stride = stride
        self._states = np.array(trajectory.state_steps)
        if max_states is not None and len(self._states) > max_states:
            updated = self._states[self._states > 0]
            self._states = updated[np.unique(np.linspace(0, len(updated) - 1, max_states).round().astype(int))]
        self._parameters: dict[int, Tensor] = {} if like is None else like._parameters
        self._second_moments: dict[int, Tensor] = {} if like is None else like._second_moments

    @property
    def is_adaptive(self) -> bool:
        """Whether the optimizer divides by the root of a second moment."""
        return self.trajectory.optimizer.name != "sgd"

    def steps(self, first: int | None = None, last: int | None = None, *, stride: int | None = None) -> LinearSteps:
        """
        Integration steps in training order, each made when it is asked for.

        Args:
            first, last (`int`, *optional*): Training steps to cover, the last one excluded. Default to all from the
                rewind point on.
            stride (`int`, *optional*): Defaults to the path's.
        """
        start = self.start if first is None else first
        end = self.trajectory.num_steps if last is None else last
        span = self.stride if stride is None else stride
        return LinearSteps(range(start, end, span), lambda t: self._step(t, min(span, end - t)))

    def segments(self) -> list[tuple[int, int, int]]:
        """
        Recorded steps in use, in training order, each with the training steps `first` to `last` (excluded) that it is
        nearest to.
        """
        nearest = [self._nearest_used(step) for step in range(self.start, self.trajectory.num_steps)]
        edges = [i for i, state in enumerate(nearest) if i == 0 or state != nearest[i - 1]] + [len(nearest)]
        return [
            (nearest[begin], self.start + begin, self.start + end)
            for begin, end in zip(edges, edges[1:], strict=False)
        ]

    def parameters_at(self, step: float) -> Tensor:
        """Parameters interpolated between recorded states: `(num_parameters,)`, float32."""
        return self._interpolate(step, self.trajectory.state_steps, self._flat_parameters)

    def nearest_state(self, step: float, *, before: float = math.inf) -> int:
        """
        The recorded step nearest to `step`; of two equally near ones, the later.

        Raises:
            ValueError: If no state is recorded at a step smaller than `before`.
        """
        steps = [s for s in self.trajectory.state_steps if s < before]
        if not steps:
            raise ValueError(
                f"No state before step {before} is recorded, only {list(self.trajectory.state_steps)}. Record more "
                "states with `TrajectoryCallback(num_states=...)`."
            )
        return min(reversed(steps), key=lambda s: abs(s - step))

    def _nearest_used(self, step: float) -> int:
        """The nearest of the states that segments are made of; of two equally near ones, the later."""
        later_first = self._states[::-1]
        return int(later_first[np.abs(later_first - step).argmin()])

    def state(self, step: int) -> Tensor:
        """Parameters of a recorded state: `(num_parameters,)`, float32."""
        return self._flat_parameters(step)

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
            gradient_scale=float(np.average(table.clip_factor[covered][active], weights=weights)),
            momentum=momentum,
            gain=gain,
            momentum_share=momentum_share,
            gradient_share=gradient_share,
            coupled_decay=zero if decoupled else decay,
            decoupled_decay=rates * decay if decoupled else zero,
        )

    def momentum_of(self, update: int) -> tuple[float, float, float, float]:
        """Momentum, gain and the shares of momentum and gradient in the direction, of one update of this number."""
        return self._momentum(np.array([update]), np.ones(1))

    def inverse_root_moment(self, step: float) -> Tensor:
        """
        Adam's `1 / (sqrt(v) + eps)` after a training step, interpolated: `(num_parameters,)`, float32.

        0 where there is no second moment: such an element never received a gradient (the embedding of a token that no
        row has), and no row moves it; synthetic samples must not either, at a step of 1 / eps.
        """
        made = self.trajectory.update_numbers
        # Before the first update, which loss scaling may have skipped, there is no second moment.
        recorded = [s for s in self.trajectory.state_steps if s > 0 and made[s - 1] > 0]
        moment = self._interpolate(step, recorded, self.second_moment)
        return (1 / (moment.sqrt() + self.trajectory.optimizer.groups[0].eps)).where(moment > 0, 0.0)

    def _momentum(self, updates: np.ndarray, weights: np.ndarray) -> tuple[float, float, float, float]:
        """Momentum, gain and the two shares of updates of these numbers, whose directions count by `weights`."""
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
        if step <= recorded[0]:
            return read(recorded[0])
        later = next((s for s in recorded if s >= step), recorded[-1])
        if later == step or later == recorded[0] or step >= recorded[-1]:
            return read(later)
        earlier = recorded[recorded.index(later) - 1]
        return torch.lerp(read(earlier), read(later), (step - earlier) / (later - earlier))

    def _flat_parameters(self, step: int) -> Tensor:
        if step not in self._parameters:
            self._parameters[step] = self.space.flatten(self.trajectory.state(step).parameters).to(self.device)
        return self._parameters[step]

    def second_moment(self, step: int) -> Tensor:
        """Adam's second moment of a recorded state, free of its start from 0: `(num_parameters,)`, float32."""
        if step not in self._second_moments:
            second = self.trajectory.optimizer.groups[0].betas[1]
            state = self.trajectory.state(step)
            moments = state.moments.get("exp_avg_sq", {})
            # A parameter that never received a gradient has no moments, and no effect.
            raw = self.space.flatten(
                {name: moments.get(name, torch.zeros_like(value)) for name, value in state.parameters.items()}
            )
            updates = max(1, int(self.trajectory.update_numbers[step - 1]))
            self._second_moments[step] = (raw / (1 - second**updates)).to(self.device)
        return self._second_moments[step]


def deviation_step(step: LinearStep, deviation: Tensor, momentum: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """
    Advances deviations from the recorded path by one integration step.

    Args:
        step (`LinearStep`): Coefficients.
        deviation, momentum (`Tensor`): `(batch_size, num_parameters)`, delta and its momentum.
        gradient (`Tensor`): `(batch_size, num_parameters)`, change of the gradient against the recorded path.

    Returns:
        `tuple[Tensor, Tensor]`: the next deviation and momentum.
    """
    # In place where it is our own: every vector is as large as all models that are replayed together.
    gradient = (step.gradient_scale * gradient).addcmul_(step.coupled_decay, deviation)
    direction = (step.momentum_share * momentum).add_(gradient, alpha=step.gradient_share)
    deviation = ((1 - step.decoupled_decay) * deviation).addcmul_(step.precondition, direction, value=-1)
    return deviation, torch.mul(momentum, step.momentum, out=direction).add_(gradient, alpha=step.gain)
