"""What the image tasks share: datasets of standardised pixels, trainers for small CNNs, the split into clusters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from datasets import Array3D, Dataset, Features, Value
from numpy.typing import NDArray
from transformers import Trainer, set_seed

from benchmarks.models import SmallCnnConfig, SmallCnnForImageClassification
from benchmarks.tasks import Task
from benchmarks.tasks.trainers import quiet_trainer
from hf_rgm import ClusterMap

NUM_QUERIES = 200


def build_trainer(
    dataset: Dataset,
    seed: int,
    callbacks=(),
    *,
    image_size: int,
    batch_size: int,
    hidden_sizes: tuple[int, ...] = (16, 32),
    **overrides,
) -> Trainer:
    """
    A CNN, AdamW at 2e-3 with linear decay, batches of `batch_size`, no clipping.

    `overrides` go to `TrainingArguments` and say how long to train: with `max_steps` a retraining on half of the rows
    takes as many steps as the recorded run, with `num_train_epochs` it takes half as many.
    """
    set_seed(seed)
    config = SmallCnnConfig(image_size=image_size, hidden_sizes=hidden_sizes, num_labels=10)
    model = SmallCnnForImageClassification(config)
    return quiet_trainer(
        model,
        dataset,
        seed,
        callbacks,
        **{"per_device_train_batch_size": batch_size, "learning_rate": 2e-3, **overrides},
    )


def image_dataset(images: NDArray[np.float32], labels: NDArray[np.integer]) -> Dataset:
    """Pictures `(num_images, num_channels, side, side)` and labels `(num_images,)` as tensors for a `Trainer`."""
    features = Features({"pixel_values": Array3D(images.shape[1:], "float32"), "labels": Value("int64")})
    return Dataset.from_dict({"pixel_values": images, "labels": labels}, features=features).with_format("torch")


def image_task(
    name: str,
    images: NDArray[np.float32],
    labels: NDArray[np.integer],
    *,
    num_train: int,
    build_trainer: Callable[..., Trainer],
    num_cluster_masks: int,
    num_row_masks: int,
    seeds: tuple[int, ...],
    num_dear_queries: int | None = None,
) -> Task:
    """
    A task on images: `num_train` rows in five k-means cells per class, then the queries, then the tuning queries.

    Args:
        images: `(num_images, 1, side, side)`, pixel values; standardised here by the training rows.
        labels: `(num_images,)`.
    """
    images = (images - images[:num_train].mean()) / images[:num_train].std()

    def part(start: int, count: int) -> Dataset:
        rows = slice(start, start + count)
        return image_dataset(images[rows], labels[rows])

    clusters = ClusterMap.from_embeddings(
        images[:num_train].reshape(num_train, -1), labels=labels[:num_train], num_clusters_per_class=5, seed=0
    )
    return Task(
        name=name,
        train=part(0, num_train),
        queries=part(num_train, NUM_QUERIES),
        tuning_queries=part(num_train + NUM_QUERIES, NUM_QUERIES),
        clusters=clusters,
        build_trainer=partial(build_trainer, image_size=images.shape[-1]),
        num_cluster_masks=num_cluster_masks,
        num_row_masks=num_row_masks,
        seeds=seeds,
        num_dear_queries=num_dear_queries,
    )
