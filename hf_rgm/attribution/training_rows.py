"""The training rows beside a synset: read, sampled, and their clusters' gradients along a path."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hf_rgm.attribution.curvature import RowSample, sample_rows
from hf_rgm.attribution.forces import ClusterGradients
from hf_rgm.attribution.memory import MemoryShares
from hf_rgm.losses import RowLoss
from hf_rgm.modeling import FunctionalModel
from hf_rgm.processes import Processes
from hf_rgm.rows import CachedBatches, DataCollator, RowReader
from hf_rgm.synset.costs import PieceOfWork
from hf_rgm.synset.synset import Synset
from hf_rgm.synset.targets import cluster_gradients, measure_rows
from hf_rgm.trajectory.path import RecordedPath
from hf_rgm.trajectory.storage import Trajectory

ROWS_AT_ONCE = 256


class TrainingRows:
    """
    The rows a synset was distilled from, with what engines want to know of them.

    Args:
        synset (`Synset`): The synset.
        model (`FunctionalModel`): The model as a function of its parameters.
        row_loss (`RowLoss`): The loss of a row.
        rows: The training dataset.
        data_collator (`Callable`, *optional*): Collates rows. Defaults to `default_data_collator`.
        max_bytes (`int`): Memory for the engines.
        processes (`Processes`): Among which clusters are split.

    Raises:
        ValueError: If they are other rows, or the synset has a loss that `row_loss` lacks.
    """

    def __init__(
        self,
        synset: Synset,
        model: FunctionalModel,
        row_loss: RowLoss,
        rows: Any,
        data_collator: DataCollator | None,
        *,
        max_bytes: int,
        processes: Processes,
    ) -> None:
        if synset.metadata.get("custom_row_loss") and row_loss.function is None:
            raise ValueError(
                "The synset was distilled with a `row_loss` of its own, which rows are scored by. Pass the same "
                "function as `row_loss`."
            )
        self.reader = RowReader(rows, model, data_collator=data_collator)
        if len(self.reader) != synset.clusters.num_rows:
            raise ValueError(
                f"`rows` has {len(self.reader)} rows, but the synset stands for {synset.clusters.num_rows}. Pass the "
                "training dataset itself; what is to be explained goes first, as queries."
            )
        synset.trajectory.check_dataset(rows, what="rows")
        self.clusters = synset.clusters
        self.row_loss = row_loss
        self._model = model
        self._samples_per_cluster = synset.samples.log_weights.shape[1]
        self._shares = MemoryShares.of(max_bytes, with_rows=True)
        self._processes = processes
        self._kept: tuple[Trajectory, list[int], Tensor] | None = None

    @functools.cached_property
    def sample(self) -> RowSample:
        """Some rows of every cluster, whose curvature is compared with the synset's."""
        return sample_rows(
            self._model,
            self.reader,
            self.clusters,
            self.row_loss,
            at_least=self._samples_per_cluster,
            max_bytes=self._shares.row_jacobian,
        )

    def gradients(self, path: RecordedPath) -> ClusterGradients:
        """
        The clusters' gradients at the recorded states that a path uses.

        Where those of all clusters at all states fit into memory, each process takes its share of them now, so that
        all must come here; they stay for shorter paths of the same run. Otherwise each reads what it needs whenever it
        needs it.
        """
        states = [state for state, _, _ in path.segments()]
        if self._kept is not None and self._kept[0] is path.trajectory and {*states} <= {*self._kept[1]}:
            return self._kept_gradients
        num_clusters = self.clusters.num_clusters
        # Twice for a moment, when the parts are put together.
        if 8 * len(states) * num_clusters * self._model.num_parameters > self._shares.kept:
            batches = self._batches(self._shares.kept)
            return lambda state, clusters: self._taken(path, [state], batches, clusters)[0]
        batches = self._batches(0)
        parts = self._processes.parts(num_clusters, at_most=num_clusters)
        found = self._processes.map(lambda part: self._taken(path, states, batches, part).cpu(), parts)
        self._kept = path.trajectory, states, torch.cat(found, dim=1).to(self._model.device)
        return self._kept_gradients

    def _kept_gradients(self, state: int, clusters: range) -> Tensor:
        if self._kept is None:
            raise RuntimeError("No gradients are kept.")
        _, states, gradients = self._kept
        return gradients[states.index(state), clusters.start : clusters.stop]

    def cost_of_gradients(self, state: Tensor) -> PieceOfWork:
        """What the clusters' gradients at one state take."""
        with torch.enable_grad():
            row = measure_rows(self._model, state, self._batches(self._shares.kept), self.row_loss)
        held = 4 * self.clusters.num_clusters * self._model.num_parameters
        return PieceOfWork(row.seconds * len(self.reader), row.peak_bytes + held, held)

    def _batches(self, max_bytes: int) -> CachedBatches:
        groups = [self.clusters.rows(k) for k in range(self.clusters.num_clusters)]
        return CachedBatches(self.reader, groups, batch_size=ROWS_AT_ONCE, max_bytes=max_bytes)

    def _taken(self, path: RecordedPath, states: list[int], batches: CachedBatches, clusters: range) -> Tensor:
        vectors = [path.state(state) for state in states]
        with torch.enable_grad():
            return cluster_gradients(self._model, vectors, batches, clusters, len(self.reader), self.row_loss)
