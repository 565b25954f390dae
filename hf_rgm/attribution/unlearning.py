"""Making and checking a model without some clusters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hf_rgm.attribution.subject import Subject
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.anchored_replay import AnchoredReplayEngine
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.engines.registry import default_engine
from hf_rgm.engines.training_on import TrainingOnEngine
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import LossFunction
from hf_rgm.model.row_reader import RowReader
from hf_rgm.results.unlearned import UnlearnedModel, UnlearningCheck

ROWS_AT_ONCE = 256
MAX_LINEAR_SHARE = 0.25


def chosen_clusters(clusters: Iterable[str | int], known: ClusterMap) -> list[int]:
    """Sorted indices of the clusters to remove; raises an error if one is unknown, or if none or all are named."""
    named = [clusters] if isinstance(clusters, str | int) else clusters
    chosen = sorted({known.index(cluster) for cluster in named})
    if not 0 < len(chosen) < known.num_clusters:
        raise ValueError(
            f"{len(chosen)} of {known.num_clusters} clusters are to be removed. Name at least one, and leave at least "
            "one."
        )
    return chosen


def engine_without(
    share: float,
    available: dict[str, bool],
    *,
    rewind: float | None = None,
    whole: bool = True,
) -> str:
    """Name of the engine nearest to retraining without a share of the data; `whole`: the linear one gives models."""
    # Without 2% of the data linearised replay is nearest, and anchored replay may be farther off than the trained
    # model itself. Without half of it anchored replay is nearer, and training on from a recorded state nearest.
    linear = default_engine(available, rewind=rewind)
    if share <= MAX_LINEAR_SHARE and (whole or linear != LinearEngine.name):
        return linear
    return TrainingOnEngine.name if available["rows"] else AnchoredReplayEngine.name


def without_clusters(
    engine: Engine,
    removed: Sequence[int],
    rewind: float | None,
    queries: RowReader | None,
    *,
    subject: Subject,
    like: nn.Module,
) -> UnlearnedModel:
    """Model without some clusters, a copy of `like`, and its losses on the rows and queries that are given."""
    run = engine.run
    mask = torch.ones(1, run.clusters.num_clusters)
    mask[0, removed] = 0
    outcome = engine.parameters(mask, rewind)
    vector = outcome.values[0].to(run.model.device)
    groups: list[tuple[str, RowReader, np.ndarray]] = []
    if run.rows is not None:
        is_removed = np.isin(run.clusters.cluster_ids, removed)
        groups.append(("removed rows", run.rows.reader, np.flatnonzero(is_removed)))
        groups.append(("the other training rows", run.rows.reader, np.flatnonzero(~is_removed)))
    if queries is not None:
        groups.append(("queries", queries, np.arange(len(queries))))
    row_loss = subject.row_loss.function
    checks = [_compared(run.model, run.final, vector, *group, row_loss) for group in groups]
    return UnlearnedModel(
        model=run.model.module_with(run.model.space.unflatten(vector), like=like).eval(),
        clusters=[run.clusters.names[k] for k in removed],
        sizes=[int(run.clusters.sizes[k]) for k in removed],
        checks=checks,
        engine=engine.name,
        rewind_step=outcome.start,
        num_steps=run.trajectory.num_steps,
        parameters_sha256=subject.parameters_sha256,
        model_name=subject.model_description.get("name_or_path"),
        fidelity=subject.fidelity,
    )


def _compared(
    model: FunctionalModel,
    before: Tensor,
    after: Tensor,
    what: str,
    reader: RowReader,
    rows: np.ndarray,
    row_loss: LossFunction | None,
) -> UnlearningCheck:
    """Mean losses of some rows under two vectors of parameters."""
    objective = resolve_objective("loss")
    totals = [0.0, 0.0]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = Queries(*reader.batch(rows[start : start + ROWS_AT_ONCE]), row_loss)
        for index, vector in enumerate((before, after)):
            totals[index] += float(objective.values(model, vector, batch).sum())
    return UnlearningCheck(what, len(rows), *(total / len(rows) for total in totals))
