"""How a model without some clusters is made and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.anchored_replay import AnchoredReplayEngine
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.engines.registry import default_engine
from hf_rgm.engines.training_on import TrainingOnEngine
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import RowReader
from hf_rgm.results.unlearned import UnlearningCheck

ROWS_AT_ONCE = 256
MAX_LINEAR_SHARE = 0.25


def chosen_clusters(clusters: Iterable[str | int], known: ClusterMap) -> list[int]:
    """
    Indices of clusters that are to be removed, in order.

    Args:
        clusters (`Iterable[str | int]`): Their names or indices; or one.
        known (`ClusterMap`): All clusters.

    Raises:
        KeyError, IndexError: If there is no cluster of a name or index.
        ValueError: If none or all are named.
    """
    named = [clusters] if isinstance(clusters, str | int) else clusters
    chosen = sorted({known.index(cluster) for cluster in named})
    if not 0 < len(chosen) < known.num_clusters:
        raise ValueError(
            f"{len(chosen)} of {known.num_clusters} clusters are to be removed. Name at least one, and leave at least "
            "one."
        )
    return chosen


def engine_without(
    chosen: list[int],
    clusters: ClusterMap,
    available: dict[str, bool],
    *,
    rewind: float | None = None,
    whole: bool = True,
) -> str:
    """
    The engine that comes nearest to retraining without some clusters.

    Measured with 2% of the data removed, where linearised replay is nearer and anchored replay may be farther off than
    the trained model itself, and with half of it, where it is the other way round, and training on from a recorded
    state is nearer still.

    Args:
        chosen (`list[int]`): Indices of the clusters that are removed.
        clusters (`ClusterMap`): All clusters.
        available (`dict[str, bool]`): Whether there are `"rows"`, `"samples"` and `"responses"`.
        rewind (`float`, *optional*): The rewind point that is asked for.
        whole (`bool`, *optional*, defaults to `True`): Whether the linear engine gives models.
    """
    share = clusters.sizes[chosen].sum() / clusters.num_rows
    linear = default_engine(available, rewind=rewind)
    if share <= MAX_LINEAR_SHARE and (whole or linear != LinearEngine.name):
        return linear
    return TrainingOnEngine.name if available["rows"] else AnchoredReplayEngine.name


def groups_to_compare(
    chosen: Sequence[int], clusters: ClusterMap, rows: RowReader | None, queries: RowReader | None
) -> list[tuple[str, RowReader, np.ndarray]]:
    """Rows whose losses tell what was removed, as far as there are any: how they are called, their reader, which."""
    groups: list[tuple[str, RowReader, np.ndarray]] = []
    if rows is not None:
        removed = np.isin(clusters.cluster_ids, chosen)
        groups.append(("removed rows", rows, np.flatnonzero(removed)))
        groups.append(("the other training rows", rows, np.flatnonzero(~removed)))
    if queries is not None:
        groups.append(("queries", queries, np.arange(len(queries))))
    return groups


def compare_losses(
    model: FunctionalModel, before: Tensor, after: Tensor, what: str, reader: RowReader, rows: np.ndarray
) -> UnlearningCheck:
    """
    The mean loss of some rows under two vectors of parameters.

    Args:
        model (`FunctionalModel`): The model, within its `differentiable()`.
        before, after (`Tensor`): `(num_parameters,)`.
        what (`str`): How the rows are called.
        reader (`RowReader`): Reads them.
        rows (`np.ndarray`): Which, `(num_rows,)`, int64.
    """
    objective = resolve_objective("loss")
    totals = [0.0, 0.0]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = Queries(*reader.batch(rows[start : start + ROWS_AT_ONCE]))
        for index, vector in enumerate((before, after)):
            totals[index] += float(objective.values(model, vector, batch).sum())
    return UnlearningCheck(what, len(rows), *(total / len(rows) for total in totals))
