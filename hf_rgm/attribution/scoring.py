"""From a question to an attribution: scores of clusters and rows, by all recorded runs together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_rgm.attribution.objectives import Objective, Queries
from hf_rgm.attribution.result import AttributionResult
from hf_rgm.attribution.row_scores import RowScorer, ScoreFolder, cluster_sums
from hf_rgm.attribution.runs import RecordedRun, adjoint_settings
from hf_rgm.attribution.training_rows import TrainingRows
from hf_rgm.modeling import FunctionalModel
from hf_rgm.processes import Processes
from hf_rgm.synset.synset import Synset


@dataclass(frozen=True)
class Question:
    """
    What is asked of a synset; see [`Attributor.attribute`].

    Args:
        engine (`str`): Name of the engine.
        objective (`Objective`): What to explain.
        queries (`Queries`): The queries.
        rows (`TrainingRows`, *optional*): The training rows.
        num_masks (`int`, *optional*): Random masks of a replay.
        seed (`int`): Of the masks.
        settings (`dict`): `rewind` and `stride`, where they are given.
    """

    engine: str
    objective: Objective
    queries: Queries
    rows: TrainingRows | None = None
    num_masks: int | None = None
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def scores_rows(self) -> bool:
        """Whether rows get scores: there are some, and the objective has a gradient."""
        return self.rows is not None and (self.objective.differentiable or self.engine == "adjoint")


def answer(
    question: Question,
    synset: Synset,
    model: FunctionalModel,
    runs: Sequence[RecordedRun],
    processes: Processes,
    *,
    query_ids: Sequence[Any] | None,
    output_dir: str | Path | None,
    disable_tqdm: bool,
) -> AttributionResult:
    """
    Scores of clusters, and of rows where there are any: means over the recorded runs.

    Args:
        question (`Question`): What is asked.
        synset (`Synset`): Whom.
        model (`FunctionalModel`): The trained model, within its `differentiable()`.
        runs (`Sequence[RecordedRun]`): The recorded runs, the model's own first.
        processes (`Processes`): Who does the work.
        query_ids (`Sequence`, *optional*): Names of the queries. Defaults to their positions.
        output_dir (`str` or `Path`, *optional*): Where scores of rows go as they come.
        disable_tqdm (`bool`): No progress bars.
    """
    objective, queries = question.objective, question.queries
    values = objective.values(model, model.space.flatten(model.parameters()), queries)
    row_scores = None
    if question.scores_rows and question.rows is not None:
        row_scores = _row_scores(question, question.rows, synset, runs, processes, output_dir, disable_tqdm)
    if row_scores is not None and question.engine == "adjoint":
        scores = cluster_sums(row_scores, synset.clusters)
        first = runs[0].adjoint_engine(**question.settings)
        start, stride, drift = first.start, first.path.stride, None
    else:
        by_run = [
            run.scores(
                question.engine,
                objective,
                queries,
                rows=question.rows,
                num_masks=question.num_masks,
                seed=question.seed,
                **question.settings,
            )
            for run in runs
        ]
        scores = torch.stack([found.values for found in by_run]).mean(0)
        start, stride, drift = by_run[0].start, by_run[0].stride, by_run[0].drift
    if query_ids is None:
        per_query = len(values) == len(queries)
        query_ids = range(len(values)) if per_query else [f"{objective.name} {i}" for i in range(len(values))]
    return AttributionResult(
        scores=scores.numpy(),
        row_scores=row_scores,
        cluster_names=synset.clusters.names,
        cluster_sizes=synset.clusters.sizes,
        cluster_ids=synset.clusters.cluster_ids,
        query_ids=list(query_ids),
        objective=objective.name,
        objective_values=values.cpu().numpy(),
        engine=question.engine,
        metadata={
            "rewind_step": start,
            "stride": stride,
            "drift": drift,
            "num_steps": synset.trajectory.num_steps,
            "num_runs": len(runs),
            "num_masks": question.num_masks,
            "used_rows": question.rows is not None,
            "model": synset.model_description,
            "fidelity": synset.fidelity,
            "parameters_sha256": synset.parameters_sha256,
        },
    )


def replayed_values(
    model: FunctionalModel,
    runs: Sequence[RecordedRun],
    engine: str,
    objective: Objective,
    queries: Queries,
    masks: Tensor,
    rows: TrainingRows | None,
    settings: dict[str, Any],
) -> NDArray[np.float32]:
    """The objective of models replayed along each run, mean over runs; see [`Attributor.replayed_values`]."""
    values = objective.values(model, model.space.flatten(model.parameters()), queries).cpu()
    by_run = []
    for run in runs:
        replayed = run.replayed_values(engine, objective, queries, masks, rows=rows, **settings).values
        if engine != "plain_replay" and run is not runs[0]:
            replayed = values + replayed - objective.values(model, run.final, queries).cpu()
        by_run.append(replayed)
    return torch.stack(by_run).mean(0).numpy()


def _row_scores(
    question: Question,
    rows: TrainingRows,
    synset: Synset,
    runs: Sequence[RecordedRun],
    processes: Processes,
    output_dir: str | Path | None,
    disable_tqdm: bool,
) -> NDArray[np.float32]:
    settings = adjoint_settings(question.engine, question.settings)
    engines = [run.adjoint_engine(rows, **settings) for run in runs]
    gradients = []
    for run in runs:
        num_values = len(question.objective.values(run.model, run.final, question.queries))
        gradients.append(run.query_gradients(question.objective, question.queries, num_values))
    scorer = RowScorer(engines, gradients, rows, processes, disable_tqdm=disable_tqdm)
    folder = None
    if output_dir is not None:
        identity = {
            "parameters_sha256": synset.parameters_sha256,
            "samples_sha256": synset.samples_sha256,
            "dataset_fingerprint": synset.trajectory.dataset_fingerprint,
            "paths": [
                [len(run.trajectory.state_steps), e.start, e.path.stride] for run, e in zip(runs, engines, strict=True)
            ],
            "objective": question.objective.name,
            "queries": _digest({**question.queries.inputs, "labels": question.queries.labels}),
            "labels_per_row": rows.row_loss.labels_per_row,
            "label_smoothing": rows.row_loss.label_smoothing,
        }
        folder = ScoreFolder(output_dir, identity)
    return scorer.scores(folder)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
