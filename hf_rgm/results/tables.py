"""The attribution matrix as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from hf_rgm.results.result import AttributionResult

EXAMPLE_ROWS = 3


def long_form(result: AttributionResult, k: int | None = None) -> pd.DataFrame:
    """One line for each query and cluster, or the `k` highest and `k` lowest of each query, the highest first."""
    scores, sizes = result.scores, result.cluster_sizes
    num_queries, num_clusters = scores.shape
    ranks = np.arange(num_clusters)
    if k is not None and 2 * k < num_clusters:
        ranks = np.concatenate([ranks[:k], ranks[-k:]])
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, ranks]
    frame = pd.DataFrame(
        {
            "query_id": np.repeat(np.array(result.query_ids), len(ranks)),
            "rank": np.tile(ranks + 1, num_queries),
            "cluster": np.array(result.cluster_names, dtype=object)[chosen].ravel(),
            "score": np.take_along_axis(scores, chosen, axis=1).ravel(),
            "size": sizes[chosen].ravel(),
        }
    )
    if result.cluster_ids is not None:
        members = np.split(np.argsort(result.cluster_ids, kind="stable"), np.cumsum(sizes)[:-1])
        frame["example_rows"] = [
            _examples(members[cluster], score, None if result.row_scores is None else result.row_scores[query])
            for query, clusters in enumerate(chosen)
            for cluster, score in zip(clusters, scores[query, clusters], strict=True)
        ]
    return frame


def _examples(rows: np.ndarray, cluster_score: float, row_scores: np.ndarray | None) -> list[int]:
    """The rows that most push the way their cluster does; without row scores, its first rows."""
    if row_scores is not None:
        direction = 1.0 if cluster_score >= 0 else -1.0
        rows = rows[np.argsort(-direction * row_scores[rows], kind="stable")]
    return rows[:EXAMPLE_ROWS].tolist()
