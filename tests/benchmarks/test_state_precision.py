from __future__ import annotations

import json

import pytest

from benchmarks import state_precision
from benchmarks import truth as ground_truth
from benchmarks.recorded import Recorded
from hf_rgm import DistillationConfig
from tests.benchmarks import tiny


def test_every_precision_is_scored_and_weighed(tmp_path, monkeypatch):
    task = tiny.task()
    monkeypatch.setattr(ground_truth, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(state_precision, "DistillationConfig", lambda: DistillationConfig(num_iterations=20))
    recorded = Recorded(task, tmp_path / "trajectory", num_states=4)
    results = state_precision.measure(recorded, tiny.additive_truth(task, task.queries))
    json.dumps(results)
    assert list(results) == ["float32", "bfloat16", "int8"]
    for part in results.values():
        assert set(part["methods"]) == set(state_precision.METHODS)
        assert part["states_bytes"] < part["kept_bytes"]
    exact, rounded = (results[name]["methods"]["adjoint"] for name in ("float32", "int8"))
    assert exact["correlation_with_float32"] == pytest.approx(1.0, abs=1e-12)
    assert 0.95 < rounded["correlation_with_float32"] < 1.0
    assert "lds_rows" in rounded
