"""Digits: 1,200 handwritten digits of 8x8 pixels, 50 clusters, a CNN of 6,090 parameters, AdamW."""

from __future__ import annotations

import tempfile

import numpy as np
from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from benchmarks.models import SmallCnnConfig, SmallCnnForImageClassification
from benchmarks.tasks import Task
from hf_rgm import ClusterMap

NUM_TRAIN, NUM_QUERIES = 1200, 200
NUM_STEPS = 360


def build_trainer(dataset: Dataset, seed: int, callbacks=(), **overrides) -> Trainer:
    """
    AdamW at 2e-3 with linear decay, 360 batches of 50, no clipping.

    Steps are fixed, not epochs, so that a retraining on half of the rows takes as many steps as the recorded run.
    """
    set_seed(seed)
    model = SmallCnnForImageClassification(SmallCnnConfig(num_labels=10))
    settings = {
        "output_dir": tempfile.mkdtemp(prefix="hf-rgm-digits-"),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 50,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
    }
    trainer = Trainer(
        model, TrainingArguments(**{**settings, **overrides}), train_dataset=dataset, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def load() -> Task:
    """The task; the split is fixed by a seed."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = digits.images[order, None].astype(np.float32)
    images = (images - images[:NUM_TRAIN].mean()) / images[:NUM_TRAIN].std()
    labels = digits.target[order]

    def part(rows: slice) -> Dataset:
        return Dataset.from_dict({"pixel_values": images[rows], "labels": labels[rows]}).with_format("torch")

    train = slice(0, NUM_TRAIN)
    clusters = ClusterMap.from_embeddings(
        images[train].reshape(NUM_TRAIN, -1), labels=labels[train], num_clusters_per_class=5, seed=0
    )
    return Task(
        name="digits",
        train=part(train),
        queries=part(slice(NUM_TRAIN, NUM_TRAIN + NUM_QUERIES)),
        tuning_queries=part(slice(NUM_TRAIN + NUM_QUERIES, NUM_TRAIN + 2 * NUM_QUERIES)),
        clusters=clusters,
        build_trainer=build_trainer,
        num_cluster_masks=64,
        num_row_masks=80,
        seeds=(1, 2, 3),
    )
