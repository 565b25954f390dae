from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_gradients import cluster_gradients, row_derivatives
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


class Rounded(torch.autograd.Function):
    """A product with weights in 8 bits, written as before `torch.func`."""

    @staticmethod
    def forward(ctx, x, weights):
        ctx.save_for_backward(weights)
        return x @ weights.float().T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0].float(), None


@torch.library.custom_op("hf_rgm_tests::product", mutates_args=())
def product(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same product without any derivative."""
    return x @ weights.float().T


class Quantised(torch.nn.Module):
    """A frozen layer in 8 bits between two, with a function of its own where a gradient is wanted (or always)."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.always = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3), always
        self.register_buffer("weights", torch.randint(-3, 4, (4, 4), dtype=torch.int8))

    def forward(self, features, oracle=False):
        hidden = self.first(features)
        if oracle:
            hidden = hidden @ self.weights.float().T
        elif self.always or hidden.requires_grad:
            hidden = Rounded.apply(hidden, self.weights)
        else:
            hidden = product(hidden, self.weights)
        return self.last(hidden)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("num_directions", [1, 9])
def test_functions_that_torch_func_cannot_take_are_followed_by_plain_passes(always, num_directions):
    model = FunctionalModel(Quantised(always=always))
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(6, 5, generator=generator), torch.arange(6) % 3
    directions = torch.randn(num_directions, model.num_parameters, generator=generator)

    parameters = {name: value.clone().requires_grad_() for name, value in model.parameters().items()}
    logits = torch.func.functional_call(model.module, parameters, (features,), {"oracle": True})
    rows = []
    for loss in cross_entropy(logits, labels, reduction="none"):
        gradients = torch.autograd.grad(loss, [*parameters.values()], retain_graph=True)
        rows.append(model.space.flatten(dict(zip(parameters, gradients, strict=True))))
    for _ in range(2):
        found = row_derivatives(model, model.parameters(), directions, {"features": features}, labels)
        torch.testing.assert_close(found, directions @ torch.stack(rows).T, atol=1e-5, rtol=1e-4)
