from __future__ import annotations

import json

from benchmarks import stopping
from benchmarks import truth as ground_truth
from tests.benchmarks import tiny

SETTINGS = {"few": {"num_iterations": 3, "tolerance": 0.0}, "until done": {"num_iterations": 70, "tolerance": 0.9}}


def test_iterations_costs_and_agreement_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(ground_truth, "CACHE", tmp_path / "cache")
    results = stopping.measure(tiny.task(), tmp_path, SETTINGS, cost_only=False)
    json.dumps(results)
    assert [entry["iterations"] for entry in results.values()] == [3, 30]
    assert results["until done"]["matching_error"] < results["few"]["matching_error"]
    assert all(-1 <= entry["lds_clusters"]["value"] <= 1 for entry in results.values())
    assert all(entry["cpu_seconds"] > 0 and entry["training_cpu_seconds"] > 0 for entry in results.values())


def test_agreement_is_left_out_where_there_are_no_retrainings():
    entry = {
        "iterations": 30,
        "cpu_seconds": 3.0,
        "training_cpu_seconds": 2.0,
        "matching_error": 0.0123,
        "worst_cluster_error": 0.5,
    }
    figure = {name: {"value": 0.75} for name in ("leave_cluster_out", "lds_clusters")}
    lines = stopping.table({"digits, few": entry | figure, "fashion, few": entry}).splitlines()
    assert lines[2:] == [
        "| digits, few | 30 | 1.5 | 0.012 | 0.500 | 0.750 | 0.750 |",
        "| fashion, few | 30 | 1.5 | 0.012 | 0.500 |  |  |",
    ]
