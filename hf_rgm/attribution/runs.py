"""Scores and replays along one recorded run, by any engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rgm.attribution.adjoint import AdjointEngine
from hf_rgm.attribution.curvature import WeightedInputs, sample_rows
from hf_rgm.attribution.linearized import LinearizedReplayEngine
from hf_rgm.attribution.objectives import Objective, Queries
from hf_rgm.attribution.perturbations import leave_one_out, random_subsets, ridge_scores
from hf_rgm.attribution.replay import ReplayEngine
from hf_rgm.clusters import ClusterMap
from hf_rgm.losses import RowLoss
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import CachedBatches, DataCollator, RowReader
from hf_rgm.synset.costs import CostEstimate, PieceOfWork, measured
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.matching import SynsetGradients
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.synset.synset import Synset
from hf_rgm.synset.targets import cluster_gradients, measure_rows
from hf_rgm.trajectory.storage import Trajectory

logger = logging.getLogger(__name__)

REPLAY_ENGINES = ("linearized_replay", "replay", "plain_replay")
ENGINES = ("adjoint", *REPLAY_ENGINES)
ENGINES_OF_ROWS = ("adjoint", "linearized_replay")
ROWS_AT_ONCE = 256
EMPTY_RESULT_BYTES = 16_000


def check_engine(engine: str, known: tuple[str, ...] = ENGINES) -> None:
    """Raises a `ValueError` that names the known engines."""
    if engine not in known:
        raise ValueError(f"Unknown engine {engine!r}. Use one of {', '.join(known)}.")


def check_options(engine: str, *, rows: Any, num_masks: int | None) -> None:
    """Raises a `ValueError` unless an engine is known and can make use of rows and masks, where they are given."""
    check_engine(engine)
    if rows is not None and engine not in ENGINES_OF_ROWS:
        raise ValueError(f"`rows` are for engines {' and '.join(ENGINES_OF_ROWS)}, got {engine!r}.")
    if num_masks is not None and engine == "adjoint":
        raise ValueError(f'`num_masks` = {num_masks} is for replay engines; `engine="adjoint"` needs no masks.')
    if num_masks is not None and num_masks < 2:
        raise ValueError(f"`num_masks` must be at least 2, got {num_masks}. Use several times the clusters.")


def read_training_rows(
    synset: Synset, model: FunctionalModel, row_loss: RowLoss, rows: Any, data_collator: DataCollator | None
) -> RowReader:
    """
    Reads the rows a synset was distilled from.

    Raises:
        ValueError: If they are other rows, or the synset has a loss that `row_loss` lacks.
    """
    if synset.metadata.get("custom_row_loss") and row_loss.function is None:
        raise ValueError(
            "The synset was distilled with a `row_loss` of its own, which rows are scored by. Pass the same "
            "function as `row_loss`."
        )
    reader = RowReader(rows, model, data_collator=data_collator)
    synset.clusters.check_num_rows(len(reader))
    synset.trajectory.check_dataset(rows, what="rows")
    return reader


def warn_unless_matched(synset: Synset) -> None:
    """Warns where most clusters' synthetic gradients are no nearer to the data's than none at all would be."""
    for matched, residuals in zip(synset.matched_states, synset.residuals, strict=True):
        if float(residuals.median()) >= 1:
            logger.warning(
                "At %s the synthetic samples of most clusters match the data's gradients no better than no samples "
                "would (relative squared error %.3g): scores will be noise. Distil again with more "
                "`samples_per_cluster` or `num_iterations`, or record a run with a lower learning rate.",
                matched,
                float(residuals.median()),
            )
            return


@dataclass(frozen=True)
class RunScores:
    """
    Scores by one recorded run.

    Args:
        scores (`Tensor`): `(num_values, num_clusters)`.
        row_scores (`Tensor`, *optional*): `(num_values, num_rows)`.
        start, stride (`int`): First training step and steps per integration step of the engine.
    """

    scores: Tensor
    row_scores: Tensor | None
    start: int
    stride: int


class RecordedRun:
    """
    One recorded run as seen through a synset.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        inputs (`InputSpace`): The space of the synthetic inputs.
        samples (`SyntheticSamples`): The synset's samples, on the model's device.
        clusters (`ClusterMap`): The clusters of the training rows.
        trajectory (`Trajectory`): The recorded run.
        row_loss (`RowLoss`): The loss of a training row.
        disable_tqdm (`bool`): No progress bars.
    """

    def __init__(
        self,
        model: FunctionalModel,
        inputs: InputSpace,
        samples: SyntheticSamples,
        clusters: ClusterMap,
        trajectory: Trajectory,
        row_loss: RowLoss,
        *,
        disable_tqdm: bool,
    ) -> None:
        self.model = model
        self.clusters = clusters
        self.disable_tqdm = disable_tqdm
        self.final = model.space.flatten(trajectory.final.parameters).to(model.device)
        self.row_loss = row_loss
        self._parts = (model, inputs, samples, trajectory)

    def replay_engine(
        self, name: str, *, row_reader: RowReader | None = None, **settings: Any
    ) -> LinearizedReplayEngine | ReplayEngine:
        """
        Builds a replay engine: `"linearized_replay"`, `"replay"` (anchored) or `"plain_replay"`.

        Raises:
            ValueError: If there is no such replay engine, or it cannot make use of rows.
        """
        check_engine(name, REPLAY_ENGINES)
        if row_reader is not None and name not in ENGINES_OF_ROWS:
            raise ValueError(f"`rows` are for engines {' and '.join(ENGINES_OF_ROWS)}, got {name!r}.")
        settings["disable_tqdm"] = self.disable_tqdm
        if name == "linearized_replay":
            if row_reader is not None:
                settings["cluster_gradients"] = self._cluster_gradients(row_reader)
                settings["rows"] = self._sample(row_reader)
            return LinearizedReplayEngine(*self._parts, **settings)
        return ReplayEngine(*self._parts, anchored=name == "replay", **settings)

    def scores(
        self,
        engine: str,
        objective: Objective,
        queries: Queries,
        *,
        row_reader: RowReader | None,
        num_masks: int | None,
        seed: int,
        **settings: Any,
    ) -> RunScores:
        """
        Scores of clusters by an engine, and of rows by the adjoint where there are rows and the objective has a
        gradient; see [`Attributor.attribute`] for the arguments.
        """
        if engine == "adjoint":
            gradients = self._objective_gradients(objective, queries)
            rows = None if row_reader is None else self._sample(row_reader)
            adjoint = AdjointEngine(*self._parts, rows=rows, **settings)
            if row_reader is None:
                return RunScores(adjoint.cluster_scores(gradients), None, adjoint.start, adjoint.path.stride)
            row_scores = adjoint.row_scores(gradients, row_reader, self.row_loss)
            return RunScores(self._sum_by_cluster(row_scores), row_scores, adjoint.start, adjoint.path.stride)
        row_scores = None
        if row_reader is not None and objective.differentiable:
            gradients = self._objective_gradients(objective, queries)
            adjoint = self._adjoint_of_rows(row_reader, settings)
            row_scores = adjoint.row_scores(gradients, row_reader, self.row_loss)
        replay = self.replay_engine(engine, row_reader=row_reader, **settings)
        scores = self._replayed_scores(replay, objective, queries, num_masks, seed)
        return RunScores(scores, row_scores, replay.start, replay.path.stride)

    def estimate(
        self,
        engine: str,
        objective: Objective,
        queries: Queries,
        *,
        num_queries: int,
        row_reader: RowReader | None,
        num_masks: int | None,
        **settings: Any,
    ) -> CostEstimate:
        """
        What [`RecordedRun.scores`] takes, from a little of each part of the work.

        Args:
            num_queries (`int`): How many queries there will be; those that are given stand for them.
        """
        values = measured(lambda: objective.values(self.model, self.final, queries))
        count = len(objective.values(self.model, self.final, queries))
        more = num_queries / len(queries)
        num_values = round(count * more) if count == len(queries) else count
        stages = []
        if engine == "adjoint" or (objective.differentiable and engine in ENGINES_OF_ROWS):
            taken = measured(lambda: objective.gradients(self.model, self.final, queries))
            stages.append(PieceOfWork(more * taken.seconds, round(more * taken.peak_bytes)))
        held = 4 * num_values * self.model.num_parameters if stages else 0
        if engine == "adjoint":
            rows = None if row_reader is None else self._sample(row_reader)
            adjoint = AdjointEngine(*self._parts, rows=rows, **settings)
            stages.append(adjoint.costs(num_values, row_reader, self.row_loss))
            blocks = -(-num_values // adjoint.queries_at_once)
        else:
            if row_reader is not None and objective.differentiable:
                stages.append(self._adjoint_of_rows(row_reader, settings).costs(num_values, row_reader, self.row_loss))
            replay = self.replay_engine(engine, row_reader=row_reader, **settings)
            masks = num_masks or self.clusters.num_clusters
            if isinstance(replay, LinearizedReplayEngine):
                stages.append(replay.costs(masks, self._cost_of_gradients(row_reader)))
            else:
                stages.append(replay.costs(masks))
            if not (isinstance(replay, LinearizedReplayEngine) and objective.differentiable):
                stages.append(PieceOfWork(masks * more * values.seconds, round(more * values.peak_bytes)))
            blocks = -(-masks // replay.batch_size)
        scored_rows = len(row_reader) if row_reader is not None and objective.differentiable else 0
        return CostEstimate(
            seconds=sum(stage.seconds for stage in stages),
            memory_bytes=held + max(stage.peak_bytes for stage in stages),
            # The matrices; scores of clusters once more as a table; the cards, settings and footers of any result.
            disk_bytes=4 * num_values * (2 * self.clusters.num_clusters + scored_rows) + EMPTY_RESULT_BYTES,
            num_blocks=blocks,
        )

    def replayed_values(
        self, engine: LinearizedReplayEngine | ReplayEngine, objective: Objective, queries: Queries, masks: Tensor
    ) -> Tensor:
        """
        The objective of models replayed under cluster weights `(num_masks, num_clusters)`.

        Linearised replay is of first order in the objective too, where it has a gradient: the deviations of random
        halves are large, and a margin far from where the deviation was computed says less than its derivative.
        """
        if isinstance(engine, LinearizedReplayEngine) and objective.differentiable:
            gradients = self._objective_gradients(objective, queries)
            deviations = torch.cat([engine.deviations(chunk) for chunk in masks.split(engine.batch_size)])
            return objective.values(self.model, self.final, queries) + deviations @ gradients.T
        values = [
            objective.values(self.model, vector, queries)
            for chunk in masks.split(engine.batch_size)
            for vector in engine.parameters(chunk)
        ]
        return torch.stack(values)

    def _replayed_scores(
        self,
        engine: LinearizedReplayEngine | ReplayEngine,
        objective: Objective,
        queries: Queries,
        num_masks: int | None,
        seed: int,
    ) -> Tensor:
        num_clusters = self.clusters.num_clusters
        if num_masks is not None:
            masks = random_subsets(num_clusters, num_masks, seed=seed)
            return ridge_scores(masks, self.replayed_values(engine, objective, queries, masks).cpu())
        without = self.replayed_values(engine, objective, queries, leave_one_out(num_clusters))
        if engine.anchored:
            everything = objective.values(self.model, self.final, queries)
        else:
            everything = self.replayed_values(engine, objective, queries, torch.ones(1, num_clusters))[0]
        return (everything - without).T

    def _objective_gradients(self, objective: Objective, queries: Queries) -> Tensor:
        gradients = objective.gradients(self.model, self.final, queries)
        flat = int((gradients == 0).all(1).sum())
        if flat == len(gradients):
            raise ValueError(
                f"Objective {objective.name!r} has a gradient of zero everywhere: the adjoint would score everything "
                '0. Declare it `differentiable=False` and use `engine="linearized_replay"`.'
            )
        if flat:
            logger.warning(
                "Objective %r has a gradient of zero for %d of its values: their scores are 0.", objective.name, flat
            )
        return gradients

    def _adjoint_of_rows(self, reader: RowReader, settings: dict[str, Any]) -> AdjointEngine:
        """The engine that scores rows beside a replay, as far back as was asked for."""
        rewind = {name: value for name, value in settings.items() if name == "rewind"}
        return AdjointEngine(*self._parts, rows=self._sample(reader), **rewind)

    def _cost_of_gradients(self, reader: RowReader | None) -> PieceOfWork:
        """What the cluster gradients at one state take."""
        held = 4 * self.clusters.num_clusters * self.model.num_parameters
        if reader is not None:
            clusters = range(self.clusters.num_clusters)
            batches = CachedBatches(reader, [self.clusters.rows(k) for k in clusters], batch_size=ROWS_AT_ONCE)
            with torch.enable_grad():
                row = measure_rows(self.model, self.final, batches, self.row_loss)
            return PieceOfWork(row.seconds * len(reader), row.peak_bytes + held, held)
        model, inputs, samples, _ = self._parts
        gradients, parameters = SynsetGradients(model, inputs), model.space.unflatten(self.final)
        gradients(parameters, samples)  # decides how to vectorise
        return measured(lambda: gradients(parameters, samples))

    def _cluster_gradients(self, reader: RowReader) -> Callable[[Tensor], Tensor]:
        clusters = range(self.clusters.num_clusters)
        batches = CachedBatches(reader, [self.clusters.rows(k) for k in clusters], batch_size=ROWS_AT_ONCE)

        def gradients(state: Tensor) -> Tensor:
            with torch.enable_grad():
                return cluster_gradients(self.model, [state], batches, clusters, len(reader), self.row_loss)[0]

        return gradients

    def _sample(self, reader: RowReader) -> WeightedInputs:
        at_least = self._parts[2].log_weights.shape[1]
        return sample_rows(self.model, reader, self.clusters, self.row_loss, at_least=at_least)

    def _sum_by_cluster(self, row_scores: Tensor) -> Tensor:
        ids = torch.tensor(self.clusters.cluster_ids, device=row_scores.device)
        result = torch.zeros(len(row_scores), self.clusters.num_clusters, device=row_scores.device)
        return result.index_add_(1, ids, row_scores)
