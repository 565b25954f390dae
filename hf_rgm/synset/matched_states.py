"""The recorded states that a synset is matched at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.model.functional_model import ParameterSpace
from hf_rgm.trajectory.exposure import Exposure
from hf_rgm.trajectory.path import states_in_use
from hf_rgm.trajectory.trajectory import Trajectory


@dataclass(frozen=True)
class MatchedState:
    """A recorded state: position of the run, and training step."""

    run: int
    step: int

    def __str__(self) -> str:
        return f"recorded step {self.step}" + (f" of run {self.run}" if self.run else "")


@dataclass(frozen=True, eq=False)
class StateVectors(Sequence[Tensor]):
    """Parameters `(num_parameters,)` at the matched states, kept in memory or read from disk at every use."""

    space: ParameterSpace
    trajectories: Sequence[Trajectory]
    matched: Sequence[MatchedState]
    device: torch.device
    in_memory: bool
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.matched)

    def __getitem__(self, index: Any) -> Any:
        if index in self._kept:
            return self._kept[index]
        state = self.matched[index]
        vector = self.space.flatten(self.trajectories[state.run].state(state.step).parameters).to(self.device)
        if self.in_memory:
            self._kept[index] = vector
        return vector


def matched_states(trajectories: Sequence[Trajectory], clusters: ClusterMap) -> tuple[MatchedState, ...]:
    """Recorded states that engines use, without initial ones, by training progress; final states come last."""
    states = [
        (step / trajectory.num_steps, MatchedState(run, step))
        for run, trajectory in enumerate(trajectories)
        for step in states_in_use(trajectory, Exposure(trajectory, clusters).max_states)
        if step > 0
    ]
    return tuple(state for _, state in sorted(states, key=lambda item: (item[0], item[1].run)))
