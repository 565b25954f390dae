from __future__ import annotations

import numpy as np
import pytest

from benchmarks.tasks import digits, digits_epochs
from tests.benchmarks import tiny


def test_masks_of_compared_outputs():
    masks = tiny.task().distance_masks()
    assert (~masks["leave_out"]).nonzero()[1].tolist() == [0, 5]
    assert np.array_equal(masks["halves"], tiny.task().cluster_masks()[:2])


def test_halves_are_drawn_as_for_the_cached_truth():
    """One permutation after another, its first half kept: other masks would make days of retraining useless."""
    task = tiny.task()
    for masks, num_items, seed in ((task.cluster_masks(), 6, 7), (task.row_masks(), 24, 8)):
        generator = np.random.default_rng(seed)
        for mask in masks:
            assert set(np.flatnonzero(mask)) == set(generator.permutation(num_items)[: num_items // 2].tolist())


@pytest.fixture(scope="module")
def both():
    return digits.load(), digits_epochs.load()


def test_epochs_differ_in_length_only(both):
    steps, epochs = both
    assert (steps.name, epochs.name) == ("digits", "digits_epochs")
    assert np.array_equal(steps.clusters.cluster_ids, epochs.clusters.cluster_ids)
    for part in ("train", "queries", "tuning_queries"):
        assert np.array_equal(getattr(steps, part)["pixel_values"][:], getattr(epochs, part)["pixel_values"][:])


def test_retraining_on_half_of_the_rows_takes_half_as_long(both):
    def num_updates(task, num_rows):
        trainer = task.build_trainer(task.train.select(range(num_rows)), 0)
        per_epoch = len(trainer.get_train_dataloader())
        return trainer.args.max_steps if trainer.args.max_steps > 0 else per_epoch * trainer.args.num_train_epochs

    assert [num_updates(task, 1200) for task in both] == [360, 360]
    assert [num_updates(task, 600) for task in both] == [360, 180]
