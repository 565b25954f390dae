"""The recorded run that all methods share, and what a method says about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset

from benchmarks.tasks import Task
from hf_rgm import DistillationConfig, ReverseGradientMatchingDistiller, Synset, TrajectoryCallback


@dataclass
class Recorded:
    """
    The recorded run of a task (seed 0), trained once and shared by all methods.

    Args:
        task (`Task`): The task.
        folder (`Path`): Where the trajectory goes.
        num_states (`int`, *optional*, defaults to `8`): Recorded states.
    """

    task: Task
    folder: Path
    num_states: int = 8
    training_seconds: float = field(init=False)
    _synsets: dict[DistillationConfig, tuple[Synset, float]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        callback = TrajectoryCallback(self.folder, num_states=self.num_states)
        trainer = self.task.build_trainer(self.task.train, 0, callbacks=[callback])
        start = time.perf_counter()
        trainer.train()
        self.training_seconds = time.perf_counter() - start
        self.model = trainer.model
        self.summary = callback.summary()

    def synset(self, config: DistillationConfig) -> tuple[Synset, float]:
        """A synset and the seconds it took, distilled at most once."""
        if config not in self._synsets:
            start = time.perf_counter()
            distiller = ReverseGradientMatchingDistiller(
                self.model,
                self.folder,
                self.task.train,
                self.task.clusters,
                config=config,
                disable_tqdm=True,
            )
            self._synsets[config] = distiller.distill(), time.perf_counter() - start
        return self._synsets[config]


@dataclass
class Prediction:
    """
    What a method says about some queries.

    Args:
        cluster_scores (`np.ndarray`): `(num_queries, num_clusters)`.
        row_scores (`np.ndarray`, *optional*): `(num_queries, num_rows)`.
        cluster_subset_values (`np.ndarray`, *optional*): `(num_queries, num_cluster_masks)`, for methods that predict
            the objective of a subset directly; sums of cluster scores otherwise.
        offline_seconds, online_seconds (`float`): Cost before any query is known, and after.
        details (`dict`): What else to keep.
    """

    cluster_scores: np.ndarray
    row_scores: np.ndarray | None = None
    cluster_subset_values: np.ndarray | None = None
    offline_seconds: float = 0.0
    online_seconds: float = 0.0
    details: dict = field(default_factory=dict)


Method = Callable[[Recorded, Dataset], Prediction]
