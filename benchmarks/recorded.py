"""The recorded run that all methods share, and what a method says about it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from benchmarks.costs import Meter, folder_bytes
from benchmarks.tasks import Task
from hf_rgm import DistillationConfig, ReverseGradientMatchingDistiller, Synset, TrajectoryCallback

RECORDED_SEED = 0
FIRST_OTHER_SEED = 100


@dataclass
class Recorded:
    """
    The recorded run of a task, trained once and shared by all methods; and one plain retraining, for its time.

    Args:
        task (`Task`): The task.
        folder (`Path`): Where the trajectory goes.
        num_states (`int`, *optional*, defaults to `8`): Recorded states.

    Attributes:
        training_seconds (`float`): CPU time of the recorded training.
        retraining_seconds (`float`): CPU time of a training on all rows from another seed that records nothing.
        reused_bytes (`int`): Peak memory of the dearest distillation since this was last set to 0, reused ones among
            them: a method's cost does not depend on who distilled first.
    """

    task: Task
    folder: Path
    num_states: int = 8
    training_seconds: float = field(init=False)
    retraining_seconds: float = field(init=False)
    reused_bytes: int = field(init=False, default=0)
    _others: dict[int, float] = field(init=False, default_factory=dict)
    _synsets: dict[tuple[DistillationConfig, int], tuple[Synset, Meter]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        callback = TrajectoryCallback(self.folder, num_states=self.num_states, dtype=torch.float32)
        trainer = self.task.build_trainer(self.task.train, RECORDED_SEED, callbacks=[callback])
        with Meter() as meter:
            trainer.train()
        self.training_seconds = meter.cpu_seconds
        self.model = trainer.model
        self.summary = callback.summary()
        plain = self.task.build_trainer(self.task.train, self.task.seeds[0])
        with Meter() as meter:
            plain.train()
        self.retraining_seconds = meter.cpu_seconds

    def runs(self, num_runs: int) -> tuple[list[Path], float]:
        """
        Folders of recorded runs, and the CPU seconds of training those beside the first, which is the recorded one.

        The others have the seeds 100, 101, ...: neither its own nor the truth's.
        """
        others = range(FIRST_OTHER_SEED, FIRST_OTHER_SEED + num_runs - 1)
        seconds = sum(self._record_other(seed) for seed in others)
        return [self.folder, *(self._other_folder(seed) for seed in others)], seconds

    def synset(self, config: DistillationConfig, *, num_runs: int = 1) -> tuple[Synset, float]:
        """
        A synset, distilled at most once, and its CPU seconds; of several runs, with the training of the others.
        """
        config = replace(config, max_memory=self.task.max_memory)
        folders, seconds = self.runs(num_runs)
        key = (config, num_runs)
        if key not in self._synsets:
            with Meter() as meter:
                synset = ReverseGradientMatchingDistiller(
                    self.model,
                    folders,
                    self.task.train,
                    self.task.clusters,
                    config=config,
                    disable_tqdm=True,
                ).distill()
            self._synsets[key] = synset, meter
        synset, meter = self._synsets[key]
        self.reused_bytes = max(self.reused_bytes, meter.peak_bytes)
        return synset, seconds + meter.cpu_seconds

    def _other_folder(self, seed: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{seed}")

    def _record_other(self, seed: int) -> float:
        """Records a training with another seed, once, and gives the seconds it took."""
        if seed not in self._others:
            callback = TrajectoryCallback(self._other_folder(seed), num_states=self.num_states, dtype=torch.float32)
            trainer = self.task.build_trainer(self.task.train, seed, callbacks=[callback])
            with Meter() as meter:
                trainer.train()
            self._others[seed] = meter.cpu_seconds
        return self._others[seed]


def synset_bytes(synset: Synset) -> int:
    """Size of the folder a synset is saved to."""
    with tempfile.TemporaryDirectory() as parent:
        return folder_bytes(synset.save_pretrained(Path(parent) / "synset"))


@dataclass
class Prediction:
    """
    What a method says about some queries.

    Args:
        cluster_scores (`np.ndarray`): `(num_queries, num_clusters)`.
        row_scores (`np.ndarray`, *optional*): `(num_queries, num_rows)`.
        cluster_subset_values (`np.ndarray`, *optional*): `(num_queries, num_cluster_masks)`, for methods that predict
            the objective of a subset directly; sums of cluster scores otherwise.
        outputs (`dict[str, np.ndarray]`, *optional*): For methods that give perturbed models: their logits under each
            of [`Task.distance_masks`], `(num_masks, num_queries, num_labels)`.
        offline_seconds, online_seconds (`float`): CPU time before any query is known, and of all cluster scores (and
            row scores, if any) of these queries after.
        model_seconds (`float`, *optional*): Cost of one perturbed model, evaluated on these queries.
        stages (`dict[str, float]`): CPU time of each stage by itself, by name.
        details (`dict`): What else to keep, JSON-safe; `kept_bytes` among them is what a user must store between the
            offline and the online part, beside the trained model and the training rows.
    """

    cluster_scores: np.ndarray
    row_scores: np.ndarray | None = None
    cluster_subset_values: np.ndarray | None = None
    outputs: dict[str, np.ndarray] | None = None
    offline_seconds: float = 0.0
    online_seconds: float = 0.0
    model_seconds: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


Method = Callable[[Recorded, Dataset], Prediction]
"""Scores some queries, given the recorded run."""


@dataclass(frozen=True)
class Entrant:
    """
    A method as it enters the benchmark.

    Args:
        name (`str`): In results and tables.
        family (`str`): The group it is shown in.
        grid (`Mapping[str, Method]`): Setting to method. Of several settings, the best on the tuning queries is
            scored on the reported ones.
        dear (`bool`, *optional*, defaults to `False`): Queries are dear, so that tasks may ask for fewer of them
            ([`Task.num_dear_queries`]).
    """

    name: str
    family: str
    grid: Mapping[str, Method]
    dear: bool = False
