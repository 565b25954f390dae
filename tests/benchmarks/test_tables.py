from __future__ import annotations

import copy
import json

import pytest

from benchmarks.tables import figure, insert, page, read, size


def estimate(value, num_nan=0):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "num_nan": num_nan}


def entry(value, *, family="ours", num_queries=200, **extra):
    figures = {name: estimate(value) for name in ("leave_cluster_out", "leave_cluster_out_pearson", "lds_clusters")}
    return {
        "family": family,
        "num_queries": num_queries,
        "figures": figures,
        "first_queries": {"num_queries": 30, "figures": figures},
        "costs": {
            "offline_over_training": 12.34,
            "online_over_retraining": 0.0567,
            "model_over_retraining": None,
            "kept_bytes": 1_234_567,
            "peak_bytes": 89_000,
        },
        "details": {},
        "environment": {
            "commit": "a" * 40,
            "uncommitted_changes": False,
            "processor": "Abacus",
            "cores": 2,
            "threads": 1,
        },
        **extra,
    }


@pytest.fixture
def report():
    distances = {
        part: {name: estimate(0.5) for name in ("softmax_l2", "cross_entropy", "logits_l2")}
        for part in ("leave_out", "halves")
    }
    replay = entry(0.6)
    replay["figures"] = replay["figures"] | {"distances": distances}
    tuned = {
        "num_queries": 10,
        "chosen": "b",
        "settings": {"a": {"error": "ValueError: no"}, "b": {"mean": 0.25, "leave_cluster_out": estimate(0.2)}},
    }
    failed = {"family": "peers", "error": "ImportError: none here", "environment": entry(0)["environment"]}
    ceiling = {name: estimate(0.9) for name in ("leave_cluster_out", "lds_clusters", "lds_rows")}
    return {
        "format_version": 2,
        "identity": {"task": "digits", "queries": "reported", "num_queries": 200},
        "versions": {"python": "3.11"},
        "seeds": {"recorded": 0, "truth": [1, 2]},
        "num_states": 8,
        "noise_ceiling": ceiling | {"distances": distances},
        "unperturbed": {"distances": distances},
        "first_queries": {"num_queries": 30, "noise_ceiling": ceiling},
        "methods": {
            "replay": replay,
            "dear peer": entry(0.3, family="peers", num_queries=30, tuning=tuned),
            "absent peer": failed,
            "variant": entry(0.1, family="ablations"),
        },
    }


def test_figure():
    assert figure({"x": estimate(0.5)}, "x") == "0.500 [0.400, 0.600]"
    assert figure({"x": estimate(0.5, num_nan=3)}, "x") == "0.500 [0.400, 0.600] (3 undefined)"
    assert figure({"x": {"value": 0.5, "low": None, "high": None, "num_nan": 0}}, "x") == "0.500"
    assert figure({}, "x") == ""


def test_size():
    assert [size(None), size(89_000), size(1_234_567)] == ["", "89 kB", "1.2 MB"]


def test_readme_table(report):
    text = "before\n<!-- digits:begin -->\nold\n<!-- digits:end -->\nafter <!-- fashion:begin -->x<!-- fashion:end -->"
    table = """\
| digits, 200 queries | leave-cluster-out | LDS clusters | LDS rows | offline / training | online / retraining |
|---|---|---|---|---|---|
| *noise ceiling* | 0.900 [0.800, 1.000] | 0.900 [0.800, 1.000] | 0.900 [0.800, 1.000] |  |  |
| replay | 0.600 [0.500, 0.700] | 0.600 [0.500, 0.700] |  | 12 | 0.057 |
| dear peer (30 queries) | 0.300 [0.200, 0.400] | 0.300 [0.200, 0.400] |  | 12 | 0.057 |"""
    expected = text.replace("old", table)
    assert insert(text, report) == expected
    assert insert(expected, report) == expected


def test_page_holds_everything(report):
    text = page([report])
    assert "| *another seed's retraining* | 0.500" in text
    assert "| *the trained model as it is* | 0.500" in text
    assert "| dear peer | **b** | 10 | 0.250 | 0.200 [0.100, 0.300] |  |  |" in text
    assert "| dear peer | a | 10 | ValueError: no |" in text
    assert "- absent peer: ImportError: none here" in text
    assert "| variant | 12 | 0.057 | 200 |  | 1.2 MB | 89 kB |" in text
    assert "All methods: commit aaaaaaaaaaaa, Abacus, 1 of 2 cores." in text


def test_page_leaves_out_what_is_not_there(report):
    report["methods"] = {"variant": entry(0.1)}
    text = page([report])
    assert "### Settings" not in text
    assert "### First queries" not in text
    assert "### Failed" not in text


def test_page_depends_on_nothing_else(report):
    assert page([report]) == page([json.loads(json.dumps(copy.deepcopy(report)))])


def test_single_run(report):
    figures = {"leave_cluster_out": estimate(0.7), "lds_halves": estimate(0.8)}
    found = {"identity": report["identity"], "methods": {"replay": {"num_queries": 30, "figures": figures}}}
    expected = "| replay (30 queries) | 0.700 [0.600, 0.800] |  | 0.800 [0.700, 0.900] |"
    assert expected in page([report | {"single_run": found}])
    assert expected not in page([report])


def test_read(report, tmp_path):
    tuning = {"identity": {"queries": "tuning"}}
    for name, content in {"b": report, "a": report | {"seeds": {}}, "a-tuning": tuning, "single-run-b": {}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    first, second = read(tmp_path)
    assert (first["seeds"], second["seeds"]) == ({}, report["seeds"])
    assert "single_run" not in first
    assert second["single_run"] == {}
    (tmp_path / "old.json").write_text('{"queries": "reported"}')
    with pytest.raises(ValueError, match="format version None, not 2.*--task old --anew"):
        read(tmp_path)
