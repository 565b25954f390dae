"""Recorded runs for engines: of full-batch trainings, by their rows as samples or as rows."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.gradient_sources import RowSource, SampleSource
from hf_rgm.engines.recorded_run import RecordedRun
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import RowLoss
from hf_rgm.model.processes import Processes
from hf_rgm.model.row_reader import RowReader
from tests.recorded import Run, engine_parts

ROWS_PER_CLUSTER = 3
FLOAT_TOLERANCE = 2e-5
"""Float32 rounding over twenty steps, against float64."""

MASKS = torch.tensor([[0, 1, 1, 1], [1, 0.5, 0, 1], [2, 0, 1, 1.5]])


def clusters_of(run: Run, rows_per_cluster: int = ROWS_PER_CLUSTER) -> ClusterMap:
    return ClusterMap.from_ids([row // rows_per_cluster for row in range(len(run.labels))])


def sample_run(run: Run, rows_per_cluster: int = ROWS_PER_CLUSTER, *, max_bytes: int = 2**30) -> RecordedRun:
    """The synset is the real rows themselves."""
    model, inputs, samples = engine_parts(run, rows_per_cluster)
    return RecordedRun(
        model,
        run.trajectory,
        clusters_of(run, rows_per_cluster),
        samples=SampleSource(model, inputs, samples),
        max_bytes=max_bytes,
        processes=Processes(),
        disable_tqdm=True,
    )


def row_source(
    run: Run, model: FunctionalModel, rows_per_cluster: int = ROWS_PER_CLUSTER, *, max_bytes: int = 2**30
) -> RowSource:
    items = [{"features": x.float(), "labels": int(y)} for x, y in zip(run.features, run.labels, strict=True)]
    reader = RowReader(items, model)
    clusters = clusters_of(run, rows_per_cluster)
    return RowSource(model, reader, clusters, RowLoss(), max_bytes=max_bytes, processes=Processes())


def row_run(run: Run, rows_per_cluster: int = ROWS_PER_CLUSTER, *, max_bytes: int = 2**30) -> RecordedRun:
    """The training rows, and no synset."""
    model = FunctionalModel(run.model.float())
    return RecordedRun(
        model,
        run.trajectory,
        clusters_of(run, rows_per_cluster),
        rows=row_source(run, model, rows_per_cluster, max_bytes=max_bytes),
        max_bytes=max_bytes,
        processes=Processes(),
        disable_tqdm=True,
    )


def flat(run: RecordedRun, state: int) -> Tensor:
    return run.model.space.flatten(run.trajectory.state(state).parameters)


def retrained(run: Run, masks: Tensor, **options) -> Tensor:
    """Final parameters of trainings under cluster weights, `(num_masks, num_parameters)`, float32."""
    weights = masks.double().repeat_interleave(len(run.labels) // masks.shape[1], dim=1)
    return torch.stack([run.train(own, **options) for own in weights]).float()
