from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch

from hf_rgm import Attributor
from hf_rgm.engines.anchored_replay import AnchoredReplayEngine
from hf_rgm.engines.registry import ENGINES
from hf_rgm.exceptions import DivergenceError
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()
LEAVE_ONE_OUT = 1 - torch.eye(6)


def attributor_with(**changes):
    """Of a synset whose samples are changed: `name=function`."""
    synset = tiny_synset()
    named = synset.samples.named_tensors()
    samples = dataclasses.replace(synset.samples, **{name: change(named[name]) for name, change in changes.items()})
    return Attributor(RUN.model, dataclasses.replace(synset, samples=samples), disable_tqdm=True)


@pytest.fixture(scope="module")
def attributor():
    return attributor_with()


@pytest.fixture(scope="module")
def too_strong():
    """Clusters that push eight times as hard as they should: replays go astray, the farther back the more."""
    return attributor_with(log_weights=lambda weights: weights + np.log(8))


def run_of(attributor):
    return attributor._runs(None, None)[0]


def meter(attributor):
    return run_of(attributor).drift_meter


def losses(vector, attributor):
    """Each cluster's loss on its samples, one sample at a time: `(6,)`, with a graph."""
    samples, result = run_of(attributor).samples.samples, []
    named = attributor.model.space.unflatten(vector)
    for k in range(6):
        terms = []
        for inputs, targets, weight in zip(*(tensor[k] for tensor in samples.tensors()), strict=True):
            logits = attributor.model.logits(named, {"pixel_values": inputs[None]})[0]
            terms.append(weight.exp() * torch.nn.functional.cross_entropy(logits, targets.softmax(-1)))
        result.append(sum(terms))
    return torch.stack(result)


def test_drift_is_what_kept_losses_change_by_beyond_first_order_or_rise_by(attributor):
    trajectory, flatten = attributor.synset.trajectory, attributor.model.space.flatten
    initial, trained = (flatten(trajectory.state(step).parameters) for step in (0, 48))
    vectors = torch.stack([flatten(trajectory.state(step).parameters) for step in (29, 38)])
    masks = torch.tensor([[0.0, 1, 1, 1, 1, 1], [2.0, 0, 0, 1, 1, 1]])
    # All clusters have a sixth of the rows. Without one, a sixth moves to the others.
    variations = [1 / 6, 0.5 * (abs(2 / 5 - 1 / 6) + 2 / 6 + 3 * abs(1 / 5 - 1 / 6))]
    expected = []
    for vector, mask, variation in zip(vectors, masks, variations, strict=True):
        at_end = trained.clone().requires_grad_()
        kept = mask @ losses(at_end, attributor)
        (gradient,) = torch.autograd.grad(kept, at_end)
        beyond = mask @ losses(vector, attributor) - kept - gradient @ (vector - trained)
        learned = mask @ losses(initial, attributor) - kept
        rise = mask @ losses(vector, attributor) - kept
        expected.append(max(beyond.abs() / (variation * learned), rise / learned).item())
    found = meter(attributor).drifts(vectors, masks)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_weights_as_they_were_do_not_count_and_what_is_no_number_is_infinite(attributor):
    final = attributor.model.space.flatten(attributor.synset.trajectory.final.parameters)
    masks = torch.stack([torch.ones(6), torch.full((6,), 2.0), LEAVE_ONE_OUT[0]])
    with torch.no_grad():
        found = meter(attributor).drifts(torch.stack([final + 1, final, torch.full_like(final, torch.nan)]), masks)
    assert found.tolist() == [0.0, 0.0, torch.inf]


@pytest.mark.parametrize("engine", ["linearized_replay", "replay"])
def test_a_replay_that_drifts_begins_later(too_strong, attributor, engine):
    default = attributor.attribute(RUN.queries, engine=engine).metadata["rewind_step"]
    chosen = too_strong.attribute(RUN.queries, engine=engine)
    assert default < chosen.metadata["rewind_step"]
    rewind = chosen.metadata["rewind_step"] / 48
    again = too_strong.attribute(RUN.queries, engine=engine, rewind=rewind)
    np.testing.assert_array_equal(chosen.scores, again.scores)
    kind = ENGINES[engine]
    with torch.no_grad():
        models = kind(run_of(too_strong)).parameters(LEAVE_ONE_OUT, None).values
        assert meter(too_strong).drifts(models, LEAVE_ONE_OUT).mean() <= kind.max_drift


def test_of_many_models_some_decide_where_anchored_replays_begin(too_strong):
    """Eight are looked at; the others follow from where these began, and all are in the order they were asked for."""
    masks = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    replays = AnchoredReplayEngine(run_of(too_strong))
    with torch.no_grad():
        found = replays.parameters(masks, None)
        assert found.start > replays.start(replays.rewind)
        again = replays.parameters(masks, found.start / 48)
    assert torch.equal(found.values, again.values)
    assert found.drift == pytest.approx(again.drift)


@pytest.mark.parametrize("engine", ["linearized_replay", "replay"])
def test_a_rewind_that_is_asked_for_is_taken(too_strong, engine):
    assert too_strong.attribute(RUN.queries, engine=engine, rewind=0.25).metadata["rewind_step"] <= 12
    assert too_strong.unlearn([0], engine=engine, rewind=0.25).rewind_step <= 12


def test_the_model_without_begins_later_too(too_strong, attributor):
    assert attributor.unlearn([0]).rewind_step < too_strong.unlearn([0]).rewind_step


def test_training_on_drifts_by_itself_and_is_left_alone(too_strong):
    found = too_strong.attribute(RUN.queries, engine="training_on", rows=RUN.train_dataset)
    assert found.metadata["rewind_step"] < 24


def test_replays_that_cannot_be_trusted_from_anywhere_are_told(caplog):
    lost = attributor_with(log_weights=lambda weights: weights + np.log(1e5))
    with caplog.at_level(logging.WARNING):
        lost.attribute(RUN.queries, engine="replay")
        assert "do not rely on them, but pass the training rows as `rows`, distil again" in caplog.text
        caplog.clear()
        lost.attribute(RUN.queries, engine="replay", rows=RUN.train_dataset)
    assert "do not rely on them, but distil again" in caplog.text


def test_divergence_from_everywhere_is_an_error():
    lost = attributor_with(log_weights=lambda weights: weights + 60)
    with pytest.raises(DivergenceError, match="gave NaN or infinite parameters"):
        lost.attribute(RUN.queries, engine="replay")
