from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_rgm.distillation.config import INITIALISATIONS, DistillationConfig
from hf_rgm.distillation.initialisation import initial_samples
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import CROSS_ENTROPY
from hf_rgm.model.row_reader import CachedBatches, RowReader
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.testing import tiny_recorded_run


def start(clusters=range(6), rows=None, **settings):
    run = tiny_recorded_run()
    model = FunctionalModel(run.model)
    rows = [run.clusters.rows(k) for k in range(6)] if rows is None else rows
    reader = RowReader(run.train_dataset, model)
    batches = CachedBatches(reader, rows, batch_size=3)
    config = DistillationConfig(**settings)
    return initial_samples(batches, clusters, ContinuousInputs(model), 3, CROSS_ENTROPY, config)


def pixels(rows):
    return tiny_recorded_run().train_dataset[np.asarray(rows)]["pixel_values"]


def distinct(samples):
    return len(torch.unique(samples.flatten(1), dim=0))


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_shapes_and_weights(init):
    samples = start(init=init, samples_per_cluster=3)
    assert samples.inputs.shape == (6, 3, 1, 4, 4)
    assert samples.targets.shape == (6, 3, 3)
    assert {t.dtype for t in samples.tensors()} == {torch.float32}
    assert samples.log_weights.exp().sum().item() == pytest.approx(1.0)
    assert samples.log_weights[0, 0].item() == pytest.approx(math.log(8 / 48 / 3))
    assert samples.targets.argmax(-1).tolist() == [[k // 2] * 3 for k in range(6)]


def test_random_starts_from_different_rows_of_the_cluster():
    samples = start(init="random", samples_per_cluster=3).inputs
    for cluster in range(6):
        own = pixels(tiny_recorded_run().clusters.rows(cluster)).flatten(1)
        assert (torch.cdist(samples[cluster].flatten(1), own).amin(1) == 0).all()
        assert distinct(samples[cluster]) == 3


def test_nearest_starts_from_the_row_nearest_the_centre_and_other_rows():
    samples = start(init="nearest", samples_per_cluster=8).inputs
    for cluster in range(6):
        own = pixels(tiny_recorded_run().clusters.rows(cluster))
        nearest = (own - own.mean(0)).flatten(1).norm(dim=1).argmin()
        assert torch.equal(samples[cluster, 0], own[nearest])
        assert distinct(samples[cluster]) == 8


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_more_samples_than_rows_are_still_different(init):
    """Identical samples would receive identical gradients and stay identical for ever."""
    rows = [np.array([0]), np.array([1, 4])]
    samples = start([0, 1], rows, init=init, samples_per_cluster=3).inputs
    assert torch.isfinite(samples).all()
    assert distinct(samples[1]) == 3
    if init in ("nearest", "random"):
        assert distinct(samples[0]) == 3
        deviation = (samples[1][:, None] - pixels(rows[1])).flatten(2).norm(dim=2).amin(1)
        assert (deviation < 0.2 * pixels(rows[1]).flatten(1).norm(dim=1).mean()).all()


def test_mean_starts_near_the_mean_and_noise_does_not():
    run = tiny_recorded_run()
    mean, noise = (start(init=init).inputs for init in ("mean", "noise"))
    for cluster in range(6):
        own = pixels(run.clusters.rows(cluster))
        distance = (mean[cluster] - own.mean(0)).abs().mean()
        assert distance < 0.2 * own.std()
        assert (noise[cluster] - own.mean(0)).abs().mean() > 3 * distance


def test_mixed_clusters_start_from_the_share_of_labels():
    targets = start([0], [np.array([0, 1, 3, 6])], init="mean", target_smoothing=0.1).targets
    assert targets[0, 0].softmax(-1).tolist() == pytest.approx([0.75 * 0.9 + 0.1 / 3, 0.25 * 0.9 + 0.1 / 3, 0.1 / 3])


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_a_cluster_starts_the_same_whatever_is_distilled_beside_it(init):
    together = start(init=init, seed=3)
    for block in ([0, 1], [2, 3], [5]):
        apart = start(block, init=init, seed=3)
        for whole, part in zip(together.tensors(), apart.tensors(), strict=True):
            assert torch.equal(whole[block], part)
    assert not torch.equal(start(init=init, seed=4).inputs, together.inputs)


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    start(init="noise")
    assert torch.equal(torch.random.get_rng_state(), before)
