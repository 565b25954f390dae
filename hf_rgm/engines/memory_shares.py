"""How the memory of an attribution is divided among what its engines hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hf_rgm.files.writing import format_size
from hf_rgm.trajectory.trajectory import Trajectory

DEFAULT_MEMORY = "4GB"
SHARES = {False: (10, 4, 0, 2), True: (8, 3, 3, 2)}
"""Sixteenths, without and with training rows, in the order of the fields of [`MemoryShares`]."""


@dataclass(frozen=True)
class MemoryShares:
    """
    Bytes for each thing that is held at once. What does not fit is taken in parts, or anew where it is needed.

    Args:
        curvature (`int`): The curvature's rows at recorded states.
        vectors (`int`): Deviations of replayed models, or sensitivities of objectives.
        kept (`int`): What rows are read for once and kept: gradients of clusters, or collated batches.
        gradients (`int`): Gradients on their way: those of clusters, rows or objectives.
    """

    curvature: int
    vectors: int
    kept: int
    gradients: int

    @classmethod
    def of(cls, max_bytes: int, *, with_rows: bool, with_curvature: bool = True) -> MemoryShares:
        """
        Divides some memory.

        Args:
            max_bytes (`int`): All of it.
            with_rows (`bool`): Whether training rows are given.
            with_curvature (`bool`, *optional*, defaults to `True`): Whether the engine takes curvature. Vectors have
                their part where it does not, as in replays, which read the rows once for every batch of models.
        """
        shares = cls(*(max_bytes * share // 16 for share in SHARES[with_rows]))
        if with_curvature:
            return shares
        return replace(shares, curvature=0, vectors=shares.vectors + shares.curvature)


def free_bytes(max_bytes: int, setting: str, trajectories: Iterable[Trajectory], num_parameters: int) -> int:
    """
    What is left for the engines beside the recorded states in use, with their second moments.

    Args:
        max_bytes (`int`): The memory allowed.
        setting (`str`): How the user said it, for errors.
        trajectories (`Iterable[Trajectory]`): The recorded runs.
        num_parameters (`int`): Trainable parameters.

    Raises:
        ValueError: If nothing is left.
    """
    num_states = sum(len(trajectory.state_steps) for trajectory in trajectories)
    states = 8 * num_states * num_parameters
    if states >= max_bytes:
        raise ValueError(
            f"`max_memory={setting!r}` is too little for {num_states} states of {num_parameters} parameters, which "
            f"take {format_size(states)} with their second moments. Raise it, record fewer states "
            "(`TrajectoryCallback(num_states=...)`) or train fewer parameters (LoRA)."
        )
    return max_bytes - states
