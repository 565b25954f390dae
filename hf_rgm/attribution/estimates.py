"""Estimated cost of an attribution, from a little of each part of the work."""

from __future__ import annotations

import math

from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.request import Evaluation
from hf_rgm.engines.row_scores import cost_of_row_scores
from hf_rgm.model.cost_estimates import CostEstimate, PieceOfWork, measured

EMPTY_RESULT_BYTES = 16_000


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
