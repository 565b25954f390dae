from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_gradients import cluster_gradients
from hf_rgm.model.row_reader import CachedBatches, RowReader
from hf_rgm.testing import tiny_recorded_run


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_cluster_gradients_equal_a_loop_over_rows(batch_size):
    run = tiny_recorded_run()
    model = FunctionalModel(run.model)
    states = [run.trajectory.state(step).parameters for step in (10, 48)]
    rows = [run.clusters.rows(k) for k in range(6)]
    batches = CachedBatches(RowReader(run.train_dataset, model), rows, batch_size=batch_size)
    vectors = [model.space.flatten(state) for state in states]
    got = cluster_gradients(model, vectors, batches, [4, 0], num_rows=48)
    for index, state in enumerate(states):
        for position, cluster in enumerate([4, 0]):
            expected = torch.zeros(model.num_parameters)
            for row in rows[cluster]:
                parameters = {name: value.clone().requires_grad_() for name, value in state.items()}
                inputs = {"pixel_values": run.train_dataset[int(row)]["pixel_values"][None]}
                loss = cross_entropy(model.logits(parameters, inputs), run.train_dataset[int(row)]["labels"][None])
                loss.backward()
                expected += model.space.flatten({name: p.grad for name, p in parameters.items()}) / 48
            torch.testing.assert_close(got[index, position], expected, atol=1e-6, rtol=1e-4)


def test_all_clusters_together_give_the_gradient_of_the_training_loss():
    run = tiny_recorded_run()
    model = FunctionalModel(run.model)
    state = run.trajectory.state(19).parameters
    rows = [run.clusters.rows(k) for k in range(6)]
    batches = CachedBatches(RowReader(run.train_dataset, model), rows, batch_size=7)
    parts = cluster_gradients(model, [model.space.flatten(state)], batches, range(6), num_rows=48)[0]
    everything = run.train_dataset[np.arange(48)]
    total = torch.func.grad(
        lambda p: cross_entropy(model.logits(p, {"pixel_values": everything["pixel_values"]}), everything["labels"])
    )(state)
    torch.testing.assert_close(parts.sum(0), model.space.flatten(total), atol=1e-6, rtol=1e-4)
