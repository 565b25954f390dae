"""Details of the adjoint's scores: rows on themselves, single labels, modules."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.memory_shares import cluster_ranges, ranges
from hf_rgm.engines.objectives import Objective, Queries
from hf_rgm.engines.query_gradients import QueryGradients
from hf_rgm.engines.recorded_run import given
from hf_rgm.model.losses import IGNORED_LABEL
from hf_rgm.model.row_gradients import row_derivatives, row_gradients


def one_label_each(queries: Queries) -> tuple[Queries, Tensor]:
    """Queries repeated for each of their labels, all others -100; and their places, `(num_labels, 1 + positions)`."""
    places = (queries.labels != IGNORED_LABEL).nonzero()
    own, labels = places[:, 0], queries.labels[places[:, 0]]
    others = torch.ones_like(labels, dtype=torch.bool)
    others[(torch.arange(len(own)), *places[:, 1:].T)] = False
    inputs = {name: value[own] for name, value in queries.inputs.items()}
    return Queries(inputs, labels.masked_fill(others, IGNORED_LABEL)), places


def self_scores(engine: AdjointEngine, objective: Objective, rewind: float) -> Tensor:
    """Score of each row on the objective of itself, `(num_rows,)`, float32: a diagonal, without the matrix."""
    run, form, source = engine.run, engine.form, given(engine.run.rows, "the training rows")
    path, num_rows = run.path(rewind), len(source.reader)
    weights, max_bytes = source.weights(path), run.shares.gradients // 3
    first = Queries(*source.reader.batch([0]), source.row_loss.function)
    objective.values(run.model, run.final, first)  # refuses labels that it is not for

    def of_rows(rows: range) -> Tensor:
        gradients = torch.zeros(len(rows), form.length, device=run.model.device)
        for part, inputs, labels in source.batches(rows, form, max_bytes):
            asked = Queries(inputs, labels, source.row_loss.function)
            gradients[part] = objective.gradients(run.model, run.final, asked, form=form)
        directions, scores = engine.directions(gradients, rewind), torch.zeros(len(rows), device=run.model.device)
        for part, inputs, labels in source.batches(rows, form, max_bytes):
            for state, direction in directions.items():
                named = form.named(path.state(state))
                own = row_gradients(run.model, named, inputs, labels, source.row_loss, form)
                weight = weights[state][rows.start + part] if weights else 1.0
                scores[part] += (direction[part] * own).sum(1) * weight / num_rows
        return scores.cpu()

    parts = run.processes.parts(num_rows, at_most=engine.queries_at_once)
    return torch.cat(run.processes.map(of_rows, parts))


def gradient_cosines(engine: AdjointEngine, gradients: QueryGradients) -> Tensor:
    """Cosines of objectives' gradients with what a step on each row adds, `(num_values, num_rows)`, float32."""
    run, form, source = engine.run, engine.form, given(engine.run.rows, "the training rows")
    named, num_rows = form.named(run.final), len(source.reader)

    def of_rows(rows: range) -> Tensor:
        cosines = torch.zeros(len(gradients), len(rows), device=run.model.device)
        for values in ranges(len(gradients), engine.queries_at_once):
            asked = normalize(gradients(values))
            for part, inputs, labels in source.batches(rows, form, run.shares.gradients // 3):
                own = row_gradients(run.model, named, inputs, labels, source.row_loss, form)
                cosines[values.start : values.stop, part] = -asked @ normalize(own).T
        return cosines.cpu()

    parts = run.processes.parts(num_rows, at_most=num_rows)
    return torch.cat(run.processes.map(of_rows, parts), 1)


def label_scores(engine: AdjointEngine, gradients: QueryGradients, row: int, rewind: float) -> Tensor:
    """Parts of a row's scores that its single labels have, `(num_values, *positions)`: the row's loss adds them up."""
    run, form, source = engine.run, engine.form, given(engine.run.rows, "the training rows")
    path, weights = run.path(rewind), source.weights(run.path(rewind))
    inputs, labels = source.reader.batch([row])
    if labels.dim() < 2:
        raise ValueError("Rows have one label each, which has all of the row's score: see `row_scores`.")
    single, places = one_label_each(Queries(inputs, labels))
    scores = torch.zeros(len(gradients), *labels.shape[1:], device=run.model.device)
    for values in ranges(len(gradients), engine.queries_at_once):
        for state, direction in engine.directions(gradients(values), rewind).items():
            named, weight = form.named(path.state(state)), float(weights[state][row]) if weights else 1.0
            for part in ranges(len(single), form.at_once(run.shares.gradients // 3)):
                chosen = slice(part.start, part.stop)
                some = {name: value[chosen] for name, value in single.inputs.items()}
                sketch = None if form.is_whole else form
                labelled = some, single.labels[chosen], source.row_loss, sketch
                change = row_derivatives(run.model, named, direction, *labelled) * (weight / len(source.reader))
                scores[(slice(values.start, values.stop), *places[chosen, 1:].T)] += change
    return scores.cpu()


def module_scores(engine: AdjointEngine, gradients: QueryGradients, rewind: float) -> dict[str, Tensor]:
    """Parts of the scores `(num_values, num_clusters)` that the parameters of each module have."""
    run, space = engine.run, engine.run.model.space
    if not engine.form.is_whole:
        raise ValueError(
            f"Gradients of {run.model.num_parameters} parameters are held in short, in which modules cannot be told "
            "apart. Raise `max_memory`, or train fewer parameters (LoRA)."
        )
    engine.prepare(rewind)
    of_clusters, num_clusters = engine.gradients(rewind), run.clusters.num_clusters
    scores = {module_of(name): torch.zeros(len(gradients), num_clusters) for name in space.names}
    for values in ranges(len(gradients), engine.queries_at_once):
        for state, direction in engine.directions(gradients(values), rewind).items():
            for part in cluster_ranges(num_clusters, engine.form.length, run.shares.gradients):
                place = slice(values.start, values.stop), slice(part.start, part.stop)
                clusters = space.unflatten(of_clusters(state, part))
                for name, along in space.unflatten(direction).items():
                    scores[module_of(name)][place] += (along.flatten(1) @ clusters[name].flatten(1).T).cpu()
    return scores


def module_of(parameter: str) -> str:
    """Name of the numbered block that a parameter is in (`encoder.layer.3`), or else of its layer."""
    parts = parameter.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    return ".".join(parts[: number + 1]) or parameter
