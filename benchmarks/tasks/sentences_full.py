"""
Full fine-tuning of MiniLM on the sentences of `sentences`: 22.7 million parameters, the token embeddings among them.

Retraining is dearer than with adapters, so that clusters (two k-means cells for each source and label), subsets and
seeds are fewer.
"""

from __future__ import annotations

from functools import partial

from datasets import Dataset
from transformers import Trainer

from benchmarks.tasks import Task
from benchmarks.tasks.sentences import mini_lm, sentences_task
from benchmarks.tasks.trainers import quiet_trainer


def build_trainer(dataset: Dataset, seed: int, callbacks=(), **overrides) -> Trainer:
    """
    MiniLM and a new classifier, all trained, AdamW at 1e-4 with linear decay, batches of 16, no clipping.

    `overrides` go to `TrainingArguments` and say how long to train.
    """
    return quiet_trainer(
        mini_lm(seed),
        dataset,
        seed,
        callbacks,
        **{"per_device_train_batch_size": 16, "learning_rate": 1e-4, **overrides},
    )


def load() -> Task:
    """The task with a fixed number of steps."""
    return sentences_task(
        "sentences_full",
        partial(build_trainer, max_steps=75),
        num_clusters_per_class=2,
        num_cluster_masks=12,
        num_row_masks=6,
        seeds=(1, 2),
        max_memory="8GB",
    )
