from __future__ import annotations

import pytest

from hf_rgm.agreement.budget import plan_retrainings


def plan(budget, *, num_clusters=50, num_rows=10**7, row_scores=True, **settings):
    return plan_retrainings(budget, num_clusters=num_clusters, num_rows=num_rows, row_scores=row_scores, **settings)


@pytest.mark.parametrize(
    ("budget", "settings", "num_points", "seeds"),
    [
        (5, {}, {"lds_clusters": 5}, (1,)),
        (23, {}, {"lds_clusters": 23}, (1,)),
        (24, {}, {"lds_clusters": 12}, (1, 2)),
        (48, {}, {"lds_clusters": 12, "leave_cluster_out": 12}, (1, 2)),
        (72, {}, {"lds_clusters": 12, "leave_cluster_out": 12, "lds_rows": 12}, (1, 2)),
        (72, {"row_scores": False}, {"lds_clusters": 18, "leave_cluster_out": 18}, (1, 2)),
        (300, {}, {"lds_clusters": 50, "leave_cluster_out": 50, "lds_rows": 50}, (1, 2)),
        (400, {}, {"lds_clusters": 75, "leave_cluster_out": 50, "lds_rows": 75}, (1, 2)),
        (36, {"num_clusters": 6}, {"lds_clusters": 12, "leave_cluster_out": 6}, (1, 2)),
        (100, {"num_clusters": 4, "row_scores": False}, {"lds_clusters": 6}, (1, 2)),
        (24, {"num_clusters": 3}, {"lds_rows": 12}, (1, 2)),
        (24, {"measures": ["lds_rows", "lds_clusters"]}, {"lds_clusters": 12, "lds_rows": 12}, (1,)),
        (24, {"seeds": (5, 6, 7)}, {"lds_clusters": 8}, (5, 6, 7)),
        (24, {"recorded_seeds": {1}}, {"lds_clusters": 12}, (2, 3)),
        (24, {"recorded_seeds": {0, 1, 2, None}}, {"lds_clusters": 12}, (3, 4)),
    ],
)
def test_where_the_retrainings_go(budget, settings, num_points, seeds):
    assert plan(budget, **settings) == (num_points, seeds)
    assert sum(num_points.values()) * len(seeds) <= budget


@pytest.mark.parametrize(
    ("budget", "settings", "message"),
    [
        (4, {}, "`budget` = 4 is too small.*together 5"),
        (0, {}, "`budget` = 0 is too small"),
        (9, {"seeds": (1, 2)}, r"\(lds_clusters\) and seed \(1, 2\), together 10"),
        (9, {"measures": ["lds_clusters", "lds_rows"]}, "together 10"),
        (24, {"seeds": (1, 1)}, "none twice"),
        (24, {"seeds": ()}, "at least one seed"),
        (24, {"measures": []}, "`measures` must be a list"),
        (24, {"measures": "lds_rows"}, "`measures` must be a list"),
        (24, {"measures": ["lds"]}, r"got \['lds'\]"),
        (24, {"measures": ["lds_rows"], "row_scores": False}, "rows are not scored"),
        (24, {"measures": ["lds_clusters"], "num_clusters": 3}, "'lds_clusters' needs at least 5.*allow 3"),
        (24, {"num_clusters": 3, "row_scores": False}, "3 clusters and no row scores"),
    ],
)
def test_what_cannot_give_an_interval_is_refused(budget, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(budget, **settings)
