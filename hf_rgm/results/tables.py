"""The attribution matrix as a table to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

EXAMPLE_ROWS = 3


def long_form(
    scores: np.ndarray,
    query_ids: Sequence[Any],
    cluster_names: Sequence[str],
    cluster_sizes: np.ndarray,
    *,
    cluster_ids: np.ndarray | None = None,
    row_scores: np.ndarray | None = None,
    k: int | None = None,
) -> pd.DataFrame:
    """
    One line for each query and cluster, the highest score of each query first.

    Args:
        scores (`np.ndarray`): `(num_queries, num_clusters)`, float32.
        query_ids (`Sequence`): One for each query.
        cluster_names (`Sequence[str]`): One for each cluster.
        cluster_sizes (`np.ndarray`): `(num_clusters,)`, int64.
        cluster_ids (`np.ndarray`, *optional*): The cluster of each row, `(num_rows,)`, int64. Adds `example_rows`.
        row_scores (`np.ndarray`, *optional*): `(num_queries, num_rows)`, float32. Examples are then the rows that most
            push the way their cluster does, otherwise the cluster's first rows.
        k (`int`, *optional*): Keep only the `k` highest and `k` lowest clusters of each query.

    Returns:
        `pd.DataFrame`: columns `query_id`, `rank` (from 1), `cluster`, `score`, `size` and maybe `example_rows`.
    """
    num_queries, num_clusters = scores.shape
    ranks = np.arange(num_clusters)
    if k is not None and 2 * k < num_clusters:
        ranks = np.concatenate([ranks[:k], ranks[-k:]])
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, ranks]
    frame = pd.DataFrame(
        {
            "query_id": np.repeat(np.array(query_ids), len(ranks)),
            "rank": np.tile(ranks + 1, num_queries),
            "cluster": np.array(cluster_names, dtype=object)[chosen].ravel(),
            "score": np.take_along_axis(scores, chosen, axis=1).ravel(),
            "size": cluster_sizes[chosen].ravel(),
        }
    )
    if cluster_ids is not None:
        members = np.split(np.argsort(cluster_ids, kind="stable"), np.cumsum(cluster_sizes)[:-1])
        frame["example_rows"] = [
            _examples(members[cluster], scores[query, cluster], None if row_scores is None else row_scores[query])
            for query in range(num_queries)
            for cluster in chosen[query]
        ]
    return frame


def _examples(rows: np.ndarray, cluster_score: float, row_scores: np.ndarray | None) -> list[int]:
    if row_scores is not None:
        direction = 1.0 if cluster_score >= 0 else -1.0
        rows = rows[np.argsort(-direction * row_scores[rows], kind="stable")]
    return rows[:EXAMPLE_ROWS].tolist()
