"""Sources of gradients and curvature for engines: a synset's samples, or the training rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.curvature import WeightedInputs
from hf_rgm.engines.gradient_form import GradientForm
from hf_rgm.engines.memory_shares import cluster_ranges, ranges
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import IGNORED_LABEL, RowLoss
from hf_rgm.model.padding import batches_by_length
from hf_rgm.model.processes import Processes
from hf_rgm.model.row_gradients import cluster_gradients, measure_rows, row_gradients
from hf_rgm.model.row_reader import CachedBatches, RowReader
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.samples import SynsetGradients, SyntheticSamples, soft_cross_entropies
from hf_rgm.trajectory.exposure import Exposure
from hf_rgm.trajectory.path import RecordedPath
from hf_rgm.trajectory.trajectory import Trajectory

ROWS_AT_ONCE, READ_AT_ONCE = 256, 1024
# Rows from which rows of curvature are chosen (docs/method.md, which rows of curvature).
MAX_CANDIDATES = 2048
# Rows that stand for the clusters' losses, at least one of each cluster (docs/method.md, how far back).
LOSS_ROWS, LOSS_ROWS_AT_ONCE = 64, 32

# Maps a recorded step and some clusters to their gradients there, `(len(clusters), length)`.
ClusterGradients = Callable[[int, range], Tensor]

Batch = tuple[Tensor, dict[str, Tensor], Tensor]


@dataclass(eq=False, repr=False)
class SampleSource:
    """Source of the clusters' training losses, with gradients and curvature: a synset's samples."""

    model: FunctionalModel
    inputs: ContinuousInputs
    samples: SyntheticSamples
    exposure: Exposure | None = None

    def __post_init__(self) -> None:
        total = None if self.exposure is None else self.exposure.total_of_clusters
        if total is not None:  # samples stand for clusters as if all rows were seen alike
            weights = torch.from_numpy(total).to(self.samples.log_weights).log()
            self.samples = replace(self.samples, log_weights=self.samples.log_weights + weights[:, None])
        self._num_clusters, self._per_cluster = self.samples.log_weights.shape[:2]
        self._gradients = SynsetGradients(self.model, self.inputs)

    @functools.cached_property
    def weighted_inputs(self) -> WeightedInputs:
        """Samples, or rows, whose weighted curvature is that of the training loss, sorted by cluster."""
        flat = self.samples.flatten()
        clusters = torch.arange(self._num_clusters).repeat_interleave(self._per_cluster).to(flat.log_weights.device)
        return WeightedInputs(self.inputs.to_forward(flat), flat.log_weights.exp(), clusters)

    def gradients(self, path: RecordedPath, form: GradientForm) -> ClusterGradients:
        """Gradients of the clusters at the recorded states of a path; all processes must call it together."""
        shares = None if self.exposure is None else self.exposure.of_clusters(path.used_states)
        if shares is None or self.exposure is None:
            return lambda state, clusters: self._taken(path.state(state), form, clusters)
        total = self.exposure.total_of_clusters
        shares = {
            state: own if total is None else own / np.where(total > 0, total, 1) for state, own in shares.items()
        }

        def gradients(state: int, clusters: range) -> Tensor:
            found = self._taken(path.state(state), form, clusters)
            return found * torch.from_numpy(shares[state][clusters.start : clusters.stop]).to(found)[:, None]

        return gradients

    @torch.no_grad()
    def losses(self, vector: Tensor) -> Tensor:
        """Summands of the training loss at `(num_parameters,)`, one per cluster: `(num_clusters,)`, float64, CPU."""
        parameters = self.model.space.unflatten(vector.to(self.model.device))
        losses = []
        for clusters in ranges(self._num_clusters, max(1, LOSS_ROWS // self._per_cluster)):
            some = self.samples[clusters.start : clusters.stop].flatten()
            logits = self.model.logits(parameters, self.inputs.to_forward(some))
            terms = soft_cross_entropies(logits, some.targets, some.log_weights, some.target_ids)
            losses.append(terms.unflatten(0, (-1, self._per_cluster)).flatten(1).sum(1).double().cpu())
        return torch.cat(losses)

    def cost_of_gradients(self, vector: Tensor, form: GradientForm) -> PieceOfWork:
        """Cost of the clusters' gradients at one state."""
        self._gradients(self.model.space.unflatten(vector), self.samples[:2])  # decides how to vectorise
        clusters = range(self._num_clusters if form.is_whole else 1)
        some = measured(lambda: self._taken(vector, form, clusters))
        return replace(some, seconds=some.seconds * self._num_clusters / len(clusters))

    def _taken(self, vector: Tensor, form: GradientForm, clusters: range) -> Tensor:
        """Gradients of some clusters at `(num_parameters,)`: `(len(clusters), length)`."""
        space = self.model.space
        named = space.unflatten(vector)
        if form.is_whole:
            return self._gradients(named, self.samples[clusters.start : clusters.stop]).detach()
        own = (self._gradients(named, self.samples[k : k + 1]).detach()[0] for k in clusters)
        return torch.stack([form(space.unflatten(gradient)) for gradient in own])


@dataclass(frozen=True, eq=False)
class _Kept:
    """Gradients kept for some states of a run: `(num_states, num_clusters, length)`, and `(num_rows, length)` each."""

    trajectory: Trajectory
    form: GradientForm
    states: list[int]
    of_clusters: Tensor
    of_rows: dict[int, Tensor] = field(default_factory=dict)

    def serves(self, trajectory: Trajectory, form: GradientForm, states: list[int]) -> bool:
        return self.trajectory is trajectory and self.form == form and {*states} <= {*self.states}

    def gradients(self, state: int, clusters: range) -> Tensor:
        return self.of_clusters[self.states.index(state), clusters.start : clusters.stop]


@dataclass(eq=False, repr=False)
class RowSource:
    """Source of the clusters' training losses, with gradients and curvature: the training rows."""

    model: FunctionalModel
    reader: RowReader
    clusters: ClusterMap
    row_loss: RowLoss
    max_bytes: int = field(kw_only=True)  # for what is kept: gradients, or collated batches
    processes: Processes = field(kw_only=True)
    exposure: Exposure | None = field(default=None, kw_only=True)
    _kept: _Kept | None = field(default=None, init=False)

    @functools.cached_property
    def weighted_inputs(self) -> WeightedInputs:
        # Rows at equal distances in an order sorted by cluster and shuffled within: every cluster by its size.
        ids = self.clusters.cluster_ids
        order = np.lexsort((np.random.default_rng(0).random(len(ids)), ids))
        rows = order[np.linspace(0, len(ids), min(MAX_CANDIDATES, len(ids)), endpoint=False).astype(int)]
        inputs, labels = self.reader.batch(rows)
        weights, loss = (labels != IGNORED_LABEL).float() * (self.row_loss.label_weight / len(rows)), None
        # A loss of one's own over several classes a row is taken to be curved as the cross entropy is.
        if self.row_loss.function is not None and (labels.dim() == 1 or labels.is_floating_point()):
            loss = self.row_loss.function
            weights = torch.full((len(rows),), self.row_loss.scale / len(rows), device=labels.device)
        total = None if self.exposure is None else self.exposure.total_of_rows
        if total is not None:
            weights *= torch.from_numpy(total[rows]).to(weights).reshape(-1, *[1] * (weights.dim() - 1))
        owners = torch.from_numpy(ids[rows]).to(labels.device, torch.int64)
        return WeightedInputs(inputs, weights, owners, loss, None if loss is None else labels)

    def gradients(self, path: RecordedPath, form: GradientForm) -> ClusterGradients:
        """Gradients of the clusters, kept for shorter paths of the same run where they fit into memory."""
        states = [state for state, _, _ in path.segments()]
        if self._kept is not None and self._kept.serves(path.trajectory, form, states):
            return self._kept.gradients
        if self.keeps_rows(form, len(states)):
            sums = torch.zeros(len(states), self.clusters.num_clusters, form.length, device=self.model.device)
            weights = self.weights(path)
            rows = {
                state: self._every_row(path.state(state), form, sums[i], weights.get(state))
                for i, state in enumerate(states)
            }
            self._kept = _Kept(path.trajectory, form, states, sums, rows)
            return self._kept.gradients
        if not self._keeps_clusters(form, len(states)):
            return self.gradients_as_asked(path, form)
        batches = self._by_cluster(0)
        parts = self.processes.parts(len(batches), at_most=len(batches))
        found = self.processes.map(lambda part: self._taken(path, states, form, batches, part).cpu(), parts)
        self.keep(path.trajectory, form, states, torch.cat(found, dim=1).to(self.model.device))
        return self.gradients(path, form)

    def gradients_as_asked(self, path: RecordedPath, form: GradientForm) -> ClusterGradients:
        """Gradients of the clusters, kept ones or else computed whenever they are asked for."""
        states = [state for state, _, _ in path.segments()]
        if self._kept is not None and self._kept.serves(path.trajectory, form, states):
            return self._kept.gradients
        batches = self._by_cluster(self.max_bytes)
        return lambda state, clusters: self._taken(path, [state], form, batches, clusters)[0]

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Whether training saw each row, `(num_rows,)`."""
        total = None if self.exposure is None else self.exposure.total_of_rows
        return np.ones(len(self.reader), dtype=bool) if total is None else total > 0

    def weights(self, path: RecordedPath) -> dict[int, Tensor]:
        """Exposures of the rows by recorded state, `(num_rows,)`; none if all are 1."""
        found = None if self.exposure is None else self.exposure.of_rows(path.used_states)
        return {state: torch.from_numpy(own).to(self.model.device) for state, own in (found or {}).items()}

    def unknown_sums(self, trajectory: Trajectory, form: GradientForm, states: list[int]) -> dict[int, Tensor]:
        """Zeros `(num_clusters, length)` by state, to add rows' gradients to; none if they are known or do not fit."""
        known = self._kept is not None and self._kept.serves(trajectory, form, states)
        if known or self.processes.count > 1 or not self._keeps_clusters(form, len(states)):
            return {}
        return {
            state: torch.zeros(self.clusters.num_clusters, form.length, device=self.model.device) for state in states
        }

    def keep(self, trajectory: Trajectory, form: GradientForm, states: list[int], gradients: Tensor) -> None:
        """Keeps gradients that are known already, `(len(states), num_clusters, length)`, float32."""
        self._kept = _Kept(trajectory, form, states, gradients)

    def _keeps_clusters(self, form: GradientForm, num_states: int) -> bool:
        # Twice for a moment, when the parts are put together.
        return 8 * num_states * self.clusters.num_clusters * form.length <= self.max_bytes

    def keeps_rows(self, form: GradientForm, num_states: int) -> bool:
        """Whether sketches of all rows are kept (bfloat16): they give clusters' gradients and the rows' scores."""
        size = 2 * num_states * len(self.reader) * form.length + 4 * self.clusters.num_clusters * form.length
        return not form.is_whole and self.processes.count == 1 and size <= self.max_bytes

    def kept_rows(self, path: RecordedPath, form: GradientForm, state: int) -> Tensor | None:
        """Sketched gradients of all rows, `(num_rows, length)`, bfloat16, where they are kept."""
        kept = self._kept
        return kept.of_rows.get(state) if kept is not None and kept.serves(path.trajectory, form, [state]) else None

    def batches(self, rows: range, form: GradientForm, max_bytes: int) -> Iterator[Batch]:
        """Positions within `rows`, `(batch_size,)`, inputs and labels: batches whose row gradients fit into memory."""
        at_once = min(ROWS_AT_ONCE, form.at_once(max_bytes))
        # The more texts are read together, the more of them have one length and form a batch.
        is_text = self.model.main_input_name == "input_ids"
        for read in ranges(len(rows), READ_AT_ONCE if is_text else max(at_once, LOSS_ROWS_AT_ONCE)):
            inputs, labels = self.reader.batch(rows[read.start : read.stop])
            for part, some, own in batches_by_length(self.model, inputs, labels, at_once):
                yield read.start + part, some, own

    def losses(self, vector: Tensor) -> Tensor:
        """Mean loss of some rows of each cluster, times the cluster's share of all rows."""
        inputs, labels, owners = self._loss_rows
        named, losses = self.model.space.unflatten(vector.to(self.model.device)), []
        with torch.no_grad():
            for part in ranges(len(owners), LOSS_ROWS_AT_ONCE):
                some = slice(part.start, part.stop)
                logits = self.model.logits(named, {name: value[some] for name, value in inputs.items()})
                losses.append(self.row_loss(logits, labels[some]).double().cpu())
        sums = torch.zeros(self.clusters.num_clusters, dtype=torch.float64).index_add_(0, owners, torch.cat(losses))
        counts = torch.bincount(owners, minlength=self.clusters.num_clusters).clamp_min(1)
        return sums / counts * torch.from_numpy(self.clusters.sizes / len(self.reader))

    @torch.enable_grad()
    def cost_of_gradients(self, vector: Tensor, form: GradientForm) -> PieceOfWork:
        """Cost of one pass over all rows."""
        if self.keeps_rows(form, 1):
            count, named = min(LOSS_ROWS_AT_ONCE, len(self.reader)), form.named(vector)
            some = list(self.batches(range(count), form, self.max_bytes))
            row = measured(lambda: [row_gradients(self.model, named, x, y, self.row_loss, form) for _, x, y in some])
            row = replace(row, seconds=row.seconds / count)
        else:
            row = measure_rows(self.model, vector, self._by_cluster(self.max_bytes), self.row_loss, form)
        held = 4 * self.clusters.num_clusters * form.length
        return PieceOfWork(row.seconds * len(self.reader), row.peak_bytes + held, held)

    @functools.cached_property
    def _loss_rows(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        each = max(1, LOSS_ROWS // self.clusters.num_clusters)
        rows = np.concatenate([self.clusters.rows(k)[:each] for k in range(self.clusters.num_clusters)])
        return *self.reader.batch(rows), torch.from_numpy(self.clusters.cluster_ids[rows]).long()

    def _by_cluster(self, max_bytes: int) -> CachedBatches:
        groups = [self.clusters.rows(k) for k in range(self.clusters.num_clusters)]
        return CachedBatches(self.reader, groups, batch_size=ROWS_AT_ONCE, max_bytes=max_bytes)

    @torch.enable_grad()
    def _taken(
        self, path: RecordedPath, states: list[int], form: GradientForm, batches: CachedBatches, clusters: range
    ) -> Tensor:
        """Gradients of some clusters at several states, `(len(states), len(clusters), length)`."""
        weights, vectors = self.weights(path), [path.state(state) for state in states]
        return cluster_gradients(
            *(self.model, vectors, batches, clusters, len(self.reader), self.row_loss),
            form=form,
            row_weights=torch.stack([weights[state] for state in states]) if weights else None,
        )

    def _every_row(self, vector: Tensor, form: GradientForm, sums: Tensor, weights: Tensor | None) -> Tensor:
        """Sketches of all rows, `(num_rows, length)`, bfloat16; adds them to `sums`, `(num_clusters, length)`."""
        named, num_rows = form.named(vector), len(self.reader)
        rows = torch.empty(num_rows, form.length, dtype=torch.bfloat16, device=self.model.device)
        for part, inputs, labels in self.batches(range(num_rows), form, self.max_bytes):
            row = int(part)  # sketches are computed one by one
            gradient = row_gradients(self.model, named, inputs, labels, self.row_loss, form)[0]
            weight = 1.0 if weights is None else float(weights[row])
            sums[int(self.clusters.cluster_ids[row])] += gradient * (weight / num_rows)
            rows[row] = gradient.bfloat16()
        return rows


Source = SampleSource | RowSource


def force(gradients: ClusterGradients, state: int, masks: Tensor, *, length: int, max_bytes: int) -> Tensor:
    """Driving term of replays: mask-weighted cluster gradients at a recorded state, `(num_masks, length)`."""
    result = torch.zeros(len(masks), length, device=masks.device)
    changed = torch.nonzero((masks != 1).any(0)).flatten().tolist()
    few = 2 * len(changed) < masks.shape[1]
    for clusters in [range(k, k + 1) for k in changed] if few else cluster_ranges(masks.shape[1], length, max_bytes):
        # sum_k (p_k - 1) G_k
        result += (masks[:, clusters.start : clusters.stop] - 1) @ gradients(state, clusters)
    return result


def training_rows(
    rows: Any, model: FunctionalModel, clusters: ClusterMap, data_collator: Any, trajectory: Trajectory
) -> RowReader:
    """Reader of a run's training rows; raises a `ValueError` if there are more or fewer than the clusters have."""
    reader = RowReader(rows, model, data_collator=data_collator, what="rows", **trajectory.reader_options)
    if len(reader) != clusters.num_rows:
        raise ValueError(
            f"`rows` has {len(reader)} rows, but the clusters have {clusters.num_rows}. Pass the training dataset "
            "itself; what is to be explained goes first, as queries."
        )
    return reader
