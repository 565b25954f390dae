from __future__ import annotations

import pytest
import torch

from hf_rgm import Attributor
from hf_rgm.engines.anchored_replay import AnchoredReplayEngine, mask_gradients
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.exceptions import DivergenceError
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.engines.parts import FLOAT_TOLERANCE, retrained, sample_run
from tests.recorded import Linear, TinyNet, record

RUN = tiny_recorded_run()
MASKS = torch.tensor([[0, 1, 1, 1], [1, 0.5, 0, 1]])


def engine(**settings):
    attributor = Attributor(RUN.model, tiny_synset(), disable_tqdm=True, **settings)
    found = AnchoredReplayEngine(attributor._runs(None, None)[0])
    if found.run.samples is not None:
        found.run.samples.samples = found.run.samples.samples.map(torch.clone)
    return found


@pytest.mark.parametrize("model_class", [Linear, TinyNet])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov"])
def test_it_is_retraining_for_sgd(optimizer, model_class):
    run = record(optimizer, model_class=model_class)
    replayed = AnchoredReplayEngine(sample_run(run)).replay(MASKS, 0.0)
    torch.testing.assert_close(replayed, retrained(run, MASKS), atol=FLOAT_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_it_is_retraining_with_recorded_second_moments_for_adam(optimizer):
    run = record(optimizer, model_class=TinyNet)
    replayed = AnchoredReplayEngine(sample_run(run)).replay(MASKS, 0.0)
    expected = retrained(run, MASKS, frozen_second_moments=True)
    torch.testing.assert_close(replayed, expected, atol=FLOAT_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_everything_present_is_the_trained_model_exactly(optimizer):
    recorded = sample_run(record(optimizer, model_class=TinyNet))
    assert torch.equal(AnchoredReplayEngine(recorded).replay(torch.ones(1, 4), 0.0)[0], recorded.final)


@pytest.mark.parametrize("rewind", [0.0, 0.14, 0.9])
@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("rows", [None, RUN.train_dataset], ids=["synset", "rows"])
def test_everything_present_is_the_trained_model_exactly_with_strides_and_rows(rewind, stride, rows):
    replay = engine(rows=rows)
    replay.stride = stride
    assert torch.equal(replay.replay(torch.ones(2, 6), rewind), replay.run.final.expand(2, -1))


def test_masks_are_replayed_independently():
    replay = engine()
    masks = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    apart = torch.cat([replay.replay(mask[None], 0.14) for mask in masks])
    assert torch.equal(replay.replay(masks, 0.14), apart)


def test_the_rows_gradients_set_it_going_as_they_do_the_linear_engine():
    """A first step from the recorded path is the same: what the synset lacks is added."""
    replay = engine(rows=RUN.train_dataset)
    masks = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    deviations = replay.replay(masks, 0.98) - replay.run.final
    linear = LinearEngine(replay.run).replay(masks, 0.98)
    torch.testing.assert_close(deviations, linear, atol=1e-6, rtol=1e-4)
    without = engine()
    alone = without.replay(masks, 0.98) - without.run.final
    assert not torch.allclose(deviations, alone, rtol=0.01, atol=0)


def test_a_long_path_is_integrated_in_at_most_a_hundred_steps():
    recorded = sample_run(record("sgd", num_steps=150))
    counted = []
    replay = AnchoredReplayEngine(recorded)
    path = recorded.path(0.0, 2)
    recorded.path = lambda rewind, stride=1: counted.append(stride) or path
    replay.replay(torch.ones(1, 4), 0.0)
    assert 2 in counted and len(path.steps()) == 75


def test_an_absent_cluster_is_gone_whatever_its_samples_are():
    replay = engine()
    replay.run.samples.samples.inputs[2] = 1e3
    assert torch.isfinite(replay.replay(torch.tensor([[1.0, 1, 0, 1, 1, 1]]), 0.14)).all()


def test_rows_leave_less_memory_for_models():
    """Of 16 parts, models have 14 without rows and 11 with them."""
    budget, states = 24 * 163 * 16, 8 * 6 * 163
    settings = {"max_memory": f"{(budget + states) / 1000 + 0.001:.3f}KB"}
    assert engine(**settings).batch_size == 14
    assert engine(**settings, rows=RUN.train_dataset).batch_size == 11


def test_the_accelerators_way_gives_the_same_gradients(monkeypatch):
    """On a GPU the masks go through vmap together."""
    replay = engine()
    samples, masks = replay.run.samples, torch.tensor([[1.0] * 6, [0.0, 1, 0.5, 1, 1, 1]])
    vectors = replay.run.final.expand(2, -1)
    slow = mask_gradients(samples, vectors, masks)

    class Device:
        type = "cuda"

    monkeypatch.setattr(samples.model, "device", Device())
    torch.testing.assert_close(mask_gradients(samples, vectors, masks), slow, atol=1e-6, rtol=1e-4)
    assert not torch.equal(slow[0], slow[1])


def test_divergence_is_named():
    replay = engine()
    replay.run.samples.samples.inputs[0] = float("inf")
    with pytest.raises(DivergenceError, match=r"replay of masks \[0, 1\] gave NaN.*Rewind less far \(now from step 7"):
        replay.replay(torch.tensor([[0.5] + [1.0] * 5, [1.0] * 6]), 0.14)
