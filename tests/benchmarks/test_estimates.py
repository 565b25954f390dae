from __future__ import annotations

import json
import time

import pytest

from benchmarks import estimates
from benchmarks.costs import Meter
from benchmarks.estimates import CASES, MODELS, Case, compared, measure, open_report, run, table
from hf_rgm import DistillationConfig
from hf_rgm.model.cost_estimates import CostEstimate

TINY = Case("digits CNN", num_rows=20, num_clusters=2, num_queries=2, num_steps=4, config={"num_iterations": 2})
ENTRY = {
    "num_parameters": 7,
    "distilling": {
        "told": {"seconds": 2.0, "memory_bytes": 3e6, "disk_bytes": 1e6},
        "measured": {"seconds": 4.0, "memory_bytes": 2e6, "disk_bytes": 1e6},
    },
}
ENTRY["attributing"] = ENTRY["distilling"]


def test_every_model_is_a_case_whose_settings_are_the_distillers():
    assert {case.model for case in CASES.values()} == set(MODELS)
    assert all(DistillationConfig(**case.config).num_iterations == 30 for case in CASES.values())


@pytest.mark.parametrize(
    "attribute", [{"engine": "replay", "objective": "loss"}, {"engine": "adjoint", "rows": True, "rewind": 0.5}]
)
def test_a_case_is_estimated_and_measured(attribute):
    found = measure(Case(**{**vars(TINY), "attribute": attribute}))
    assert found["num_parameters"] == 6_090
    for stage in ("distilling", "attributing"):
        told, measured = found[stage]["told"], found[stage]["measured"]
        assert told["num_blocks"] == 1 and not told["sketched"]
        assert told["seconds"] > 0 and measured["seconds"] > 0
        assert told["memory_bytes"] > 6_090 * 4
        assert measured["disk_bytes"] / 2 < told["disk_bytes"] < 2 * measured["disk_bytes"]


def test_what_was_told_stands_beside_what_was_measured():
    meter = Meter()
    meter.cpu_seconds, meter.peak_bytes = 3.0, 40
    found = compared(CostEstimate(1.5, 20, 10, 2, True), meter, 5)
    assert found == {
        "told": {"seconds": 1.5, "memory_bytes": 20, "disk_bytes": 10, "num_blocks": 2, "sketched": True},
        "measured": {"seconds": 3.0, "memory_bytes": 40, "disk_bytes": 5},
    }


def test_estimates_run_on_cpu_time(monkeypatch):
    monkeypatch.setattr("time.process_time", lambda: 7.0)
    with estimates.cpu_clock():
        assert time.perf_counter() == 7.0
    assert time.perf_counter() != 7.0


def test_the_table_has_a_line_a_stage():
    lines = table({"tiny": ENTRY}).splitlines()
    assert lines[2:] == [
        f"| tiny | {stage} | 2 / 4 = 0.50 | 3 / 2 = 1.50 | 1 / 1 = 1.00 |" for stage in ("distilling", "attributing")
    ]


def test_finished_cases_are_not_measured_again(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(estimates, "measure_apart", lambda name: measured.append(name) or dict(ENTRY))
    path = tmp_path / "estimates.json"
    for _ in range(2):
        run(["BERT", "GPT-2"], open_report(path, CASES))
    assert measured == ["BERT", "GPT-2"]
    assert list(json.loads(path.read_text())["methods"]) == measured


def test_a_process_of_its_own_writes_its_case(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "measure", lambda case: {"rows": case.num_rows})
    output = tmp_path / "case.json"
    estimates.main(estimates.argparse.Namespace(cases=["digits CNN"], within=output))
    assert json.loads(output.read_text()) == {"rows": 1200}
