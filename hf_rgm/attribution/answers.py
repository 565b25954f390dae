"""Results from the scores of each recorded run, and the estimated cost of such a result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_rgm.attribution.subject import Subject
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.engine import Engine, Outcome
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.request import Evaluation
from hf_rgm.engines.row_scores import RowScorer, ScoreFolder, cluster_sums, cost_of_row_scores, scores_identity
from hf_rgm.model.cost_estimates import CostEstimate, PieceOfWork, measured
from hf_rgm.results.result import AttributionResult
from hf_rgm.trajectory.description import FROM_CHECKPOINTS

EMPTY_RESULT_BYTES = 16_000


def rows_first(
    engine: type[Engine],
    evaluations: Sequence[Evaluation],
    subject: Subject,
    output_dir: str | Path | None,
    disable_tqdm: bool,
) -> NDArray[np.float32] | None:
    """Scores of the rows, if there are any, before those of clusters: rows' gradients add up to the clusters'."""
    run, request = evaluations[0].run, evaluations[0].request
    if run.rows is None or not (request.objective.differentiable or engine is AdjointEngine):
        return None
    following = engine if issubclass(engine, LinearEngine) else AdjointEngine  # from where clusters are trusted
    rewinds = [following(own.run).rewind_of(request) for own in evaluations]
    folder = None
    if output_dir is not None:
        folder = ScoreFolder(output_dir, scores_identity(evaluations, rewinds, subject.samples_sha256))
    return RowScorer(evaluations, rewinds, disable_tqdm=disable_tqdm).scores(folder)


def completed(
    engine: type[Engine],
    evaluations: Sequence[Evaluation],
    by_run: Sequence[Outcome],
    row_scores: NDArray[np.float32] | None,
    subject: Subject,
    query_ids: Sequence[Any] | None,
) -> AttributionResult:
    """The result of the clusters' scores by run, or where there are none of the rows'."""
    run, request, values = evaluations[0].run, evaluations[0].request, evaluations[0].values
    if by_run:
        scores = torch.stack([found.values for found in by_run]).mean(0)
        start, drift = by_run[0].start, by_run[0].drift
    elif row_scores is not None:
        start = run.path(AdjointEngine(run).rewind_of(request)).start
        scores, drift = cluster_sums(row_scores, subject.clusters), None
    else:
        raise RuntimeError("Clusters are scored by the engine or by their rows.")
    if query_ids is None:
        names = [f"{request.objective.name} {i}" for i in range(len(values))]
        query_ids = range(len(values)) if len(values) == len(request.queries) else names
    return AttributionResult(
        scores=scores.numpy(),
        row_scores=row_scores,
        cluster_names=subject.clusters.names,
        cluster_sizes=subject.clusters.sizes,
        cluster_ids=subject.clusters.cluster_ids,
        query_ids=list(query_ids),
        objective=request.objective.name,
        objective_values=values.cpu().numpy(),
        engine=engine.name,
        metadata={
            "rewind_step": start,
            "drift": drift,
            "num_steps": subject.trajectory.num_steps,
            "num_runs": len(evaluations),
            "num_masks": request.num_masks,
            "used_rows": run.rows is not None,
            "rewind": request.rewind,
            "maximize": request.objective.maximize,
            "model": subject.model_description,
            "fidelity": subject.fidelity,
            FROM_CHECKPOINTS: subject.trajectory.metadata.get(FROM_CHECKPOINTS),
            "parameters_sha256": subject.parameters_sha256,
            "samples_sha256": subject.samples_sha256,
        },
    )


def estimate(engine: type[Engine], evaluation: Evaluation, *, num_queries: int | None, num_runs: int) -> CostEstimate:
    """Cost of [`Attributor.attribute`], measured on some queries along the first recorded run."""
    run, request = evaluation.run, evaluation.request
    objective, given = request.objective, len(request.queries)
    more = (num_queries or given) / given
    values = measured(lambda: evaluation.at(run.final))
    count = len(evaluation.values)
    num_values = round(count * more) if count == given else count
    scored_rows = len(run.rows.reader) if run.rows is not None and objective.differentiable else 0
    stages, blocks = [], 1
    if objective.differentiable and (scored_rows or issubclass(engine, AdjointEngine) or not engine.is_dear):
        form = AdjointEngine(run).form
        taken = measured(lambda: evaluation.gradients(form))
        stages.append(PieceOfWork(more * taken.seconds, round(more * taken.peak_bytes)))
    held = 4 * num_values * run.form.length if stages else 0
    if scored_rows or issubclass(engine, AdjointEngine):
        adjoint = AdjointEngine(run)
        own = math.ceil(num_values / run.processes.count)
        stages.append(adjoint.costs_of_values(own, request.rewind))
        blocks = math.ceil(num_values / adjoint.queries_at_once)
        if scored_rows:
            stages.append(cost_of_row_scores(evaluation, num_values))
    if not issubclass(engine, AdjointEngine):
        replay = engine(run)
        masks = math.ceil((request.num_masks or run.clusters.num_clusters) / run.processes.count)
        stages.append(replay.costs(masks, request.rewind))
        if engine.is_dear or not objective.differentiable:
            stages.append(PieceOfWork(masks * more * values.seconds, round(more * values.peak_bytes)))
        blocks = math.ceil(masks / replay.batch_size)
    return CostEstimate(
        seconds=num_runs * sum(stage.seconds for stage in stages),
        memory_bytes=held + max(stage.peak_bytes for stage in stages),
        # The matrices; scores of clusters once more as a table; the cards, settings and footers of any result.
        disk_bytes=4 * num_values * (2 * run.clusters.num_clusters + scored_rows) + EMPTY_RESULT_BYTES,
        num_blocks=blocks,
    )
