from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hf_rgm.attribution.ensemble import average_results
from hf_rgm.attribution.result import AttributionResult


def result(seed, **changes):
    generator = np.random.default_rng(seed)
    made = AttributionResult(
        scores=generator.normal(size=(3, 2)),
        row_scores=generator.normal(size=(3, 5)),
        cluster_names=["a", "b"],
        cluster_sizes=np.array([3, 2]),
        cluster_ids=np.array([0, 0, 0, 1, 1]),
        query_ids=["x", "y", "z"],
        objective="margin",
        objective_values=generator.normal(size=3),
        engine="adjoint",
        metadata={"seed": seed},
    )
    return replace(made, **changes)


def test_everything_is_averaged():
    runs = [result(seed) for seed in range(3)]
    mean = average_results(runs)
    for name in ("scores", "row_scores", "objective_values"):
        expected = sum(getattr(run, name) for run in runs) / 3
        np.testing.assert_allclose(getattr(mean, name), expected, atol=1e-6)
    assert mean.metadata == {"num_runs": 3, "runs": [{"seed": 0}, {"seed": 1}, {"seed": 2}]}
    assert (mean.engine, mean.objective, mean.query_ids) == ("adjoint", "margin", ["x", "y", "z"])


def test_without_row_scores():
    mean = average_results([result(seed, row_scores=None) for seed in range(2)])
    assert mean.row_scores is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_ids": ["x", "y", "w"]}, "Results 0 and 1 differ in `query_ids`"),
        ({"cluster_names": ["a", "c"]}, "differ in `cluster_names`"),
        ({"objective": "loss"}, "differ in `objective`"),
        ({"engine": "replay"}, "differ in `engine`"),
        ({"cluster_ids": np.array([0, 1, 0, 1, 0])}, "differ in `cluster_ids`"),
        ({"row_scores": None}, "only one has row scores"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_does_not_belong_together_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        average_results([result(0), result(1, **changes)])


def test_nothing_to_average():
    with pytest.raises(ValueError, match="no results to average"):
        average_results([])
