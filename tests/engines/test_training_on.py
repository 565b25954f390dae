"""Training on is training: with batches of all rows that are kept, exactly retraining."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hf_rgm import Attributor
from hf_rgm.engines.training_on import TrainingOnEngine, _batches
from hf_rgm.testing import tiny_recorded_run
from hf_rgm.trajectory.optimizers import apply_update
from tests.engines.parts import FLOAT_TOLERANCE, retrained, row_run
from tests.recorded import TinyNet, record

RUN = tiny_recorded_run()


def engine(run, rows_per_step, **metadata):
    """Batches of so many rows, which are all that a mask keeps."""
    run.trajectory.metadata = {"per_device_train_batch_size": rows_per_step, **metadata}
    return TrainingOnEngine(row_run(run))


def trained_on(run, weights, start, *, max_norm=None):
    """From the recorded state on, on all rows at every step, in float64."""
    state, model = run.trajectory.state(start), run.model.double()
    parameters = {name: value.double() for name, value in state.parameters.items()}
    moments = {kind: {name: v.double() for name, v in values.items()} for kind, values in state.moments.items()}

    def loss(p):
        logits = torch.func.functional_call(model, p, (run.features,))
        return (torch.nn.functional.cross_entropy(logits, run.labels, reduction="none") * weights).sum() / len(weights)

    for step in range(start, run.trajectory.num_steps):
        if run.trajectory.steps.skipped[step]:
            continue
        gradients = torch.func.grad(loss)(parameters)
        if max_norm is not None:
            norm = torch.cat([value.flatten() for value in gradients.values()]).norm()
            gradients = {name: value * min(1.0, max_norm / (float(norm) + 1e-6)) for name, value in gradients.items()}
        parameters, moments = apply_update(
            run.rule,
            parameters,
            gradients,
            moments,
            learning_rates=[run.learning_rates[step]],
            step=int(run.trajectory.update_numbers[step]),
        )
    run.model.float()
    return torch.cat([value.flatten() for value in parameters.values()]).float()


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
def test_from_the_beginning_it_is_retraining(optimizer):
    run = record(optimizer, model_class=TinyNet)
    for mask, kept in (([1.0, 1, 1, 1], 12), ([0, 1, 1, 1], 9), ([2, 0.5, 0, 1], 9), ([0, 0, 1, 0], 3)):
        masks = torch.tensor([mask])
        expected = retrained(run, masks)
        found = engine(run, kept).replay(masks, 0.0)
        torch.testing.assert_close(found, expected, atol=FLOAT_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_goes_on_from_a_recorded_state_with_its_moments(optimizer):
    run = record(optimizer, model_class=TinyNet)
    final = engine(run, 12).run.final
    torch.testing.assert_close(engine(run, 12).replay(torch.ones(1, 4), 0.5)[0], final, atol=1e-6, rtol=1e-4)
    weights = torch.tensor([1.0, 0, 1, 1]).repeat_interleave(3).double()
    expected = trained_on(run, weights, 10)
    found = engine(run, 9).replay(torch.tensor([[1.0, 0, 1, 1]]), 0.5)[0]
    torch.testing.assert_close(found, expected, atol=FLOAT_TOLERANCE, rtol=1e-4)
    assert (found - final).norm() > 100 * FLOAT_TOLERANCE


def test_gradients_are_clipped_as_the_training_clipped_them():
    run = record("sgd", model_class=TinyNet)
    weights = torch.tensor([1.0, 0, 1, 1]).repeat_interleave(3).double()
    expected = trained_on(run, weights, 5, max_norm=0.05)
    found = engine(run, 9, max_grad_norm=0.05).replay(torch.tensor([[1.0, 0, 1, 1]]), 0.25)[0]
    torch.testing.assert_close(found, expected, atol=FLOAT_TOLERANCE, rtol=1e-4)
    assert (found - trained_on(run, weights, 5)).norm() > 100 * FLOAT_TOLERANCE


def test_skipped_steps_are_skipped():
    run = record("adamw", model_class=TinyNet)
    run.trajectory.steps.skipped[[12, 15]] = True
    expected = trained_on(run, torch.ones(12).double(), 10)
    torch.testing.assert_close(
        engine(run, 12).replay(torch.ones(1, 4), 0.5)[0], expected, atol=FLOAT_TOLERANCE, rtol=1e-4
    )


def test_where_nothing_is_kept_there_are_no_gradients():
    run = record("sgd", model_class=TinyNet)
    expected = trained_on(run, torch.zeros(12).double(), 10)
    found = engine(run, 4).replay(torch.zeros(1, 4), 0.5)[0]
    torch.testing.assert_close(found, expected, atol=FLOAT_TOLERANCE, rtol=1e-4)


def test_it_never_starts_at_the_end():
    run = record("sgd")
    assert engine(run, 12).start(0.999) == 19


def test_rows_of_a_step_are_those_of_all_devices():
    run = record("sgd")
    assert engine(run, 2, gradient_accumulation_steps=3, num_processes=2)._rows_per_step == 12
    run.trajectory.metadata = {}
    assert TrainingOnEngine(row_run(run))._rows_per_step == 1


@pytest.mark.parametrize("size", [1, 4, 10, 25])
def test_batches_go_through_the_rows_again_and_again(size):
    rows = np.arange(5, 15)
    made = list(itertools.islice(_batches(rows, size), 20))
    assert {len(batch) for batch in made} == {size}
    order = np.concatenate(made)
    for epoch in range(len(order) // 10):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == rows.tolist()
    again = np.concatenate(list(itertools.islice(_batches(rows, size), 20)))
    np.testing.assert_array_equal(order, again)
    assert not (order[:10] == order[10:20]).all() if len(order) >= 20 else True


def test_scores_are_those_of_retraining_without_each_cluster():
    """On the tiny recorded run: what leaving a cluster out does by training on agrees with the first-order answer."""
    attributor = Attributor(
        RUN.model, trajectory=RUN.trajectory, rows=RUN.train_dataset, clusters=RUN.clusters, disable_tqdm=True
    )
    by_training = attributor.attribute(RUN.queries, engine="training_on")
    linear = attributor.attribute(RUN.queries)
    assert (by_training.engine, by_training.metadata["drift"]) == ("training_on", None)
    assert by_training.metadata["rewind_step"] in RUN.trajectory.state_steps
    assert np.corrcoef(by_training.scores.ravel(), linear.scores.ravel())[0, 1] > 0.6
