"""
Fashion-MNIST with a fixed number of epochs, as `num_train_epochs` gives: half of the rows take half as long.

The recorded run is that of the task `fashion`: 6 epochs of all rows are its 474 steps.
"""

from __future__ import annotations

from benchmarks.tasks import Task
from benchmarks.tasks.fashion import fashion_task


def load() -> Task:
    """The task."""
    return fashion_task("fashion_epochs", num_train_epochs=6)
