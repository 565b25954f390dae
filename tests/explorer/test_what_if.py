import dataclasses

import numpy as np
import pytest
import torch

from hf_rgm import Objective
from hf_rgm.engines.objectives import OBJECTIVES
from hf_rgm.explorer.app import ALL_QUERIES, Explorer
from hf_rgm.explorer.what_if import engine_of, replay_without, what_if_section
from hf_rgm.pages.exhibit import Exhibit
from hf_rgm.testing import tiny_recorded_run
from tests.pages.tiny import tiny_exhibit


@pytest.fixture(scope="module")
def replayed():
    return replay_without(tiny_exhibit(), [1])


def test_before_is_the_model_and_after_is_replayed(replayed):
    exhibit, run = tiny_exhibit(), tiny_recorded_run()
    assert replayed.objective is not None and replayed.probabilities is not None
    with torch.no_grad():
        expected = run.model(pixel_values=torch.stack(list(run.queries["pixel_values"]))).logits.softmax(-1)
    np.testing.assert_allclose(replayed.probabilities[0], expected, atol=1e-5)
    np.testing.assert_allclose(replayed.objective[0], exhibit.result.objective_values, atol=1e-4)
    mask = torch.tensor([[1.0, 0, 1, 1, 1, 1]])
    margin = Objective("evaluated", OBJECTIVES["margin"].function, differentiable=False)
    after = exhibit.attributor.replayed_values(run.queries, mask, objective=margin)
    np.testing.assert_allclose(replayed.objective[1], after[0], atol=1e-4)
    # Scores are to first order in the objective too, so they are near and not equal.
    change = replayed.objective[0] - replayed.objective[1]
    assert np.corrcoef(change, exhibit.result.scores[:, 1])[0, 1] > 0.95
    np.testing.assert_allclose(replayed.probabilities.sum(-1), 1, atol=1e-5)


def test_the_panel_tells_before_and_after(replayed):
    exhibit = tiny_exhibit()
    html = what_if_section(exhibit, replayed, [1], 2).to_html()
    assert "<h2>Without class 0, second half</h2>" in html
    assert "8 of 48 training rows removed" in html and "linearized replay, not by retraining" in html
    before, after = replayed.probabilities[:, 2].max(-1)
    assert f"{before:.1%}" in html and f"{after:.1%}" in html
    changed = int((replayed.probabilities.argmax(-1)[0] != replayed.probabilities.argmax(-1)[1]).sum())
    assert f"changes for {changed} of 12 queries" in html
    everyone = what_if_section(exhibit, replayed, [1], None).to_html()
    assert "mean over 12 queries" in everyone and "Predicted probabilities" not in everyone


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("adjoint", "linearized_replay"),
        ("replay", "replay"),
        ("training_on", "linearized_replay"),
        ("x", "linearized_replay"),
    ],
)
def test_it_replays_as_the_scores_were_computed(engine, expected):
    assert engine_of(dataclasses.replace(tiny_exhibit().result, engine=engine)) == expected


def test_objectives_over_a_set_and_of_ones_own():
    exhibit = tiny_exhibit()
    assert exhibit.attributor is not None
    result = exhibit.attributor.attribute(exhibit.queries, objective="mean_loss")
    of_set = Exhibit(result, queries=exhibit.queries, attributor=exhibit.attributor)
    replayed = replay_without(of_set, [0, 2])
    assert replayed.objective is not None and replayed.objective.shape == (2, 1)
    np.testing.assert_allclose(replayed.objective[0], result.objective_values, atol=1e-5)
    assert "changes for" in what_if_section(of_set, replayed, [0, 2], 0).to_html()
    own = dataclasses.replace(exhibit.result, objective="my own")
    unknown = replay_without(dataclasses.replace(of_set, result=own), [3])
    assert unknown.objective is None and unknown.probabilities is not None


def test_what_cannot_be_replayed_is_said():
    explorer = Explorer(tiny_exhibit())
    assert "at least one of 6, and not all" in explorer.what_if([], 0)
    assert "at least one of 6, and not all" in explorer.what_if(range(6), ALL_QUERIES)
    assert "need the model, the synset and the queries" in Explorer(Exhibit(tiny_exhibit().result)).what_if([1], 0)
