from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.training_on import Continuation
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import RowReader
from hf_rgm.testing import tiny_recorded_run

RUN = tiny_recorded_run()


@pytest.fixture
def continuation(monkeypatch):
    model = FunctionalModel(RUN.model)
    made = Continuation(model, RUN.trajectory, RowReader(RUN.train_dataset, model), 1)
    # The rows of the recorded run, in its order.
    monkeypatch.setattr(made, "_batches", lambda rows, seed: iter(RUN.trajectory.steps.rows[rows[0] :]))
    return model, made


def test_with_the_recorded_rows_it_ends_where_training_ended(continuation):
    model, made = continuation
    step = RUN.trajectory.state_steps[2]
    found = made.parameters(np.array([step]), step, frozen=False, seed=0)
    expected = model.space.flatten(RUN.trajectory.final.parameters)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_recorded_second_moments_are_those_between_the_states(continuation):
    """They are interpolated, so that what ends near the trained model does not end on it."""
    model, made = continuation
    step = RUN.trajectory.state_steps[2]
    found = made.parameters(np.array([step]), step, frozen=True, seed=0)
    expected = model.space.flatten(RUN.trajectory.final.parameters)
    start = model.space.flatten(RUN.trajectory.state(step).parameters)
    assert 0 < (found - expected).norm() < 0.1 * (start - expected).norm()


def test_batches_go_through_the_kept_rows_again_and_again():
    model = FunctionalModel(RUN.model)
    made = Continuation(model, RUN.trajectory, RowReader(RUN.train_dataset, model), 4)
    batches = made._batches(np.array([1, 3, 5, 7, 9, 11]), seed=0)
    seen = np.concatenate([next(batches) for _ in range(3)])
    assert np.bincount(seen).tolist() == [0, 2] * 6
