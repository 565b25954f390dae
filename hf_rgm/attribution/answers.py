"""Results from the scores of each recorded run: means over runs, scores of rows, names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_rgm.attribution.subject import Subject
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.engine import Engine, Outcome
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.request import Evaluation
from hf_rgm.engines.row_scores import RowScorer, ScoreFolder, cluster_sums, scores_identity
from hf_rgm.results.result import AttributionResult


def from_rows(engine: type[Engine], evaluation: Evaluation) -> bool:
    """Whether clusters' scores are sums of their rows' scores: those of the adjoint, where there are rows."""
    return engine is AdjointEngine and evaluation.run.rows is not None


def completed(
    engine: type[Engine],
    evaluations: Sequence[Evaluation],
    by_run: Sequence[Outcome],
    subject: Subject,
    *,
    query_ids: Sequence[Any] | None,
    output_dir: str | Path | None,
    disable_tqdm: bool,
) -> AttributionResult:
    """Result from the clusters' scores by run, with scores of rows if there are any; `by_run` is empty `from_rows`."""
    run, request = evaluations[0].run, evaluations[0].request
    values, row_scores, rewinds = evaluations[0].values, None, []
    if run.rows is not None and (request.objective.differentiable or not by_run):
        rewinds = [AdjointEngine.rewind if request.rewind is None else request.rewind] * len(evaluations)
        if issubclass(engine, LinearEngine) and by_run:  # from where clusters are trusted
            rewinds = [
                found.start / own.run.trajectory.num_steps for found, own in zip(by_run, evaluations, strict=True)
            ]
        folder = None
        if output_dir is not None:
            folder = ScoreFolder(output_dir, scores_identity(evaluations, rewinds, subject.samples_sha256))
        row_scores = RowScorer(evaluations, rewinds, disable_tqdm=disable_tqdm).scores(folder)
    if by_run:
        scores = torch.stack([found.values for found in by_run]).mean(0)
        start, drift = by_run[0].start, by_run[0].drift
    elif row_scores is not None:
        scores, start, drift = cluster_sums(row_scores, subject.clusters), run.path(rewinds[0]).start, None
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
            "model": subject.model_description,
            "fidelity": subject.fidelity,
            "parameters_sha256": subject.parameters_sha256,
        },
    )
