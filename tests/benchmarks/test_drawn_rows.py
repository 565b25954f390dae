from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import drawn_rows
from benchmarks import truth as ground_truth
from benchmarks.drawn_rows import DrawnReplay, DrawnRows, Setting
from hf_rgm import ClusterMap
from hf_rgm.attribution.replay import ReplayEngine
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import CachedBatches, RowReader
from hf_rgm.synset.inputs import input_space
from hf_rgm.synset.matching import SynsetGradients
from hf_rgm.synset.targets import cluster_gradients
from hf_rgm.testing import tiny_recorded_run
from tests.benchmarks import tiny

RUN = tiny_recorded_run()


@pytest.fixture(scope="module")
def parts():
    model = FunctionalModel(RUN.model)
    return model, input_space(model), RowReader(RUN.train_dataset, model)


def test_all_rows_of_a_cluster_have_its_gradient(parts):
    model, inputs, reader = parts
    clusters = ClusterMap.from_ids(np.arange(len(reader)) % 6)
    count = int(clusters.sizes[0])
    assert set(clusters.sizes) == {count}
    drawn = DrawnRows(reader, clusters, inputs, 3).draw(count, np.random.default_rng(0))
    found = SynsetGradients(model, inputs)(model.parameters(), drawn)
    batches = CachedBatches(reader, [clusters.rows(k) for k in range(6)], batch_size=16, max_bytes=2**20)
    real = cluster_gradients(model, [model.space.flatten(model.parameters())], batches, range(6), len(reader))[0]
    torch.testing.assert_close(found.detach(), real, rtol=1e-3, atol=1e-6)


def test_clusters_of_fewer_rows_have_some_twice(parts):
    _, inputs, reader = parts
    clusters = ClusterMap.from_ids(np.minimum(np.arange(len(reader)), 2))
    drawn = DrawnRows(reader, clusters, inputs, 3).draw(4, np.random.default_rng(0))
    own = inputs.read(*reader.batch([0]))[0].expand(4, *drawn.inputs.shape[2:])
    torch.testing.assert_close(drawn.inputs[0], own)
    torch.testing.assert_close(drawn.log_weights.exp().sum(1), torch.from_numpy(clusters.sizes / len(reader)).float())


def test_every_step_has_rows_of_its_own_and_all_present_is_the_trained_model(parts):
    model, inputs, reader = parts
    rows = DrawnRows(reader, RUN.clusters, inputs, 3)
    start = rows.draw(5, np.random.default_rng(0))
    settings = {"rewind": 0.27, "disable_tqdm": True}
    once = ReplayEngine(model, inputs, start, RUN.trajectory, **settings)
    anew = DrawnReplay(model, inputs, start, RUN.trajectory, draw=partial(rows.draw, 5), **settings)
    everything = torch.ones(1, RUN.clusters.num_clusters)
    without = everything.clone()
    without[0, 0] = 0
    trained = model.space.flatten(RUN.trajectory.final.parameters)
    assert torch.equal(anew.parameters(everything)[0], trained)
    assert not torch.allclose(anew.parameters(without), once.parameters(without), rtol=1e-3)
    assert not torch.equal(anew.samples.inputs, start.inputs)


def test_every_setting_is_measured(tmp_path, monkeypatch):
    settings = (Setting(2, 1, anew=True), Setting(4, 2, anew=False))
    monkeypatch.setattr(ground_truth, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(ground_truth, "load_task", lambda name: tiny.task())
    monkeypatch.setattr(drawn_rows, "SETTINGS", settings)
    monkeypatch.setattr(drawn_rows, "NUM_MASKS", 4)
    found = drawn_rows.measure("tiny", tmp_path / "runs")
    assert list(found) == ["noise_ceiling", "2 states, stride 1, rows anew", "4 states, stride 2, rows once"]
    assert all(found[str(setting)]["mean_deviation"] > 0 for setting in settings)
    one = found[str(settings[0])]
    expected = f"| tiny, others each time | 2 | 1 | {one['lds_clusters']['value']:.3f} | {one['mean_deviation']:.1f} |"
    assert drawn_rows.table({"tiny": {"results": found}}).splitlines()[2] == expected
