from __future__ import annotations

from benchmarks.rewinds import REWINDS, table
from benchmarks.tables import fill


def entry(value, drift):
    figure = {"value": value, "low": None, "high": None, "num_nan": 0}
    return {
        "leave_cluster_out": figure,
        "lds_clusters": figure,
        "drift_leave_cluster_out": drift,
        "drift_halves": 2 * drift,
    }


def test_a_column_for_each_task_and_engine_a_line_for_each_rewind():
    digits = {f"linearized_replay, {rewind}": entry(rewind, 0.1) for rewind in REWINDS}
    digits |= {f"replay, {rewind}": {"error": "it diverged"} for rewind in REWINDS}
    lines = table({"digits": {"rewinds": digits}}).splitlines()
    assert lines[0] == "| from | digits, linearised | digits, anchored |"
    assert lines[2] == "| 14% | 0.140 (0.10), 0.140 (0.20) | diverged |"
    assert len(lines) == 2 + len(REWINDS)


def test_a_table_goes_between_its_markers_and_nowhere_else():
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
    assert fill(text, "one", "new") == text.replace("old", "new")
    assert fill(text, "three", "new") == text
