"""How a budget of retrainings is spent."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hf_rgm.agreement.correlations import MIN_POINTS_FOR_INTERVAL
from hf_rgm.agreement.subsets import count_masks

LDS_CLUSTERS, LEAVE_CLUSTER_OUT, LDS_ROWS = MEASURES = ("lds_clusters", "leave_cluster_out", "lds_rows")
GOOD_NUM_POINTS = 12


def plan_retrainings(
    budget: int,
    *,
    num_clusters: int,
    num_rows: int,
    row_scores: bool,
    measures: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    recorded_seeds: Collection[int | None] = (),
) -> tuple[dict[str, int], tuple[int, ...]]:
    """
    Splits a budget of retrainings: the number of subsets for each measure, and the seeds that each is retrained with.

    - A second seed pays from 24 retrainings on: 12 subsets with two seeds give as good an estimate as 24 with one
      (within 0.01 of LDS on the benchmark's digits, better for rows and single clusters, where seeds differ most), and
      also a noise ceiling, without which a low score cannot be told from a noisy truth.
    - Half-subsets of clusters come first: half of the data moves the model far more than its seed does. Single
      clusters left out, whose effects seeds mostly hide, and half-subsets of rows follow where each measure still gets
      12 subsets. Clusters to leave out are drawn at random if there are more.
    - Default seeds are not those of the recorded runs.
    """
    enough = max(budget, MIN_POINTS_FOR_INTERVAL)
    possible = {
        LDS_CLUSTERS: count_masks(num_clusters, num_clusters // 2, at_most=enough),
        LEAVE_CLUSTER_OUT: num_clusters,
        LDS_ROWS: count_masks(num_rows, num_rows // 2, at_most=enough) if row_scores else 0,
    }
    good = {name: min(GOOD_NUM_POINTS, number) for name, number in possible.items()}
    chosen = _chosen(measures, possible)
    wanted = chosen[:1] if measures is None else chosen
    if seeds is None:
        seeds = [seed for seed in range(1, len(recorded_seeds) + 3) if seed not in recorded_seeds][:2]
        if budget < len(seeds) * sum(good[name] for name in wanted):
            seeds = seeds[:1]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must name at least one seed, none twice, got {list(seeds)}.")
    left = budget // len(seeds)
    if measures is None:
        affordable = [i for i in range(1, len(chosen) + 1) if sum(good[name] for name in chosen[:i]) <= left]
        chosen = chosen[: max([1, *affordable])]
    smallest = MIN_POINTS_FOR_INTERVAL * len(chosen)
    if left < smallest:
        raise ValueError(
            f"`budget` = {budget} is too small: an interval needs {MIN_POINTS_FOR_INTERVAL} retrained subsets for "
            f"each measure ({', '.join(chosen)}) and seed ({', '.join(map(str, seeds))}), together "
            f"{smallest * len(seeds)}. Raise it, or ask for fewer measures or seeds."
        )
    num_points: dict[str, int] = {}
    for position, name in enumerate(sorted(chosen, key=lambda name: possible[name])):
        num_points[name] = min(left // (len(chosen) - position), possible[name])
        left -= num_points[name]
    return {name: num_points[name] for name in chosen}, tuple(seeds)


def _chosen(measures: Sequence[str] | None, possible: dict[str, int]) -> list[str]:
    if measures is None:
        chosen = [name for name in MEASURES if possible[name] >= MIN_POINTS_FOR_INTERVAL]
        if not chosen:
            raise ValueError(
                f"{possible[LEAVE_CLUSTER_OUT]} clusters and no row scores leave nothing to measure with an "
                "interval. Use at least 4 clusters, or measure with `rows=True`."
            )
        return chosen
    if isinstance(measures, str) or not measures or not set(measures) <= set(MEASURES):
        raise ValueError(f"`measures` must be a list out of {', '.join(MEASURES)}, got {measures!r}.")
    for name in measures:
        if possible[name] < MIN_POINTS_FOR_INTERVAL:
            why = "rows are not scored" if name == LDS_ROWS else f"the clusters allow {possible[name]}"
            raise ValueError(
                f"{name!r} needs at least {MIN_POINTS_FOR_INTERVAL} different subsets, but {why}. "
                "Use more clusters, or measure with `rows=True` and a differentiable objective."
            )
    return [name for name in MEASURES if name in measures]
