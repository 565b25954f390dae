from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets

from benchmarks import truth as ground_truth
from benchmarks.methods import METHODS
from benchmarks.methods.baselines import gradient_cosine
from benchmarks.recorded import Entrant, Recorded
from benchmarks.uses import __main__ as script
from benchmarks.uses import brittleness, mislabels, mixture
from hf_rgm import ClusterMap
from hf_rgm.engines.objectives import Queries
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.results.mixture import MixtureSuggestion
from hf_rgm.testing import tiny_trainer
from tests.benchmarks import tiny

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.5, 3.0, 0.0]])
LABELS = torch.tensor([0, 0])


@pytest.fixture
def task(monkeypatch, tmp_path):
    monkeypatch.setattr(ground_truth, "CACHE", tmp_path)
    return tiny.task(build_trainer=partial(tiny_trainer, max_steps=20, learning_rate=3e-2))


@pytest.fixture
def recorded(task, tmp_path):
    return Recorded(task, tmp_path / "trajectory", num_states=4)


def evaluate(objective):
    return objective.function(lambda inputs: LOGITS, Queries({}, LABELS)).reshape(2, 2)


class TestBrittleness:
    def test_gaps_are_negative_where_another_class_wins(self):
        gaps, losses = evaluate(brittleness.GAPS_AND_LOSSES)
        torch.testing.assert_close(gaps, torch.tensor([1.0, -2.5]))
        torch.testing.assert_close(losses, -LOGITS.log_softmax(-1)[:, 0])

    def test_the_top_rows_are_removed_and_the_model_retrained(self, task, recorded, monkeypatch):
        monkeypatch.setitem(METHODS, "exact", Entrant("exact", "tests", {"": tiny.exact}))
        monkeypatch.setattr(brittleness, "NUM_QUERIES", 3)
        monkeypatch.setattr(brittleness, "REMOVED_SHARES", (2 / tiny.NUM_ROWS,))
        monkeypatch.setattr(brittleness, "NUM_RANDOM", 2)
        found = brittleness.run(recorded, ["exact"])["removals"]
        assert set(found["methods"]) == {"exact", brittleness.RANDOM, brittleness.RANDOM_OF_LABEL}
        (entry,) = found["methods"]["exact"]
        assert entry["removed"] == 2
        scores = tiny.effects(task.queries)
        rises = []
        for query in found["queries"]:
            kept = np.argsort(scores[query])[:-2]
            losses = retrain(
                task.build_trainer,
                task.train,
                [range(tiny.NUM_ROWS), kept],
                task.queries,
                seeds=(found["seed"],),
                objective="loss",
                disable_tqdm=True,
            )[:, 0, query]
            rises.append(losses[1] - losses[0])
        assert len(rises) == 3
        assert entry["loss_rise"]["mean"] == pytest.approx(np.mean(rises), abs=1e-5)

    def test_the_loss_difference_is_of_the_rows_that_lower_the_mean_loss_most(self, task, recorded, monkeypatch):
        monkeypatch.setattr(brittleness, "REMOVED_SHARE", 2 / tiny.NUM_ROWS)
        monkeypatch.setattr(brittleness, "NUM_RANDOM", 2)
        _, losses = brittleness.evaluate(recorded, task.queries)
        scores = tiny.effects(task.queries)
        expected = np.argsort(-(1 - np.exp(-losses)) @ scores)[:2]
        removed = []
        build = brittleness.single_run_trainer

        def spying(the_task):
            def trainer(kept, seed):
                removed.append(sorted(set(range(tiny.NUM_ROWS)) - set(np.asarray(kept["row"][:]).tolist())))
                return build(the_task)(kept, seed)

            return trainer

        monkeypatch.setattr(brittleness, "single_run_trainer", spying)
        found = brittleness.loss_difference(recorded, {"exact": scores})
        assert removed[:2] == [[], sorted(expected.tolist())]
        assert found["loss"] == pytest.approx(losses.mean(), abs=1e-5)
        assert len(found["random_rises"]) == 2


class TestMixture:
    def test_margins_then_losses(self):
        margins, losses = evaluate(mixture.MARGINS_AND_LOSSES)
        p = LOGITS.softmax(-1)[:, 0]
        torch.testing.assert_close(margins, torch.log(p / (1 - p)))
        torch.testing.assert_close(losses, -p.log())

    def test_pictures_move_right_and_repeat_the_edge(self):
        queries = tiny.task().queries
        before, after = (np.asarray(part[:]["pixel_values"]) for part in (queries, mixture.shifted(queries)))
        np.testing.assert_array_equal(after[..., 1:], before[..., :-1])
        np.testing.assert_array_equal(after[..., 0], before[..., 0])

    def test_mixtures_are_asked_for_on_tuning_queries_and_verified_on_others(self):
        task = tiny.task()
        queries = mixture.all_queries(task)
        plain = concatenate_datasets([task.queries, task.tuning_queries])
        assert len(queries) == 2 * len(plain)
        labels = np.asarray(task.tuning_queries["labels"][:])
        weak, everything, moved = mixture.cases(task, np.array([5.0, 0.0, 1.0])[labels])
        assert weak.labels == (1, 2)
        for case, part, count in ((weak, task.tuning_queries, 3), (everything, task.tuning_queries, 5)):
            assert len(case.asked) == count
            asked = [row for row in part if case is everything or row["labels"] in case.labels]
            for position, row in zip(case.asked, asked, strict=True):
                assert torch.equal(queries[int(position)]["pixel_values"], row["pixel_values"])
        shifted = mixture.shifted(task.tuning_queries)
        for position, row in zip(moved.asked, shifted, strict=True):
            assert torch.equal(queries[int(position)]["pixel_values"], row["pixel_values"])
        assert not set(moved.asked) & set(moved.held_out) and len(moved.held_out) == len(task.queries)

    def test_controls_keep_the_bounds_and_the_total(self):
        task = tiny.task()
        weights = np.array([1.5, 0.5, 1.2, 0.8, 1.0, 1.0])
        suggestion = MixtureSuggestion(weights, task.clusters, weights - 1, "margin", 0.0, True, 1.5, 0.1)
        case = mixture.Case("classes", "margin", np.arange(1), np.arange(1), labels=(1,))
        controls = mixture.controls(task, case, suggestion)
        assert set(controls) == {"shuffled", "those classes"}
        for applied in controls.values():
            assert applied.replayed_change is None
            assert (applied.weights >= 1 / 1.5).all() and (applied.weights <= 1.5).all()
        of_class = np.asarray(task.train["labels"][:])[:6] == 1
        assert (
            controls["those classes"].weights[of_class].min() > 1 > controls["those classes"].weights[~of_class].max()
        )

    def test_each_case_is_retrained_on_its_mixture(self, task, recorded, monkeypatch):
        monkeypatch.setattr(mixture, "SEEDS", (1, 2))
        found = mixture.run(recorded, [])
        entry = found["all queries"]
        queries = mixture.all_queries(task)
        suggestion = MixtureSuggestion(
            np.array(entry["weights"]), task.clusters, np.zeros(6), "mean_loss", 0.0, False, 2.0
        )
        asked = len(task.queries) + np.arange(tiny.NUM_TUNING)
        changes = []
        for seed in (1, 2):
            losses = retrain(
                task.build_trainer,
                task.train,
                [range(tiny.NUM_ROWS), suggestion.resample(seed)],
                queries,
                seeds=(seed,),
                objective="loss",
                disable_tqdm=True,
            )[:, 0, asked].mean(1)
            changes.append(losses[1] - losses[0])
        assert entry["retrained_changes"]["suggested, asked"]["mean"] == pytest.approx(np.mean(changes), abs=1e-5)


class TestMislabels:
    def test_a_share_of_the_labels_changes_to_another_class(self, monkeypatch):
        monkeypatch.setattr(mislabels, "FLIPPED_SHARE", 0.25)
        task = tiny.task(train=tiny.tiny_dataset(60, seed=0))
        noisy, flipped = mislabels.flipped_task(task, seed=3)
        before, after = (np.asarray(one.train["labels"][:]) for one in (task, noisy))
        assert flipped.sum() == 15
        np.testing.assert_array_equal(before != after, flipped)
        assert set(after) == {0, 1, 2}
        np.testing.assert_array_equal(noisy.train[:]["pixel_values"], task.train[:]["pixel_values"])
        for rows in (noisy.clusters.rows(k) for k in range(noisy.clusters.num_clusters)):
            assert len(set(after[rows])) == 1
        assert noisy.build_trainer(noisy.train, 1, callbacks=[]).args.seed == 4
        assert (mislabels.flipped_task(task, seed=4)[1] != flipped).any()

    def test_the_area_of_known_orders(self):
        flipped = np.arange(20) >= 18
        best = mislabels.inspection(np.arange(20.0), flipped)
        assert best == {"area": 0.95, "found at 5%": 0.5, "found at 10%": 1.0, "found at 20%": 1.0}
        assert mislabels.inspection(-np.arange(20.0), flipped)["area"] == pytest.approx(0.05)
        one_late = np.where(np.arange(20) == 18, -1.0, np.arange(20.0))
        assert mislabels.inspection(one_late, flipped)["area"] == pytest.approx(0.5)

    def test_only_harm_counts(self):
        scores = np.array([[1.0, -2.0, 0.5], [-1.0, -1.0, 3.0]])
        np.testing.assert_array_equal(mislabels.harm(scores), [0.5, 1.5, 0.0])
        np.testing.assert_array_equal(mislabels.self_scores(scores[:, :2]), [1.0, -1.0])
        with pytest.raises(ValueError, match="no row scores"):
            mislabels.harm(None)

    def test_flipped_labels_are_found(self, monkeypatch):
        """Well-separated classes and few flips: rankings by margins and by harm must find nearly all."""
        monkeypatch.setitem(METHODS, "cosine", Entrant("cosine", "tests", {"": gradient_cosine}))
        monkeypatch.setattr(mislabels, "SEEDS", (1, 2))
        task = tiny.task(
            train=tiny.tiny_dataset(60, seed=0),
            tuning_queries=tiny.tiny_dataset(12, seed=2),
            clusters=ClusterMap.from_ids(np.arange(60) % 6),
            build_trainer=partial(tiny_trainer, max_steps=40, learning_rate=3e-2),
        )
        given = SimpleNamespace(task=task)
        found = mislabels.run(given, ["cosine"])
        assert found["best_area"] == 0.95
        areas = {name: ranking["area"]["mean"] for name, ranking in found["rankings"].items()}
        assert len(areas) == 8
        for name in ("training loss", "hf_rgm, margin without the row", "hf_rgm, harm to held-out queries"):
            assert areas[name] > 0.85
        assert len(found["rankings"]["training loss"]["area"]["values"]) == 2


class TestScript:
    def test_a_use_is_written_as_soon_as_it_is_done_and_others_are_kept(self, task, monkeypatch, tmp_path):
        def broken(recorded, method_names):
            raise MemoryError("no room")

        monkeypatch.setattr(ground_truth, "load_task", lambda name: task)
        monkeypatch.setattr(script, "RESULTS", tmp_path)
        calls = []
        uses = {
            "first": lambda recorded, names: calls.append((recorded.task, names)) or {"found": len(calls)},
            "broken": broken,
        }
        monkeypatch.setattr(script, "USES", uses)
        with pytest.raises(MemoryError):
            script.main("tiny", ["first", "broken"], ["adjoint"])
        assert calls == [(task, ["adjoint"])]
        monkeypatch.setitem(uses, "second", uses["first"])
        script.main("tiny", ["second"], [])
        found = json.loads((tmp_path / "uses-tiny.json").read_text())
        assert [found["first"]["figures"], found["second"]["figures"]] == [{"found": 1}, {"found": 2}]
        assert (found["task"], found["format_version"], "broken" in found) == ("tiny", 1, False)
        assert {"seconds", "environment", "versions"} < set(found["second"])
