from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.figures import figures
from benchmarks.recorded import Entrant, Prediction, Recorded
from benchmarks.report import Report
from benchmarks.run import Benchmark, run
from tests.benchmarks import tiny

MEASURES = ("leave_cluster_out", "lds_clusters", "lds_rows")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return Recorded(tiny.task(), tmp_path_factory.mktemp("recorded") / "trajectory", num_states=3)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are not looked at here."""
    monkeypatch.setattr("hf_rgm.agreement.correlations.NUM_RESAMPLES", 3)


@pytest.fixture
def benchmark(recorded):
    task = recorded.task
    truth, tuning = (tiny.additive_truth(task, queries) for queries in (task.queries, task.tuning_queries))
    return Benchmark(recorded, task.queries, truth, tuning)


@pytest.fixture
def report(benchmark, tmp_path):
    return Report(tmp_path / "tiny.json", benchmark.header(), ["first", "second"])


def entrant(name, *methods, **settings):
    return Entrant(name, "tests", {f"setting {index}": method for index, method in enumerate(methods)}, **settings)


def values(entry, block="figures"):
    return [round(entry[block][name]["value"], 6) for name in MEASURES if name in entry[block]]


class TestFigures:
    def test_masks_tell_what_is_kept_and_scores_what_presence_adds(self, benchmark):
        assert values(benchmark.score(entrant("exact", tiny.exact))) == [1.0, 1.0, 1.0]
        assert values(benchmark.score(entrant("opposite", tiny.opposite))) == [-1.0, -1.0, -1.0]

    def test_pearson_of_exact_scores_is_one(self, benchmark):
        entry = benchmark.score(entrant("exact", tiny.exact))
        assert entry["figures"]["leave_cluster_out_pearson"]["value"] == pytest.approx(1.0, abs=1e-9)

    def test_no_row_scores_no_row_figure(self, benchmark):
        entry = benchmark.score(entrant("clusters", lambda *given: Prediction(tiny.exact(*given).cluster_scores)))
        assert values(entry) == [1.0, 1.0]
        assert "lds_rows" not in entry["figures"]

    def test_values_of_subsets_come_before_sums_of_scores(self, benchmark):
        def direct(recorded, queries):
            subsets = tiny.additive_truth(recorded.task, queries).cluster_subsets[0]
            return Prediction(tiny.opposite(recorded, queries).cluster_scores, cluster_subset_values=subsets)

        assert values(benchmark.score(entrant("direct", direct))) == [-1.0, 1.0]

    def test_distances_are_from_the_first_seed(self, benchmark):
        def outputs_of_seed(seed):
            outputs = {part: logits[seed] for part, logits in benchmark.truth.outputs.items()}
            prediction = Prediction(benchmark.truth.leave_out[0], outputs=outputs)
            return figures(benchmark.task, benchmark.truth, prediction)["distances"]

        same = outputs_of_seed(0)
        assert {same[part]["logits_l2"]["value"] for part in ("leave_out", "halves")} == {0.0}
        assert outputs_of_seed(1) == benchmark.header()["noise_ceiling"]["distances"]

    def test_the_trained_model_as_it_is(self, benchmark, recorded):
        logits = recorded.model(recorded.task.queries["pixel_values"][:]).logits.detach().numpy()
        expected = np.linalg.norm(logits[None] - benchmark.truth.outputs["halves"][0], axis=-1).mean()
        found = benchmark.header()["unperturbed"]["distances"]["halves"]["logits_l2"]["value"]
        assert found == pytest.approx(expected, rel=1e-5)


class TestSettings:
    def test_the_best_on_the_tuning_queries_is_run_on_the_others(self, benchmark):
        def wrong_on_tuning(recorded, queries):
            return (tiny.opposite if len(queries) == tiny.NUM_TUNING else tiny.exact)(recorded, queries)

        def right_on_tuning(recorded, queries):
            return (tiny.exact if len(queries) == tiny.NUM_TUNING else tiny.opposite)(recorded, queries)

        entry = benchmark.score(entrant("grid", wrong_on_tuning, right_on_tuning))
        assert entry["tuning"]["chosen"] == "setting 1"
        assert [entry["tuning"]["settings"][f"setting {i}"]["mean"] for i in (0, 1)] == pytest.approx([-1.0, 1.0])
        assert values(entry) == [-1.0, -1.0, -1.0]

    def test_a_setting_that_fails_leaves_the_others(self, benchmark):
        entry = benchmark.score(entrant("grid", tiny.broken, tiny.exact))
        assert entry["tuning"]["settings"]["setting 0"] == {"error": "MemoryError: no room"}
        assert entry["tuning"]["chosen"] == "setting 1"

    def test_all_settings_fail(self, benchmark):
        entry = benchmark.score(entrant("grid", tiny.broken, tiny.broken))
        assert entry["error"] == "MemoryError: no room"
        assert "figures" not in entry

    def test_one_setting_is_not_tuned(self, benchmark):
        assert "tuning" not in benchmark.score(entrant("one", tiny.exact))

    def test_dear_queries(self, recorded, benchmark, monkeypatch):
        seen = []

        def counting(given, queries):
            seen.append(len(queries))
            return tiny.exact(given, queries)

        monkeypatch.setattr(recorded.task, "num_dear_queries", 4)
        entry = benchmark.score(entrant("dear", counting, counting, dear=True))
        assert seen == [tiny.NUM_TUNING, tiny.NUM_TUNING, 4]
        assert entry["num_queries"] == entry["first_queries"]["num_queries"] == 4
        assert benchmark.score(entrant("cheap", tiny.exact))["num_queries"] == tiny.NUM_QUERIES

    def test_all_are_compared_on_the_first_queries(self, benchmark, monkeypatch):
        def right_on_three(recorded, queries):
            sign = np.where(np.arange(len(queries)) < 3, 1, -1)[:, None]
            return Prediction(sign * tiny.exact(recorded, queries).cluster_scores)

        monkeypatch.setattr(benchmark, "num_first", 3)
        entry = benchmark.score(entrant("partly", right_on_three))
        assert values(entry["first_queries"]) == [1.0, 1.0]
        assert values(entry)[0] == pytest.approx((3 - 5) / 8)


class TestRun:
    def test_results_and_costs(self, benchmark, report, recorded):
        assert run(benchmark, [entrant("first", tiny.exact)], report, again=False) == []
        entry = json.loads(report.path.read_text())["methods"]["first"]
        assert entry["costs"]["offline_over_training"] == pytest.approx(2.0 / recorded.training_seconds)
        assert entry["costs"]["online_over_retraining"] == pytest.approx(1.0 / recorded.retraining_seconds)
        assert entry["costs"]["kept_bytes"] == 7
        assert entry["costs"]["model_over_retraining"] is None
        assert {"commit", "processor", "threads", "training_seconds"} <= set(entry["environment"])

    def test_goes_on_after_a_failure_and_tries_it_again(self, benchmark, report):
        entrants = [entrant("first", tiny.broken), entrant("second", tiny.exact)]
        assert run(benchmark, entrants, report, again=False) == ["first"]
        assert report.entry("first")["error"] == "MemoryError: no room"
        assert values(report.entry("second")) == [1.0, 1.0, 1.0]
        run(benchmark, [entrant("first", tiny.exact), entrant("second", tiny.broken)], report, again=False)
        assert [values(report.entry(name)) for name in ("first", "second")] == [[1.0, 1.0, 1.0]] * 2

    def test_named_methods_are_done_again_and_the_others_kept(self, benchmark, report):
        run(benchmark, [entrant("second", tiny.exact), entrant("first", tiny.exact)], report, again=False)
        kept = report.entry("first")
        later = Report(report.path, benchmark.header(), ["first", "second"])
        run(benchmark, [entrant("second", tiny.opposite)], later, again=True)
        content = json.loads(report.path.read_text())["methods"]
        assert content["first"] == json.loads(json.dumps(kept))
        assert values(content["second"]) == [-1.0, -1.0, -1.0]
        assert list(content) == ["first", "second"]


class TestReport:
    @pytest.mark.parametrize(
        ("block", "name", "changed"),
        [
            ("identity", "recorded_parameters", "0" * 64),
            ("identity", "truth", "1" * 64),
            ("versions", "torch", "1.0"),
            ("versions", "dattri", "0.0"),
        ],
    )
    def test_refuses_to_mix(self, benchmark, report, block, name, changed):
        header = benchmark.header()
        header["versions"]["dattri"] = "0.3"
        report = Report(report.path, header, [])
        run(benchmark, [entrant("first", tiny.exact)], report, again=False)
        other = header | {block: header[block] | {name: changed}}
        with pytest.raises(ValueError, match=f"{name} was .* and is '{changed}'.*--anew"):
            Report(report.path, other, [])
        assert Report(report.path, other, [], anew=True).entry("first") is None

    def test_a_peer_may_be_installed_later(self, benchmark, report):
        run(benchmark, [entrant("first", tiny.exact)], report, again=False)
        content = json.loads(report.path.read_text())
        content["versions"].pop("dattri", None)
        report.path.write_text(json.dumps(content))
        header = benchmark.header()
        header["versions"]["dattri"] = "0.3"
        later = Report(report.path, header, [])
        assert later.entry("first") is not None
        assert later.content["versions"]["dattri"] == "0.3"

    def test_refuses_another_format(self, report):
        report.path.write_text('{"task": "tiny"}')
        with pytest.raises(ValueError, match="format version None, not 2"):
            Report(report.path, {"identity": {}, "versions": {}}, [])
