from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import truth as ground_truth
from hf_rgm import ClusterMap
from hf_rgm.engines.objectives import log_odds_margin
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.testing import tiny_trainer
from tests.benchmarks import tiny


@pytest.fixture(scope="module")
def task():
    return tiny.task(
        clusters=ClusterMap.from_ids(np.arange(tiny.NUM_ROWS) % 3),
        num_cluster_masks=2,
        num_row_masks=1,
        num_distances=1,
        build_trainer=partial(tiny_trainer, max_steps=2),
    )


@pytest.fixture(scope="module")
def both(task, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_truth, "CACHE", tmp_path_factory.mktemp("cache"))
        yield ground_truth.load(task), ground_truth.load(task, tuning=True)


def test_reported_and_tuning_queries_are_told_apart(task, both):
    keep = np.flatnonzero(task.cluster_masks()[1][task.clusters.cluster_ids])
    for truth, queries in zip(both, (task.queries, task.tuning_queries), strict=True):
        alone = retrain(task.build_trainer, task.train, [keep], queries, seeds=(2,), disable_tqdm=True)
        assert np.allclose(truth.cluster_subsets[1, :, 1], alone[0, 0], atol=1e-6)


def test_the_first_halves_are_those_of_the_whole_truth(task, both):
    found = ground_truth.first_halves(task, 1, 3)
    np.testing.assert_array_equal(found, both[1].cluster_subsets[:, :3, :1])


def test_outputs_and_margins_are_of_the_same_models(task, both):
    for truth, queries in zip(both, (task.queries, task.tuning_queries), strict=True):
        labels = torch.stack([row["labels"] for row in queries])
        for seed in (0, 1):
            margins = log_odds_margin(torch.from_numpy(truth.outputs["halves"][seed, 0]), labels).numpy()
            assert np.allclose(margins, truth.cluster_subsets[seed, :, 0], atol=1e-5)
    assert truth.outputs["leave_out"].shape == (2, 1, tiny.NUM_TUNING, tiny.NUM_LABELS)


def test_leaving_out_is_told_as_what_presence_adds(task, both):
    without = task.leave_out_subsets()[2]
    everything = np.arange(tiny.NUM_ROWS)
    values = retrain(
        task.build_trainer, task.train, [everything, without], task.queries, seeds=(1,), disable_tqdm=True
    )
    assert np.allclose(both[0].leave_out[0, :, 2], values[0, 0] - values[1, 0], atol=1e-5)


def test_first(both):
    first = both[0].first(3)
    assert first.leave_out.shape == (2, 3, 3)
    assert np.array_equal(first.row_subsets, both[0].row_subsets[:, :3])
    assert np.array_equal(first.outputs["halves"], both[0].outputs["halves"][:, :, :3])


def test_identity_follows_the_values(both):
    truth = both[0]
    before = truth.sha256()
    assert before == truth.first(len(truth.leave_out[0])).sha256()
    assert before != truth.first(3).sha256()
    truth.outputs["halves"][0, 0, 0, 0] += 1
    assert before != truth.sha256()
    truth.outputs["halves"][0, 0, 0, 0] -= 1
