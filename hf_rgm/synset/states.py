"""Which recorded states a synset is matched at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_rgm.trajectory.storage import Trajectory


@dataclass(frozen=True)
class MatchedState:
    """
    A recorded state of one of the recorded runs.

    Args:
        run (`int`): Position of the run.
        step (`int`): Training step.
    """

    run: int
    step: int

    def __str__(self) -> str:
        return f"recorded step {self.step}" + (f" of run {self.run}" if self.run else "")


def matched_states(trajectories: Sequence[Trajectory]) -> tuple[MatchedState, ...]:
    """
    All recorded states but the initial ones, in order of training progress; the runs' final states come last.

    Args:
        trajectories (`Sequence[Trajectory]`): The recorded runs.

    Returns:
        `tuple[MatchedState, ...]`
    """
    states = [
        (step / trajectory.num_steps, MatchedState(run, step))
        for run, trajectory in enumerate(trajectories)
        for step in trajectory.state_steps
        if step > 0
    ]
    return tuple(state for _, state in sorted(states, key=lambda item: (item[0], item[1].run)))
