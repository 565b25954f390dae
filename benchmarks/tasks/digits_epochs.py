"""
The digits with a fixed number of epochs, as `num_train_epochs` gives: half of the rows take half as long.

The recorded run is that of the task `digits`: 15 epochs of all rows are its 360 steps.
"""

from __future__ import annotations

from benchmarks.tasks import Task
from benchmarks.tasks.digits import digits_task


def load() -> Task:
    """The task."""
    return digits_task("digits_epochs", num_train_epochs=15)
