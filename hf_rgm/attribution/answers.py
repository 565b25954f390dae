"""From the clusters' scores of each recorded run to a result: scores of rows, means over runs, names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_rgm.attribution.subject import Subject
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.request import Evaluation
from hf_rgm.engines.row_scores import RowScorer, ScoreFolder, cluster_sums, scores_identity
from hf_rgm.results.result import AttributionResult


def answer(
    engine: type[Engine],
    evaluations: Sequence[Evaluation],
    subject: Subject,
    *,
    query_ids: Sequence[Any] | None,
    output_dir: str | Path | None,
    disable_tqdm: bool,
) -> AttributionResult:
    """The scores of clusters, means over recorded runs, and of rows where there are any."""
    run, request = evaluations[0].run, evaluations[0].request
    values, row_scores = evaluations[0].values, None  # what does not fit fails before the work
    if run.rows is not None and (request.objective.differentiable or engine is AdjointEngine):
        # First, as their gradients add up to the clusters'; from where clusters are trusted.
        following = engine if issubclass(engine, LinearEngine) else AdjointEngine
        rewinds = [following(own.run).rewind_of(request) for own in evaluations]
        folder = None
        if output_dir is not None:
            folder = ScoreFolder(output_dir, scores_identity(evaluations, rewinds, subject.samples_sha256))
        row_scores = RowScorer(evaluations, rewinds, disable_tqdm=disable_tqdm).scores(folder)
    if row_scores is not None and engine is AdjointEngine:
        start = run.path(AdjointEngine(run).rewind_of(request)).start
        scores, drift = cluster_sums(row_scores, subject.clusters), None
    else:
        by_run = [engine(own.run).scores(own) for own in evaluations]
        scores = torch.stack([found.values for found in by_run]).mean(0)
        start, drift = by_run[0].start, by_run[0].drift
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
            "model": subject.model_description,
            "fidelity": subject.fidelity,
            "parameters_sha256": subject.parameters_sha256,
        },
    )
