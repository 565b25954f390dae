"""Attributions of several training runs, averaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_rgm.attribution.result import AttributionResult


def average_results(results: Sequence[AttributionResult]) -> AttributionResult:
    """
    Mean over runs that differ in their seed only: what the training data does, whatever the seed.

    One run's scores hold what the data did in that run, chance of initialisation and order included. Retraining with
    another seed meets other chances; averaging a few runs leaves what they share, which agrees clearly better with
    retraining.

    Args:
        results (`Sequence[AttributionResult]`): One for each run: same queries, clusters, rows, objective and engine.

    Returns:
        `AttributionResult`: mean scores, row scores (where all have them) and objective values.

    Raises:
        ValueError: If there are none, or they differ in more than the run; the difference is named.

    Example:

    ```python
    >>> from hf_rgm import Attributor
    >>> from hf_rgm.attribution.ensemble import average_results
    >>> from hf_rgm.testing import tiny_recorded_run, tiny_synset
    >>> run = tiny_recorded_run()
    >>> result = Attributor(run.model, tiny_synset(), disable_tqdm=True).attribute(run.queries)
    >>> average_results([result, result]).metadata["num_runs"]
    2

    ```
    """
    if not results:
        raise ValueError("There are no results to average. Pass one for each training run.")
    first = results[0]
    for position, other in enumerate(results[1:], start=1):
        for name in ("query_ids", "cluster_names", "objective", "engine"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"Results 0 and {position} differ in `{name}`. Ask every run's attributor the same: same queries, "
                    "objective and engine, and synsets over the same clusters."
                )
        for name in ("cluster_sizes", "cluster_ids"):
            if not np.array_equal(getattr(other, name), getattr(first, name)):
                raise ValueError(
                    f"Results 0 and {position} differ in `{name}`: their synsets have other clusters. Distil every "
                    "run with the same `ClusterMap`."
                )
        if (other.row_scores is None) != (first.row_scores is None):
            raise ValueError(f"Of results 0 and {position}, only one has row scores. Pass `rows` to both or neither.")
    rows = [result.row_scores for result in results if result.row_scores is not None]
    return AttributionResult(
        scores=np.mean([result.scores for result in results], axis=0),
        row_scores=np.mean(rows, axis=0) if rows else None,
        cluster_names=first.cluster_names,
        cluster_sizes=first.cluster_sizes,
        cluster_ids=first.cluster_ids,
        query_ids=first.query_ids,
        objective=first.objective,
        objective_values=np.mean([result.objective_values for result in results], axis=0),
        engine=first.engine,
        metadata={"num_runs": len(results), "runs": [result.metadata for result in results]},
    )
