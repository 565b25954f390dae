"""The vendors' sentences, by full fine-tuning of MiniLM: 22.7 million parameters."""

from __future__ import annotations

from datasets import Dataset
from transformers import Trainer

from benchmarks.tasks.vendors import VendorTask, mini_lm, usual_trainer, vendors_task


def build_trainer(dataset: Dataset, seed: int, callbacks=()) -> Trainer:
    """At a learning rate of 5e-5."""
    return usual_trainer(mini_lm(seed), dataset, seed, callbacks, learning_rate=5e-5)


def load() -> VendorTask:
    """The task."""
    return vendors_task("vendors_full", build_trainer, seeds=(1,))
