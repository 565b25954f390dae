from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import drawn_samples
from benchmarks import truth as ground_truth
from benchmarks.drawn_samples import Setting, draw
from hf_rgm.synset.samples import SyntheticSamples
from tests.benchmarks import tiny


@pytest.fixture
def samples():
    numbers = torch.arange(12.0).reshape(3, 4)
    return SyntheticSamples(
        inputs=numbers[..., None], targets=numbers[..., None].expand(3, 4, 2), log_weights=-numbers
    )


def test_all_samples_are_all_of_them_in_another_order(samples):
    drawn = draw(samples, 4, np.random.default_rng(0))
    assert not torch.equal(drawn.inputs, samples.inputs)
    torch.testing.assert_close(drawn.inputs.sort(1).values, samples.inputs)
    torch.testing.assert_close(drawn.log_weights, -drawn.inputs[..., 0])
    torch.testing.assert_close(drawn.targets[..., 1], drawn.inputs[..., 0])


def test_some_samples_stand_for_all_in_the_mean(samples):
    generator = np.random.default_rng(0)
    many = [draw(samples, 3, generator) for _ in range(4000)]
    assert all(len(set(cluster.tolist())) == 3 for drawn in many[:50] for cluster in drawn.inputs[..., 0])
    weights = torch.stack([drawn.log_weights.exp().sum(1) for drawn in many]).mean(0)
    torch.testing.assert_close(weights, samples.log_weights.exp().sum(1), rtol=0.05, atol=0)


def test_every_setting_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(ground_truth, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(ground_truth, "load_task", lambda name: tiny.task())
    monkeypatch.setattr(drawn_samples, "SETTINGS", (Setting(1, 2, 1), Setting(2, 4, 2)))
    monkeypatch.setattr(drawn_samples, "SAMPLES_PER_CLUSTER", 2)
    monkeypatch.setattr(drawn_samples, "NUM_MASKS", 4)
    monkeypatch.setattr(drawn_samples, "NUM_ITERATIONS", 3)
    found = drawn_samples.measure("tiny", tmp_path / "runs")
    assert list(found)[-2:] == ["1 of 2, 2 states, stride 1", "2 of 2, 4 states, stride 2"]
    assert found["1 of 2, 2 states, stride 1"]["mean_deviation"] > 0
    assert found["matching_error"] > 0
