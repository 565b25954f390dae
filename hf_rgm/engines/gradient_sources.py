"""Where engines take gradients and curvature from: a synset's samples, or the training rows."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.curvature import WeightedInputs
from hf_rgm.engines.gradient_form import GradientForm
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import IGNORED_LABEL, RowLoss
from hf_rgm.model.padding import batches_by_length
from hf_rgm.model.processes import Processes
from hf_rgm.model.row_gradients import cluster_gradients, measure_rows, row_gradients
from hf_rgm.model.row_reader import CachedBatches, RowReader
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.samples import SyntheticSamples, soft_cross_entropies
from hf_rgm.synset.synset_gradients import SynsetGradients
from hf_rgm.trajectory.path import RecordedPath
from hf_rgm.trajectory.trajectory import Trajectory

ROWS_AT_ONCE, READ_AT_ONCE = 256, 1024
MAX_CANDIDATES = 2048
"""Training rows among which those are chosen whose curvature is taken."""

LOSS_ROWS, LOSS_ROWS_AT_ONCE = 64, 32
"""Training rows that stand for the clusters' losses, at least one of each cluster."""

ClusterGradients = Callable[[int, range], Tensor]
"""Takes a recorded step and some clusters, and returns their gradients there, `(len(clusters), length)`."""


class Source(ABC):
    """What the training loss of each cluster is known by."""

    num_clusters: int

    @functools.cached_property
    @abstractmethod
    def weighted_inputs(self) -> WeightedInputs:
        """Samples or rows whose weighted curvature is that of the training loss, those of a cluster side by side."""

    @abstractmethod
    def gradients(self, path: RecordedPath, form: GradientForm) -> ClusterGradients:
        """The clusters' gradients at the recorded states of a path; every process must ask for them."""

    @abstractmethod
    def losses(self, vector: Tensor) -> Tensor:
        """What each cluster adds to the training loss at `(num_parameters,)`: `(num_clusters,)`, float64, CPU."""

    @abstractmethod
    def cost_of_gradients(self, vector: Tensor, form: GradientForm) -> PieceOfWork:
        """What the clusters' gradients at one state take."""


class SampleSource(Source):
    """
    The synthetic samples of a synset.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        inputs (`InputSpace`): The space of the synthetic inputs.
        samples (`SyntheticSamples`): On the model's device.
    """

    def __init__(self, model: FunctionalModel, inputs: InputSpace, samples: SyntheticSamples) -> None:
        self.model = model
        self.inputs = inputs
        self.samples = samples
        self.num_clusters, self._per_cluster = samples.log_weights.shape[:2]
        self._gradients = SynsetGradients(model, inputs)

    @functools.cached_property
    def weighted_inputs(self) -> WeightedInputs:
        """All samples."""
        flat = self.samples.flatten()
        clusters = torch.arange(self.num_clusters, device=flat.log_weights.device).repeat_interleave(self._per_cluster)
        return WeightedInputs(self.inputs.to_forward(flat), flat.log_weights.exp(), clusters)

    def gradients(self, path: RecordedPath, form: GradientForm) -> ClusterGradients:
        """Those of the samples, taken anew at every call."""
        space = self.model.space

        def taken(state: int, clusters: range) -> Tensor:
            named = space.unflatten(path.state(state))
            if form.is_whole:
                return self._gradients(named, self.samples[slice(clusters.start, clusters.stop)]).detach()
            own = (self._gradients(named, self.samples[slice(k, k + 1)]).detach()[0] for k in clusters)
            return torch.stack([form(space.unflatten(gradient)) for gradient in own])

        return taken

    @torch.no_grad()
    def losses(self, vector: Tensor) -> Tensor:
        """Weighted soft cross entropy of each cluster's samples."""
        parameters = self.model.space.unflatten(vector.to(self.model.device))
        at_once = max(1, LOSS_ROWS // self._per_cluster)
        losses = []
        for start in range(0, self.num_clusters, at_once):
            some = self.samples[slice(start, start + at_once)].flatten()
            logits = self.model.logits(parameters, self.inputs.to_forward(some))
            terms = soft_cross_entropies(logits, some.targets, some.log_weights, some.target_ids)
            losses.append(terms.unflatten(0, (-1, self._per_cluster)).flatten(1).sum(1).double().cpu())
        return torch.cat(losses)

    def cost_of_gradients(self, vector: Tensor, form: GradientForm) -> PieceOfWork:
        """What the gradients of all samples at one state take."""
        named = self.model.space.unflatten(vector)
        self._gradients(named, self.samples[:2])  # decides how to vectorise
        if form.is_whole:
            return measured(lambda: self._gradients(named, self.samples).detach())
        one = measured(lambda: form(self.model.space.unflatten(self._gradients(named, self.samples[:1]).detach()[0])))
        return replace(one, seconds=self.num_clusters * one.seconds)


@dataclass(frozen=True, eq=False)
class _Kept:
    """Gradients of the clusters at some states, `(num_states, num_clusters, length)`, and of rows at each of these."""

    trajectory: Trajectory
    form: GradientForm
    states: list[int]
    gradients: Tensor
    of_rows: dict[int, Tensor]

    def serves(self, trajectory: Trajectory, form: GradientForm, states: list[int]) -> bool:
        """Whether they are those of these states of a run."""
        return self.trajectory is trajectory and self.form == form and {*states} <= {*self.states}


class RowSource(Source):
    """
    The training rows themselves.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        reader (`RowReader`): The rows.
        clusters (`ClusterMap`): Their clusters.
        row_loss (`RowLoss`): The loss of a row.
        max_bytes (`int`): Memory for what is kept: gradients of clusters, or collated rows.
        processes (`Processes`): Among which clusters are split.
    """

    def __init__(
        self,
        model: FunctionalModel,
        reader: RowReader,
        clusters: ClusterMap,
        row_loss: RowLoss,
        *,
        max_bytes: int,
        processes: Processes,
    ) -> None:
        self.model = model
        self.reader = reader
        self.clusters = clusters
        self.row_loss = row_loss
        self.num_clusters = clusters.num_clusters
        self._max_bytes = max_bytes
        self._processes = processes
        self._kept: _Kept | None = None

    @functools.cached_property
    def weighted_inputs(self) -> WeightedInputs:
        """All rows, or as many as are looked at, evenly over the clusters by their sizes."""
        rows = self._evenly(min(MAX_CANDIDATES, len(self.reader)))
        inputs, labels = self.reader.batch(rows)
        weight = 1 / (len(rows) * self.row_loss.labels_per_row)
        owners = torch.from_numpy(self.clusters.cluster_ids[rows]).to(labels.device, torch.int64)
        return WeightedInputs(inputs, weight * (labels != IGNORED_LABEL).float(), owners)

    def gradients(self, path: RecordedPath, form: GradientForm) -> ClusterGradients:
        """
        Those of all rows of each cluster.

        Where those of all clusters at all states fit into memory, each process takes its share of them now, so that
        all must come here; they stay for shorter paths of the same run. Otherwise each reads what it needs whenever it
        needs it.
        """
        states = [state for state, _, _ in path.segments()]
        if self._kept is not None and self._kept.serves(path.trajectory, form, states):
            return self._kept_gradients
        if self.keeps_rows(form, len(states)):
            found = [self._of_every_row(path, form, state) for state in states]
            sums, of_rows = (list(part) for part in zip(*found, strict=True))
            self._kept = _Kept(
                path.trajectory, form, states, torch.stack(sums), dict(zip(states, of_rows, strict=True))
            )
            return self._kept_gradients
        # Twice for a moment, when the parts are put together.
        if 8 * len(states) * self.num_clusters * form.length > self._max_bytes:
            batches = self._batches(self._max_bytes)
            return lambda state, clusters: self._taken(path, form, [state], batches, clusters)[0]
        batches = self._batches(0)
        parts = self._processes.parts(self.num_clusters, at_most=self.num_clusters)
        found = self._processes.map(lambda part: self._taken(path, form, states, batches, part).cpu(), parts)
        self.keep(path.trajectory, form, states, torch.cat(found, dim=1).to(self.model.device))
        return self._kept_gradients

    def keep(self, trajectory: Trajectory, form: GradientForm, states: list[int], gradients: Tensor) -> None:
        """
        Keeps gradients that are known already.

        Args:
            trajectory (`Trajectory`): The recorded run.
            form ([`GradientForm`]): That of the gradients.
            states (`list[int]`): Recorded steps.
            gradients (`Tensor`): `(len(states), num_clusters, length)`, float32.
        """
        self._kept = _Kept(trajectory, form, states, gradients, {})

    def kept_rows(self, path: RecordedPath, form: GradientForm, state: int) -> Tensor | None:
        """Gradients of all rows in short, `(num_rows, length)`, bfloat16, where they are kept."""
        kept = self._kept
        return kept.of_rows.get(state) if kept is not None and kept.serves(path.trajectory, form, [state]) else None

    def losses(self, vector: Tensor) -> Tensor:
        """Mean loss of some rows of each cluster, times its share of all rows."""
        inputs, labels, owners = self._loss_rows
        named, parts = self.model.space.unflatten(vector.to(self.model.device)), []
        with torch.no_grad():
            for start in range(0, len(owners), LOSS_ROWS_AT_ONCE):
                part = slice(start, start + LOSS_ROWS_AT_ONCE)
                logits = self.model.logits(named, {name: value[part] for name, value in inputs.items()})
                parts.append(self.row_loss(logits, labels[part]).double().cpu())
        losses = torch.cat(parts)
        sums = torch.zeros(self.num_clusters, dtype=torch.float64).index_add_(0, owners, losses)
        counts = torch.bincount(owners, minlength=self.num_clusters).clamp_min(1)
        return sums / counts * torch.from_numpy(self.clusters.sizes / len(self.reader))

    def cost_of_gradients(self, vector: Tensor, form: GradientForm) -> PieceOfWork:
        """What one pass over all rows takes."""
        with torch.enable_grad():
            if self.keeps_rows(form, 1):
                row = self._measured_row(vector, form)
            else:
                row = measure_rows(self.model, vector, self._batches(self._max_bytes), self.row_loss, form)
        held = 4 * self.num_clusters * form.length
        return PieceOfWork(row.seconds * len(self.reader), row.peak_bytes + held, held)

    @functools.cached_property
    def _loss_rows(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        each = max(1, LOSS_ROWS // self.num_clusters)
        rows = np.concatenate([self.clusters.rows(k)[:each] for k in range(self.num_clusters)])
        inputs, labels = self.reader.batch(rows)
        return inputs, labels, torch.from_numpy(self.clusters.cluster_ids[rows]).to(torch.int64)

    def _evenly(self, count: int) -> np.ndarray:
        """So many rows at equal distances, sorted by cluster and shuffled within: `(count,)`, int64."""
        ids = self.clusters.cluster_ids
        order = np.lexsort((np.random.default_rng(0).random(len(ids)), ids))
        return order[np.linspace(0, len(ids), count, endpoint=False).astype(int)]

    def _kept_gradients(self, state: int, clusters: range) -> Tensor:
        if self._kept is None:
            raise RuntimeError("No gradients are kept.")
        return self._kept.gradients[self._kept.states.index(state), clusters.start : clusters.stop]

    def keeps_rows(self, form: GradientForm, num_states: int) -> bool:
        """Whether gradients of all rows are kept: in short, where they fit. They give the clusters' and the scores."""
        size = 2 * num_states * len(self.reader) * form.length + 4 * self.num_clusters * form.length
        return not form.is_whole and self._processes.count == 1 and size <= self._max_bytes

    def _measured_row(self, vector: Tensor, form: GradientForm) -> PieceOfWork:
        rows = range(min(LOSS_ROWS_AT_ONCE, len(self.reader)))
        inputs, labels = self.reader.batch(rows)
        named = form.named(vector)
        some = list(batches_by_length(self.model, inputs, labels, 1))
        piece = measured(lambda: [row_gradients(self.model, named, x, y, self.row_loss, form) for _, x, y in some])
        return replace(piece, seconds=piece.seconds / len(rows))

    def _batches(self, max_bytes: int) -> CachedBatches:
        groups = [self.clusters.rows(k) for k in range(self.num_clusters)]
        return CachedBatches(self.reader, groups, batch_size=ROWS_AT_ONCE, max_bytes=max_bytes)

    def _taken(
        self, path: RecordedPath, form: GradientForm, states: list[int], batches: CachedBatches, clusters: range
    ) -> Tensor:
        vectors = [path.state(state) for state in states]
        with torch.enable_grad():
            return cluster_gradients(
                self.model, vectors, batches, clusters, len(self.reader), self.row_loss, form=form
            )

    def _of_every_row(self, path: RecordedPath, form: GradientForm, state: int) -> tuple[Tensor, Tensor]:
        """The clusters' gradients, `(num_clusters, length)`, and those of all rows, `(num_rows, length)`, bfloat16."""
        named, num_rows = form.named(path.state(state)), len(self.reader)
        sums = torch.zeros(self.num_clusters, form.length, device=self.model.device)
        rows = torch.empty(num_rows, form.length, dtype=torch.bfloat16, device=self.model.device)
        for start in range(0, num_rows, READ_AT_ONCE):
            inputs, labels = self.reader.batch(range(start, min(start + READ_AT_ONCE, num_rows)))
            for part, some, own in batches_by_length(self.model, inputs, labels, 1):
                row = start + int(part)
                gradient = row_gradients(self.model, named, some, own, self.row_loss, form)[0]
                sums[int(self.clusters.cluster_ids[row])] += gradient / num_rows
                rows[row] = gradient.bfloat16()
        return sums, rows


def force(gradients: ClusterGradients, state: int, masks: Tensor, *, length: int, max_bytes: int) -> Tensor:
    """
    The driving term of replays: mask-weighted cluster gradients at a recorded state.

    Args:
        gradients (`ClusterGradients`): Of the clusters.
        state (`int`): The recorded step.
        masks (`Tensor`): `(num_masks, num_clusters)`, the weight p of each cluster.
        length (`int`): Of a gradient.
        max_bytes (`int`): Memory for gradients on their way.

    Returns:
        `Tensor`: `(num_masks, length)`, float32: `sum_k (p_k - 1) G_k`.
    """
    at_once = max(1, max_bytes // (12 * length))
    result = torch.zeros(len(masks), length, device=masks.device)
    for start in range(0, masks.shape[1], at_once):
        clusters = range(start, min(start + at_once, masks.shape[1]))
        result += (masks[:, clusters.start : clusters.stop] - 1) @ gradients(state, clusters)
    return result


def training_rows(rows: Any, model: FunctionalModel, clusters: ClusterMap, data_collator: Any) -> RowReader:
    """
    Opens the training rows.

    Raises:
        ValueError: If there are more or fewer than the clusters have.
    """
    reader = RowReader(rows, model, data_collator=data_collator, what="rows")
    if len(reader) != clusters.num_rows:
        raise ValueError(
            f"`rows` has {len(reader)} rows, but the clusters have {clusters.num_rows}. Pass the training dataset "
            "itself; what is to be explained goes first, as queries."
        )
    return reader
