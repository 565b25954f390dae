"""The recorded states that a synset is matched at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rgm.model.functional_model import ParameterSpace
from hf_rgm.trajectory.trajectory import Trajectory


@dataclass(frozen=True)
class MatchedState:
    """A recorded state: position of the run, and training step."""

    run: int
    step: int

    def __str__(self) -> str:
        return f"recorded step {self.step}" + (f" of run {self.run}" if self.run else "")


class StateVectors(Sequence[Tensor]):
    """Parameters `(num_parameters,)` at the matched states, kept in memory or read from disk at every use."""

    def __init__(
        self,
        space: ParameterSpace,
        trajectories: Sequence[Trajectory],
        matched: Sequence[MatchedState],
        device: torch.device,
        *,
        in_memory: bool,
    ) -> None:
        self._space = space
        self._trajectories = trajectories
        self._matched = matched
        self._device = device
        self._kept = [self._read(index) for index in range(len(matched))] if in_memory else None

    def __len__(self) -> int:
        return len(self._matched)

    def __getitem__(self, index: Any) -> Any:
        return self._kept[index] if self._kept is not None else self._read(index)

    def _read(self, index: int) -> Tensor:
        state = self._matched[index]
        parameters = self._trajectories[state.run].state(state.step).parameters
        return self._space.flatten(parameters).to(self._device)


def matched_states(trajectories: Sequence[Trajectory]) -> tuple[MatchedState, ...]:
    """All recorded states but the initial ones, by training progress; final states come last."""
    states = [
        (step / trajectory.num_steps, MatchedState(run, step))
        for run, trajectory in enumerate(trajectories)
        for step in trajectory.state_steps
        if step > 0
    ]
    return tuple(state for _, state in sorted(states, key=lambda item: (item[0], item[1].run)))
