"""The plan's figures are those of the committed measurements, and its arithmetic is checked by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks.report import ROOT
from benchmarks.scaling_plan import SOURCE, Task, UnitCosts, case_table, plan, time_table

ENTRY = {
    "num_rows": 10,
    "num_tokens": 5,
    "num_clusters": 2,
    "num_tokens_of_samples": 4,
    "num_iterations": 3,
    "states_per_iteration": 2,
    "num_states": 2,
    "num_steps": 4,
    "batch_size": 5,
    "num_queries": 2,
    "num_integration_steps": 5,
    "iterations_cpu_seconds": 96.0,
    "forward_rows_cpu_seconds": 400.0,
    "gradient_rows_cpu_seconds": 300.0,
    "costs": {
        "recording": {"cpu_seconds": 100.0},
        "distilling": {"cpu_seconds": 146.0},
        "scoring clusters": {"cpu_seconds": 240.0},
    },
}


def test_units_are_costs_over_tokens():
    units = UnitCosts.measured(ENTRY)
    assert units.training == 100 / (4 * 5 * 5)
    assert units.gradients == 50 / (50 * 2)
    assert units.matching == 96 / (6 * 8)
    assert units.following == 240 / (2 * 5 * 8)
    assert units.scoring_forward == 400 / (50 * 2 * 2)
    assert units.scoring == 300 / (50 * 2)


def test_hours_are_in_proportion_to_the_training():
    units = UnitCosts.measured(ENTRY)
    task = Task(num_states=3, training_hours=4.0)
    assert "| clusters' gradients | 1.5e+09 | 0.50 | 6.0 h |" in time_table(units, task)
    assert "| clusters' gradients | 1.5e+09 | 0.50 | 12.0 h |" in time_table(units, replace(task, training_hours=8.0))


def test_every_step_of_every_case_has_its_line():
    costs = {"cpu_seconds": 1.5, "peak_bytes": 2e9, "private_peak_bytes": 3e6}
    case = {"costs": {"recording": costs, "distilling": costs}, "process_peak_bytes": 5e9}
    lines = case_table({"many rows": case}).splitlines()
    assert lines[2:] == [
        "| many rows | recording | 2 s | 2.0 GB | 3.0 MB | 5.0 GB |",
        "|  | distilling | 2 s | 2.0 GB | 3.0 MB | 5.0 GB |",
    ]


@pytest.mark.skipif(not SOURCE.is_file(), reason="not measured yet")
def test_the_document_shows_what_the_script_prints():
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for name, table in plan().items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", document, re.DOTALL)
        assert found is not None and found[1].strip() == table.strip()
