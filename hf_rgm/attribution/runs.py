"""Scores of clusters and replays along one recorded run, by any engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_rgm.attribution.adjoint import AdjointEngine
from hf_rgm.attribution.linearized import LinearizedReplayEngine
from hf_rgm.attribution.memory import MemoryShares
from hf_rgm.attribution.objectives import Objective, Queries
from hf_rgm.attribution.perturbations import leave_one_out, random_subsets, ridge_scores
from hf_rgm.attribution.query_gradients import QueryGradients
from hf_rgm.attribution.replays import Replayed, Replays, check_engine, check_rows
from hf_rgm.attribution.training_rows import TrainingRows
from hf_rgm.synset.costs import CostEstimate, PieceOfWork, measured

EMPTY_RESULT_BYTES = 16_000


def check_options(engine: str, *, rows: Any, num_masks: int | None) -> None:
    """Raises a `ValueError` unless an engine is known and can make use of rows and masks, where they are given."""
    check_engine(engine)
    if rows is not None:
        check_rows(engine)
    if num_masks is not None and engine == "adjoint":
        raise ValueError(f'`num_masks` = {num_masks} is for replay engines; `engine="adjoint"` needs no masks.')
    if num_masks is not None and num_masks < 2:
        raise ValueError(f"`num_masks` must be at least 2, got {num_masks}. Use several times the clusters.")


class RecordedRun:
    """
    One recorded run as seen through a synset.

    Args:
        replays (`Replays`): Its replays; the adjoint shares their model, memory and processes.
    """

    def __init__(self, replays: Replays) -> None:
        self.replays = replays
        self.model = replays.model
        self.clusters = replays.clusters
        self.trajectory = replays.trajectory
        self.final = replays.final
        self._processes = replays.processes

    def adjoint_engine(self, rows: TrainingRows | None = None, **settings: Any) -> AdjointEngine:
        """Builds the adjoint engine."""
        return AdjointEngine(
            *self.replays.parts,
            rows=None if rows is None else rows.sample,
            max_bytes=self.replays.max_bytes,
            **settings,
        )

    def query_gradients(self, objective: Objective, queries: Queries, num_values: int) -> QueryGradients:
        """Gradients of the objective at the end of the run."""
        shares = MemoryShares.of(self.replays.max_bytes, with_rows=True)
        return QueryGradients(
            self.model, objective, self.final, queries, num_values=num_values, max_bytes=shares.gradients
        )

    def scores(
        self,
        engine: str,
        objective: Objective,
        queries: Queries,
        *,
        rows: TrainingRows | None,
        num_masks: int | None,
        seed: int,
        **settings: Any,
    ) -> Replayed:
        """Scores of clusters by an engine, `(num_values, num_clusters)`; see [`Attributor.attribute`]."""
        if engine == "adjoint":
            adjoint = self.adjoint_engine(**settings)
            values = objective.values(self.model, self.final, queries)
            gradients = self.query_gradients(objective, queries, len(values))
            parts = self._processes.parts(len(values), at_most=adjoint.queries_at_once)
            found = self._processes.map(lambda part: adjoint.cluster_scores(gradients(part)).cpu(), parts)
            return Replayed(torch.cat(found), adjoint.start, adjoint.path.stride)
        num_clusters = self.clusters.num_clusters
        if num_masks is not None:
            masks = random_subsets(num_clusters, num_masks, seed=seed)
            found = self.replayed_values(engine, objective, queries, masks, rows=rows, **settings)
            return replace(found, values=ridge_scores(masks, found.values))
        masks = leave_one_out(num_clusters)
        if engine == "plain_replay":  # without any perturbation it is not the trained model
            masks = torch.cat([masks, torch.ones(1, num_clusters)])
        found = self.replayed_values(engine, objective, queries, masks, rows=rows, **settings)
        everything = objective.values(self.model, self.final, queries).cpu()
        if engine == "plain_replay":
            everything = found.values[-1]
        return replace(found, values=(everything - found.values[:num_clusters]).T)

    def replayed_values(
        self,
        engine: str,
        objective: Objective,
        queries: Queries,
        masks: Tensor,
        *,
        rows: TrainingRows | None,
        **settings: Any,
    ) -> Replayed:
        """The objective of models replayed under cluster weights; see [`Replays.values`]."""
        gradients = None
        if engine == "linearized_replay" and objective.differentiable:
            count = len(objective.values(self.model, self.final, queries))
            gradients = self.query_gradients(objective, queries, count)
        return self.replays.values(engine, objective, queries, masks, gradients=gradients, rows=rows, **settings)

    def estimate(
        self,
        engine: str,
        objective: Objective,
        queries: Queries,
        *,
        num_queries: int,
        rows: TrainingRows | None,
        num_masks: int | None,
        **settings: Any,
    ) -> CostEstimate:
        """
        What [`RecordedRun.scores`], and scores of rows, take: from a little of each part of the work.

        Args:
            num_queries (`int`): How many queries there will be; those that are given stand for them.
        """
        values = measured(lambda: objective.values(self.model, self.final, queries))
        count = len(objective.values(self.model, self.final, queries))
        more, processes = num_queries / len(queries), self._processes.count
        num_values = round(count * more) if count == len(queries) else count
        stages = []
        with_gradients = engine == "linearized_replay" or rows is not None
        if engine == "adjoint" or (objective.differentiable and with_gradients):
            taken = measured(lambda: objective.gradients(self.model, self.final, queries))
            stages.append(PieceOfWork(more * taken.seconds, round(more * taken.peak_bytes)))
        held = 4 * num_values * self.model.num_parameters if stages else 0
        scored_rows = len(rows.reader) if rows is not None and objective.differentiable else 0
        blocks = 1
        if scored_rows and rows is not None:
            adjoint = self.adjoint_engine(rows, **adjoint_settings(engine, settings))
            own = -(-scored_rows // processes)
            stages.append(adjoint.costs(num_values, rows.reader, rows.row_loss, num_rows=own))
            blocks = -(-num_values // adjoint.queries_at_once)
        elif engine == "adjoint":
            adjoint = self.adjoint_engine(**settings)
            stages.append(adjoint.costs(-(-num_values // processes), None))
            blocks = -(-num_values // adjoint.queries_at_once)
        if engine != "adjoint":
            replay = self.replays.engine(engine, rows=rows, **settings)
            masks = -(-(num_masks or self.clusters.num_clusters) // processes)
            stages.append(replay.costs(masks, None if rows is None else rows.cost_of_gradients(self.final)))
            if not (isinstance(replay, LinearizedReplayEngine) and objective.differentiable):
                stages.append(PieceOfWork(masks * more * values.seconds, round(more * values.peak_bytes)))
            blocks = -(-masks // replay.batch_size)
        return CostEstimate(
            seconds=sum(stage.seconds for stage in stages),
            memory_bytes=held + max(stage.peak_bytes for stage in stages),
            # The matrices; scores of clusters once more as a table; the cards, settings and footers of any result.
            disk_bytes=4 * num_values * (2 * self.clusters.num_clusters + scored_rows) + EMPTY_RESULT_BYTES,
            num_blocks=blocks,
        )


def adjoint_settings(engine: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the adjoint that scores rows: beside a replay it goes back as far as was asked for, at its own pace."""
    return settings if engine == "adjoint" else {name: value for name, value in settings.items() if name == "rewind"}
