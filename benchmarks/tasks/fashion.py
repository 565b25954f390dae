"""
Fashion-MNIST: 10,000 pictures of clothes of 28x28 pixels, 50 clusters, a CNN of 20,490 parameters, AdamW.

The pictures come from Debian's package `dataset-fashion-mnist` (`apt-get install dataset-fashion-mnist`), or from any
folder with the four gzipped IDX files named by `HF_RGM_FASHION_MNIST`.
"""

from __future__ import annotations

import gzip
import os
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.tasks import Task
from benchmarks.tasks.images import build_trainer, image_task

FOLDER = Path(os.environ.get("HF_RGM_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
NUM_TRAIN = 10_000


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of a gzipped IDX file of unsigned bytes."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Install Debian's package dataset-fashion-mnist, or set HF_RGM_FASHION_MNIST to a "
            "folder with Fashion-MNIST's gzipped IDX files."
        )
    content = gzip.decompress(path.read_bytes())
    num_dimensions = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=num_dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def load_images() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Training pictures `(60000, 28, 28)` and labels, test pictures `(10000, 28, 28)` and labels, each shuffled."""
    generator = np.random.default_rng(0)
    shuffled = []
    for part in ("train", "t10k"):
        labels = read_idx(FOLDER / f"{part}-labels-idx1-ubyte.gz")
        order = generator.permutation(len(labels))
        shuffled += [read_idx(FOLDER / f"{part}-images-idx3-ubyte.gz")[order], labels[order]]
    return tuple(shuffled)


def fashion_task(name: str, **length: int) -> Task:
    """
    The task: the first 10,000 of the shuffled training pictures, queries from the test pictures.

    Args:
        name: Of the task.
        length: `max_steps` or `num_train_epochs` of every training.
    """
    train_images, train_labels, test_images, test_labels = load_images()
    return image_task(
        name,
        np.concatenate([train_images[:NUM_TRAIN], test_images])[:, None].astype(np.float32),
        np.concatenate([train_labels[:NUM_TRAIN], test_labels]).astype(np.int64),
        num_train=NUM_TRAIN,
        build_trainer=partial(build_trainer, batch_size=128, **length),
        num_cluster_masks=40,
        num_row_masks=40,
        seeds=(1, 2),
        num_dear_queries=30,
    )


def load() -> Task:
    """The task with a fixed number of steps."""
    return fashion_task("fashion", max_steps=474)
