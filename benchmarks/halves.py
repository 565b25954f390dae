"""One training, recorded with several numbers of states, and random halves of its clusters to replay along it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import truth as ground_truth
from benchmarks.recorded import RECORDED_SEED
from hf_rgm import TrajectoryCallback
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.fidelity.scores import linear_datamodeling_score, noise_ceiling
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import RowReader
from hf_rgm.trajectory import Trajectory


class RecordedHalves:
    """
    A training of a task and retrainings on the first half-masks of its clusters, by the tuning queries.

    Args:
        name (`str`): The task.
        folder (`Path`): For the recordings.
        num_states (`Collection[int]`): Numbers of states; the one training is recorded with each of them.
        num_masks, num_queries (`int`): How many half-masks and tuning queries.
    """

    def __init__(
        self, name: str, folder: Path, num_states: Collection[int], *, num_masks: int, num_queries: int
    ) -> None:
        self.task = ground_truth.load_task(name)
        self.truth = ground_truth.first_halves(self.task, num_masks, num_queries)
        folders = {count: folder / str(count) for count in num_states}
        callbacks = [TrajectoryCallback(path, num_states=count) for count, path in folders.items()]
        trainer = self.task.build_trainer(self.task.train, RECORDED_SEED, callbacks=callbacks)
        trainer.train()
        self.trainer_model: Any = trainer.model
        self.model = FunctionalModel(self.trainer_model)
        self.trajectories = {count: Trajectory.load(path) for count, path in folders.items()}
        reader = RowReader(self.task.tuning_queries.select(range(self.truth.shape[1])), self.model, what="queries")
        self.queries, self.objective = (
            Queries(*reader.batch(range(len(reader)))),
            resolve_objective(self.task.objective),
        )
        masks, sizes = self.task.cluster_masks()[:num_masks], self.task.clusters.sizes
        self.weights: Tensor = torch.from_numpy(masks * sizes.sum() / (masks @ sizes)[:, None]).float()
        """`(num_masks, num_clusters)`: those that are kept stand for as many rows as there were."""

    def noise_ceiling(self) -> dict[str, Any]:
        """What retraining with another seed reaches."""
        return vars(noise_ceiling(self.truth, linear_datamodeling_score))

    def agreement(self, values: np.ndarray | Tensor) -> dict[str, Any]:
        """LDS of clusters of values `(num_masks, num_queries)`, with its interval."""
        return vars(linear_datamodeling_score(np.asarray(values).T, self.truth.mean(0)))

    def models(self, ends: Tensor) -> dict[str, Any]:
        """Agreement of models `(num_masks, num_parameters)`, and how far they are from the trained one in the mean."""
        final = self.model.space.flatten(self.model.parameters())
        values = torch.stack([self.objective.values(self.model, end, self.queries) for end in ends])
        return {
            "lds_clusters": self.agreement(values),
            "mean_deviation": float((ends - final).norm(dim=1).mean()),
        }
