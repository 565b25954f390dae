from __future__ import annotations

import copy
import json

import pytest

from benchmarks.formats import figure, signless, size
from benchmarks.growth_plots import BYTES, TIMES, TRAINING
from benchmarks.report import RESULTS
from benchmarks.tables import README, page, read, read_engines, readme_table


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
    ours, earlier = copy.deepcopy(report), copy.deepcopy(report)
    ours["methods"] = {"without a synset": entry(0.6), "a variant": entry(0.5)}
    earlier["methods"] = {"without a synset": entry(0.1), "TRAK, 5 models": entry(0.3, family="peers")}
    assert (
        readme_table([ours], [earlier])
        == """\
|  | digits |
|---|---|
| *noise ceiling* | 0.90 / 0.90 / 0.90 |
| **hf_rgm**, with the rows | 0.60 / 0.60 / – for 12 |
| **hf_rgm**, a synset alone |  |
| EK-FAC (kronfluence) |  |
| influence, CG (dattri) |  |
| TRAK, 5 models | 0.30 / 0.30 / – for 12† |
| gradient cosine |  |"""
    )


def test_the_readme_has_the_table_of_the_results():
    table = readme_table(read_engines(RESULTS / "engines"), read(RESULTS))
    assert f"<!-- engines:begin -->\n{table}\n<!-- engines:end -->" in README.read_text(encoding="utf-8")


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


def test_uses(report):
    mean = {"mean": 0.25, "standard_error": 0.125}
    area = {"mean": 0.9, "sd": 0.05, "values": [0.85, 0.95]}
    removal = {"removed": 3, "flipped": {"mean": 0.5}, "gap_fall": mean, "loss_rise": mean}
    figures = {
        "mislabels": {
            "flipped_share": 0.1,
            "seeds": [1, 2],
            "best_area": 0.95,
            "rankings": {"training loss": {"area": area, "found at 5%": area}},
        },
        "brittleness": {
            "removals": {"queries": [4, 7], "methods": {"adjoint": [removal]}},
            "loss_difference": {"removed": 12, "loss": 0.5, "rise": {"adjoint": 0.3}, "random_rises": [0.1, 0.3]},
        },
        "mixture": {
            "two classes, weak": {
                "objective": "mean_loss",
                "predicted_change": -0.5,
                "retrained_changes": {
                    f"{name}, {where}": mean for name in ("suggested", "shuffled") for where in ("asked", "held_out")
                },
            }
        },
    }
    uses = {use: {"figures": values} for use, values in figures.items()}
    text = page([report | {"uses": uses}])
    assert "| training loss | 0.900 ± 0.050 | 0.900 ± 0.050 |" in text
    assert "| adjoint | 3 | 50% | 0.250 ± 0.125 | 0.250 ± 0.125 |" in text
    assert "| adjoint | 0.3000 |\n| random rows | 0.2000 ± 0.1000 |" in text
    assert "| two classes, weak, mean loss | suggested | -0.500 | +0.250 ± 0.125 | +0.250 ± 0.125 |" in text
    assert "| two classes, weak, mean loss | shuffled |  | +0.250 ± 0.125 | +0.250 ± 0.125 |" in text
    only = page([report | {"uses": {"format_version": 1, "task": "digits", "mixture": uses["mixture"]}}])
    assert "suggested" in only and "training loss" not in only
    assert "### Uses" not in page([report])


def test_tasks_that_compare_no_outputs_have_no_table_of_them(report):
    assert "| outputs |" in page([report])
    for values in (report["noise_ceiling"], report["unperturbed"], report["methods"]["replay"]["figures"]):
        values["distances"] = {}
    assert "| outputs |" not in page([report])


def test_a_rounding_error_about_zero_has_no_sign():
    assert [signless(value) for value in (-1e-9, 0.0, -0.004, -0.006, 1.5)] == [
        "0.00",
        "0.00",
        "0.00",
        "-0.01",
        "1.50",
    ]


def test_growth_stands_at_the_end(report):
    costs = dict.fromkeys(TRAINING | TIMES | BYTES, 2e6)
    growth = {
        "identity": {"task": "growth", "num_steps": 7, "num_queries": 9},
        "axes": {"rows": ["a", "b"]},
        "methods": {name: {"num_rows": count, "costs": costs} for name, count in (("a", 10), ("b", 20))},
    }
    text = page([report], growth)
    assert text.startswith(page([report]))
    assert "one training of 7 steps" in text and "![" in text
    assert "| 10 to 20 training rows | kept: the synset | 2.0 MB | 2.0 MB | 0.00 | 0.00 |" in text
    assert page([report], growth | {"methods": {}}) == page([report])


def test_read(report, tmp_path):
    tuning = {"identity": {"queries": "tuning"}}
    for name, content in {
        "b": report,
        "a": report | {"seeds": {}},
        "a-tuning": tuning,
        "single-run-b": {},
        "uses-a": {},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    first, second = read(tmp_path)
    assert (first["seeds"], second["seeds"]) == ({}, report["seeds"])
    assert "single_run" not in first and "uses" not in second
    assert first["uses"] == {}
    assert second["single_run"] == {}
    (tmp_path / "old.json").write_text('{"queries": "reported"}')
    with pytest.raises(ValueError, match="format version None, not 2.*--task old --anew"):
        read(tmp_path)


def test_vendors_that_mislabel_come_first():
    ranking = {"named": "vendor 3", "lead": 4.0, "auc": 0.875, "auc_named_vendor_first": 0.995}
    figures = {
        "culprit": "vendor 3",
        "rankings": {"hf_rgm": ranking, "training loss": ranking | {"named": "vendor 1", "auc": 0.5}},
        "sizes": {"agreement": [0.45, 0.2, 0.7], "slope": [0.8, 0.5, 1.1], "slope, calibrated": [1.05, 0.6, 1.5]},
        "accuracy": {
            "recorded": 0.8,
            "retrained": 0.81,
            "without the culprit, predicted": 0.85,
            "without the culprit, retrained": 0.9,
        },
        "cost": {
            "vendors and rows / training": 2.17,
            "model without the culprit / training": 0.447,
            "peak_bytes": 3.5e9,
            "trajectory_bytes": 6.7e6,
        },
    }
    text = page([], None, {"vendors_lora": figures})
    assert "| vendors_lora | training loss | vendor 1 | 0.500 | 0.995 |" in text
    assert "| vendors_lora | 2.2 | 0.45 | 3.5 GB | 7 MB | 80.0% | 81.0% | 85.0% | 90.0% | 0.45 | 0.80 | 1.05 |" in text
    assert "mislabels" not in page([])
