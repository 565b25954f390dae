from __future__ import annotations

import pytest
import torch

from benchmarks.methods.plain_replay import PlainReplayEngine
from hf_rgm import Attributor
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.engines.parts import FLOAT_TOLERANCE, flat, retrained, sample_run
from tests.recorded import Linear, TinyNet, record

RUN = tiny_recorded_run()


@pytest.fixture
def engine():
    return PlainReplayEngine(Attributor(RUN.model, tiny_synset(), disable_tqdm=True)._runs(None, None)[0])


@pytest.mark.parametrize("model_class", [Linear, TinyNet])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
def test_it_is_retraining(optimizer, model_class):
    run = record(optimizer, model_class=model_class)
    masks = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0.5, 0, 1]])
    replayed = PlainReplayEngine(sample_run(run)).replay(masks, 0.0)
    torch.testing.assert_close(replayed, retrained(run, masks), atol=FLOAT_TOLERANCE, rtol=1e-4)


def test_of_everything_it_ends_near_the_trained_model(engine):
    start = flat(engine.run, engine.start(0.14))
    trained = engine.run.final
    assert (engine.replay(torch.ones(1, 6), 0.14)[0] - trained).norm() < 0.5 * (start - trained).norm()


def test_it_never_starts_at_the_end(engine):
    """0.95 of the training is nearest to the last recorded state, from which there is nothing to replay."""
    assert engine.start(0.95) == 38
    assert not torch.equal(*engine.replay(torch.tensor([[1.0] * 6, [0.0] + [1.0] * 5]), 0.95))


def test_an_absent_cluster_is_gone_whatever_its_samples_are(engine):
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1]])
    expected = engine.replay(mask, 0.14)
    samples = engine.run.samples.samples
    engine.run.samples.samples = samples.map(torch.clone)
    engine.run.samples.samples.inputs[2] = 1e3
    torch.testing.assert_close(engine.replay(mask, 0.14), expected)
