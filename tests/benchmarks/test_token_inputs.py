from __future__ import annotations

import pytest

from benchmarks import token_inputs
from benchmarks.token_inputs import SEEDS, SETTINGS, TASKS, Recipe, measure, open_report, record, run, table, thinned

RECIPE = Recipe(seconds=0.02, num_known=40, num_rows=36, num_queries=2, num_epochs=2, hidden_size=8)


@pytest.fixture(scope="module", params=TASKS)
def recorded(request, tmp_path_factory):
    return record(request.param, RECIPE, tmp_path_factory.mktemp("run") / "trajectory")


def test_embeddings_are_frozen_and_both_kinds_possible(recorded):
    assert not recorded.model.get_input_embeddings().weight.requires_grad
    assert {setting.token_inputs for setting in SETTINGS} == {"inputs_embeds", "soft_tokens"}
    assert recorded.clusters.num_clusters == 6


def test_held_out_states_lie_between_the_matched_ones(recorded):
    thin, between = thinned(recorded.trajectory)
    assert thin.num_steps in thin.state_steps
    assert between and not set(between) & set(thin.state_steps)
    assert min(thin.state_steps) < min(between) and max(between) < thin.num_steps


def test_a_setting_is_distilled_within_its_budget_and_measured(recorded):
    found = measure(recorded, SETTINGS[0], 0, RECIPE)
    assert found["iterations"] >= 1
    assert 0 < found["held_out_error"] < float("inf")
    assert -1 <= found["agreement"] <= 1


def test_finished_settings_are_not_measured_again_and_seeds_are_averaged(tmp_path, monkeypatch):
    measured = []

    def fake(recorded, setting, seed, recipe):
        measured.append((setting.name, seed))
        return {"iterations": 10 * (seed + 1), "seconds": 1.0, "held_out_error": seed / 10, "agreement": 0.5}

    monkeypatch.setattr(token_inputs, "measure", fake)
    monkeypatch.setattr(token_inputs, "record", lambda *_: None)
    for _ in range(2):
        report = open_report(tmp_path / "token_inputs.json", RECIPE)
        run(TASKS[:1], SETTINGS[:1], RECIPE, report)
    assert measured == [(SETTINGS[0].name, seed) for seed in SEEDS]
    assert table(report.content["methods"]).splitlines()[-1] == (
        "| lora | inputs_embeds, 5 of 8 tokens, random | 20 | 0.100 (0.000 to 0.200) | 0.500 |"
    )
