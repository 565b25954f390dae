"""From a request to a result: scores of clusters and rows by all recorded runs together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_rgm.attribution.subject import Subject
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.engine import Engine, Outcome
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.recorded_run import RecordedRun
from hf_rgm.engines.request import Evaluation, Request
from hf_rgm.engines.row_scores import RowScorer, ScoreFolder, cluster_sums, scores_identity
from hf_rgm.results.result import AttributionResult


def answer(
    engine: type[Engine],
    request: Request,
    runs: Sequence[RecordedRun],
    subject: Subject,
    *,
    query_ids: Sequence[Any] | None,
    output_dir: str | Path | None,
    disable_tqdm: bool,
) -> AttributionResult:
    """
    Scores of clusters, and of rows where there are any: means over the recorded runs.

    Args:
        engine (`type[Engine]`): What scores the clusters.
        request (`Request`): What is asked.
        runs (`Sequence[RecordedRun]`): The recorded runs, the model's own first; the model within its
            `differentiable()`.
        subject (`Subject`): What is known of them.
        query_ids (`Sequence`, *optional*): Names of the queries. Defaults to their positions.
        output_dir (`str` or `Path`, *optional*): Where scores of rows go block by block.
        disable_tqdm (`bool`): No progress bars.
    """
    objective, has_rows = request.objective, runs[0].rows is not None
    evaluations = [Evaluation(run, request) for run in runs]
    values, row_scores, outcome = evaluations[0].values, None, None
    by_run: list[Outcome] = []
    scores_rows = has_rows and (objective.differentiable or engine.name == "adjoint")
    if engine.name != "adjoint" or not scores_rows:
        by_run = [engine(run).scores(own) for run, own in zip(runs, evaluations, strict=True)]
        outcome = Outcome(torch.stack([found.values for found in by_run]).mean(0), by_run[0].start, by_run[0].drift)
    if scores_rows:
        if issubclass(engine, LinearEngine) and outcome is not None:  # from where clusters are trusted
            rewinds = [found.start / run.trajectory.num_steps for found, run in zip(by_run, runs, strict=True)]
        else:
            rewinds = [AdjointEngine.rewind if request.rewind is None else request.rewind] * len(runs)
        folder = None
        if output_dir is not None:
            folder = ScoreFolder(output_dir, scores_identity(evaluations, rewinds, subject.samples_sha256))
        row_scores = RowScorer(evaluations, rewinds, disable_tqdm=disable_tqdm).scores(folder)
        if outcome is None:
            start = runs[0].path(rewinds[0]).start
            outcome = Outcome(cluster_sums(row_scores, subject.clusters), start)
    if outcome is None:
        raise RuntimeError("Clusters are scored by the engine or by their rows.")
    if query_ids is None:
        per_query = len(values) == len(request.queries)
        query_ids = range(len(values)) if per_query else [f"{objective.name} {i}" for i in range(len(values))]
    clusters = subject.clusters
    return AttributionResult(
        scores=outcome.values.numpy(),
        row_scores=row_scores,
        cluster_names=clusters.names,
        cluster_sizes=clusters.sizes,
        cluster_ids=clusters.cluster_ids,
        query_ids=list(query_ids),
        objective=objective.name,
        objective_values=values.cpu().numpy(),
        engine=engine.name,
        metadata={
            "rewind_step": outcome.start,
            "drift": outcome.drift,
            "num_steps": subject.trajectory.num_steps,
            "num_runs": len(runs),
            "num_masks": request.num_masks,
            "used_rows": has_rows,
            "model": subject.model_description,
            "fidelity": subject.fidelity,
            "parameters_sha256": subject.parameters_sha256,
        },
    )
