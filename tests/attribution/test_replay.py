from __future__ import annotations

import pytest
import torch

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.attribution.linearized import LinearizedReplayEngine
from hf_rgm.attribution.replay import ReplayEngine
from hf_rgm.exceptions import DivergenceError
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from hf_rgm.trajectory.path import RecordedPath

RUN = tiny_recorded_run()


def engine(**settings):
    a = Attributor(RUN.model, tiny_synset(), disable_tqdm=True)
    return ReplayEngine(a.model, a.inputs, a.samples, RUN.trajectory, disable_tqdm=True, **settings)


def test_rows_leave_less_memory_for_models():
    budget = 24 * 171 * 16  # fourteen models without rows, eleven with them
    assert [engine(max_bytes=budget, with_rows=rows).batch_size for rows in (False, True)] == [14, 11]


@pytest.mark.parametrize("settings", [{}, {"rewind": 0.0}, {"rewind": 0.9}, {"stride": 5}], ids=str)
def test_everything_present_is_the_trained_model_exactly(settings):
    replay = engine(**settings)
    trained = replay.model.space.flatten(replay.model.parameters())
    assert torch.equal(replay.parameters(torch.ones(2, 6)), trained.expand(2, -1))


def test_masks_are_replayed_independently():
    replay = engine()
    masks = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    together = replay.parameters(masks)
    apart = torch.cat([replay.parameters(mask[None]) for mask in masks])
    assert torch.equal(together, apart)


def test_the_data_s_gradients_set_it_going_as_they_do_linearised_replay():
    """A first step from the recorded path is the same: what the synset lacks is added."""
    gradients = torch.randn(6, engine().model.num_parameters, generator=torch.Generator().manual_seed(0))
    settings = {
        "rewind": 0.98,
        "cluster_gradients": lambda step, clusters: gradients[clusters.start : clusters.stop],
    }
    anchored = engine(**settings)
    assert len(anchored.path.steps()) == 1
    linearised = LinearizedReplayEngine(
        anchored.model, anchored.inputs, anchored.samples, RUN.trajectory, disable_tqdm=True, **settings
    )
    masks = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    final = anchored.path.state(RUN.trajectory.num_steps)
    deviations = anchored.parameters(masks) - final
    torch.testing.assert_close(deviations, linearised.deviations(masks), atol=1e-6, rtol=1e-4)
    assert not torch.allclose(deviations, engine(rewind=0.98).parameters(masks) - final, rtol=0.1, atol=0)
    assert torch.equal(engine(**settings | {"rewind": 0.3}).parameters(torch.ones(1, 6))[0], final)


@pytest.mark.parametrize("anchored", [True, False])
def test_a_mask_of_zero_removes_the_cluster_whatever_its_samples_are(anchored):
    replay, other = engine(anchored=anchored), engine(anchored=anchored)
    other.samples.inputs = other.samples.inputs.clone()
    other.samples.inputs[2] = 1e3
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1]])
    got = other.parameters(mask)
    assert torch.isfinite(got).all()
    if not anchored:
        torch.testing.assert_close(got, replay.parameters(mask))


def test_plain_replay_of_everything_ends_near_the_trained_model():
    replay = engine(anchored=False)
    trained = replay.model.space.flatten(replay.model.parameters())
    start = replay.path.state(replay.start)
    assert (replay.parameters(torch.ones(1, 6))[0] - trained).norm() < 0.5 * (start - trained).norm()


def test_plain_replay_never_starts_at_the_end():
    """0.95 of the training is nearest to the last recorded state, from which there is nothing to replay."""
    replay = engine(anchored=False, rewind=0.95)
    assert replay.start == 38
    assert not torch.equal(*replay.parameters(torch.tensor([[1.0] * 6, [0.0] + [1.0] * 5])))


def test_nothing_but_the_end_recorded_is_refused():
    with pytest.raises(ValueError, match="No state before step 0 is recorded"):
        RecordedPath(RUN.trajectory, engine().model.space, torch.device("cpu"), rewind=0, stride=1).nearest_state(
            1, before=0
        )


def test_the_accelerators_way_gives_the_same_gradients(monkeypatch):
    """On a GPU the masks go through vmap together."""
    replay = engine()
    masks = torch.tensor([[1.0] * 6, [0.0, 1, 0.5, 1, 1, 1]])
    expected = replay.parameters(masks)

    class Device:
        type = "cuda"

    vectors = replay.path.state(48).expand(2, -1)
    slow = replay._gradients(vectors, masks)
    monkeypatch.setattr(replay.model, "device", Device())
    torch.testing.assert_close(replay._gradients(vectors, masks), slow, atol=1e-6, rtol=1e-4)
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize(
    "masks",
    [torch.ones(6), torch.ones(2, 5), torch.full((1, 6), float("nan")), torch.full((1, 6), -0.1)],
    ids=["one dimension", "clusters", "nan", "negative"],
)
def test_bad_masks_are_refused(masks):
    with pytest.raises(ValueError, match=r"Masks must be finite, not negative and of shape \(num_masks, 6\)"):
        engine().parameters(masks)


def test_plain_replay_takes_every_step():
    with pytest.raises(ValueError, match="takes every recorded step, got `stride=2`"):
        engine(anchored=False, stride=2)


def test_divergence_is_named():
    replay = engine()
    replay.samples.inputs = replay.samples.inputs.clone()
    replay.samples.inputs[0] = float("inf")
    with pytest.raises(DivergenceError, match=r"replay of masks \[0, 1\] gave NaN"):
        replay.parameters(torch.tensor([[0.5] + [1.0] * 5, [1.0] * 6]))
