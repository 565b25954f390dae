"""Shares of an attribution's memory for what its engines hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hf_rgm.files.writing import format_size
from hf_rgm.trajectory.trajectory import Trajectory

DEFAULT_MEMORY = "4GB"
# Sixteenths, without and with training rows, in the order of the fields of `MemoryShares`.
SHARES = {False: (10, 4, 0, 2), True: (8, 3, 3, 2)}


@dataclass(frozen=True)
class MemoryShares:
    """Bytes for each thing that is held at once; what does not fit is computed in parts, or again when needed."""

    curvature: int  # rows of curvature at recorded states
    vectors: int  # deviations of replayed models, or sensitivities of objectives
    kept: int  # what the rows are read once for: gradients of clusters, or collated batches
    gradients: int  # temporary gradients of clusters, rows or objectives

    @classmethod
    def of(cls, max_bytes: int, *, with_rows: bool, with_curvature: bool = True) -> MemoryShares:
        """Divides memory; without curvature its share goes to the vectors."""
        shares = cls(*(max_bytes * share // 16 for share in SHARES[with_rows]))
        if with_curvature:
            return shares
        # Replays read the rows once for every batch of models: large batches pay.
        return replace(shares, curvature=0, vectors=shares.vectors + shares.curvature)


def ranges(length: int, at_most: int) -> list[range]:
    """Consecutive parts of `range(length)`, none longer than `at_most`."""
    return [range(length)[start : start + at_most] for start in range(0, length, at_most)]


def cluster_ranges(num_clusters: int, length: int, max_bytes: int) -> list[range]:
    """Clusters whose gradients `(length,)` fit into memory together."""
    return ranges(num_clusters, max(1, max_bytes // (12 * length)))  # float32, and two temporaries


def free_bytes(max_bytes: int, setting: str, trajectories: Iterable[Trajectory], num_parameters: int) -> int:
    """Memory left for engines beside the recorded states; raises a `ValueError` that quotes `setting` if none is."""
    num_states = sum(len(trajectory.state_steps) for trajectory in trajectories)
    states = 8 * num_states * num_parameters  # parameters and second moments, float32
    if states >= max_bytes:
        raise ValueError(
            f"`max_memory={setting!r}` is too little for {num_states} states of {num_parameters} parameters, which "
            f"take {format_size(states)} with their second moments. Raise it, record fewer states "
            "(`TrajectoryCallback(num_states=...)`) or train fewer parameters (LoRA)."
        )
    return max_bytes - states
