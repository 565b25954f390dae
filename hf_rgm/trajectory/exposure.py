"""Exposure: how often training saw rows near each recorded state, relative to the mean row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.trajectory.path import MAX_STATES, states_by_epochs
from hf_rgm.trajectory.trajectory import Trajectory

Exposures = dict[int, NDArray[np.float32]]

EXPOSURE = "cluster_exposure"
"""Key of a trajectory's metadata: exposures of clusters, where rows are left out and they are not all 1."""

# An order is taken to be no accident beyond so many standard deviations of what shuffling gives.
MAX_DEVIATION = 4.0
MAX_BLOCKS, MIN_EXPECTED = 32, 4


class Exposure:
    """Exposure of rows and clusters along one recorded run: all 1 if every row was seen alike, in random order."""

    # Which steps saw a row is an accident where rows are shuffled: the same data would be seen otherwise by the next
    # training, and the mean over states says more about it (docs/method.md, rows as they were seen).

    def __init__(self, trajectory: Trajectory, clusters: ClusterMap) -> None:
        self._trajectory = trajectory
        self._clusters = clusters
        self._rows = trajectory.steps.rows
        self._by_states: dict[tuple[int, ...], Exposures] = {}
        counts = _counts(self._rows or [], clusters.num_rows)
        self.is_ordered = self._rows is not None and any(
            _deviation(self._rows, ids) > MAX_DEVIATION for ids in (self._blocks(counts), clusters.cluster_ids)
        )
        # The last epoch may end early.
        self._is_even = self._rows is None or (counts.min() > 0 and counts.max() - counts.min() <= 1)
        self._total = None if self._is_even else (counts / counts.mean()).astype(np.float32)
        recorded = None if self._rows is not None else trajectory.metadata.get(EXPOSURE)
        self._recorded = None if recorded is None else _read(recorded, clusters.num_clusters, str(trajectory.folder))
        self.is_ordered |= self._recorded is not None and len(self._recorded) > 1

    @property
    def max_states(self) -> int:
        """Recorded states in use: where order matters, as many as there may be."""
        return MAX_STATES if self.is_ordered else states_by_epochs(self._trajectory)

    def of_rows(self, states: Sequence[int]) -> Exposures | None:
        """Exposures `(num_rows,)` by recorded state, of the steps that it is nearest to; `None` if all are 1."""
        if self._rows is None or not self.is_ordered:
            return None if self._total is None else {state: self._total for state in states}  # noqa: C420
        key = tuple(states)
        if key not in self._by_states:
            later_first = np.array(sorted(states, reverse=True))
            nearest = [int(later_first[np.abs(later_first - step).argmin()]) for step in range(len(self._rows))]
            steps = {state: [own for own, at in zip(self._rows, nearest, strict=True) if at == state] for state in key}
            counts = {state: _counts(own, self._clusters.num_rows) for state, own in steps.items()}
            self._by_states[key] = {
                state: (own / max(own.mean(), np.finfo(np.float32).tiny)).astype(np.float32)
                for state, own in counts.items()
            }
        return self._by_states[key]

    def of_clusters(self, states: Sequence[int]) -> Exposures | None:
        """Exposures `(num_clusters,)` by recorded state: means over rows; `None` if all are 1."""
        if self._recorded is not None:
            steps = np.array(list(self._recorded))
            return {state: self._recorded[int(steps[np.abs(steps - state).argmin()])] for state in states}
        rows = self.of_rows(states)
        return None if rows is None else {state: self._mean(weights) for state, weights in rows.items()}

    def share(self, clusters: Sequence[int]) -> float:
        """Share of some clusters in all that training saw."""
        total = self.total_of_clusters
        seen = self._clusters.sizes if total is None else self._clusters.sizes * total
        return float(seen[list(clusters)].sum() / seen.sum())

    @property
    def total_of_rows(self) -> NDArray[np.float32] | None:
        """Exposures `(num_rows,)` over all of training; `None` if all are 1."""
        return self._total

    @property
    def total_of_clusters(self) -> NDArray[np.float32] | None:
        """Exposures `(num_clusters,)` over all of training; `None` if all are 1."""
        if self._recorded is not None:
            return np.stack([*self._recorded.values()]).mean(0)
        return None if self._total is None else self._mean(self._total)

    def description(self, states: Sequence[int]) -> dict[str, Any]:
        """Metadata of a trajectory that says so without its rows: at some states, or one for all."""
        found = self.of_clusters(states if self.is_ordered else states[-1:])
        return {} if found is None else {EXPOSURE: {str(state): own.tolist() for state, own in found.items()}}

    def _mean(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        sums = np.bincount(self._clusters.cluster_ids, weights, self._clusters.num_clusters)
        return (sums / np.maximum(self._clusters.sizes, 1)).astype(np.float32)

    def _blocks(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Neighbouring rows, in blocks that are large enough to be compared."""
        blocks = int(np.clip(counts.sum() // (MAX_STATES * MIN_EXPECTED), 2, MAX_BLOCKS))
        return np.arange(len(counts)) * blocks // len(counts)


def _counts(rows: Sequence[NDArray[np.int64]], num_rows: int) -> NDArray[np.int64]:
    """How often some steps saw each row, `(num_rows,)`."""
    return np.bincount(np.concatenate([np.empty(0, np.int64), *rows]), minlength=num_rows)


def _deviation(rows: Sequence[NDArray[np.int64]], ids: NDArray[np.int64]) -> float:
    """Standard deviations by which groups of rows are spread over training less evenly than by shuffling."""
    parts = np.array_split(np.arange(len(rows)), min(MAX_STATES, len(rows)))
    table = np.stack(
        [np.bincount(ids[np.concatenate([rows[t] for t in part])], minlength=ids.max() + 1) for part in parts]
    )
    table = table[:, table.sum(0) > 0]
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    if freedom == 0:
        return 0.0
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)  # Wilson and Hilferty: the cube root of chi squared is nearly normal
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


def _read(recorded: Any, num_clusters: int, source: str) -> Exposures:
    try:
        found = {int(state): np.asarray(own, np.float32) for state, own in recorded.items()}
        good = bool(found) and all(
            own.shape == (num_clusters,) and np.isfinite(own).all() and (own >= 0).all() for own in found.values()
        )
    except (AttributeError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"{source} has no exposures of {num_clusters} clusters in {EXPOSURE!r}. Copy the folder again, "
            "or distil the synset again."
        )
    return found
