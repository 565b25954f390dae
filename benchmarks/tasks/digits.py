"""Digits: 1,200 handwritten digits of 8x8 pixels, 50 clusters, a CNN of 6,090 parameters, AdamW."""

from __future__ import annotations

from functools import partial

import numpy as np
from sklearn.datasets import load_digits

from benchmarks.tasks import Task
from benchmarks.tasks.images import build_trainer, image_task


def digits_task(name: str, **length: int) -> Task:
    """
    The task; the split is fixed by a seed.

    Args:
        name: Of the task.
        length: `max_steps` or `num_train_epochs` of every training.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return image_task(
        name,
        digits.images[order, None].astype(np.float32),
        digits.target[order],
        num_train=1200,
        build_trainer=partial(build_trainer, batch_size=50, **length),
        num_cluster_masks=64,
        num_row_masks=80,
        seeds=(1, 2, 3),
    )


def load() -> Task:
    """The task with a fixed number of steps."""
    return digits_task("digits", max_steps=360)
