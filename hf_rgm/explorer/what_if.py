"""Predictions without some clusters, by replay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_rgm.engines.objectives import OBJECTIVES, Forward, Objective, Queries
from hf_rgm.engines.registry import ENGINES
from hf_rgm.pages.exhibit import Exhibit
from hf_rgm.pages.html import Section, signed
from hf_rgm.pages.shown_rows import shortened
from hf_rgm.pages.views import query_name
from hf_rgm.results.result import AttributionResult

SHOWN_LABELS = 5
SHOWN_CHANGES = 8
FIRST_ORDER = " Scores are first-order in the objective; here the changed model itself is asked: large changes differ."
NEEDS = (
    "Predictions without clusters need the model, the synset and the queries: "
    "`explore(..., model=..., synset=..., queries=...)`."
)


@dataclass(frozen=True)
class Replayed:
    """Queries before and after some clusters were removed; with several recorded runs, the mean over them."""

    objective: np.ndarray | None  # (2, num_values), float32, for built-in objectives
    probabilities: np.ndarray | None  # (2, num_queries, num_labels), float32, for classifiers of whole rows


def replay_without(exhibit: Exhibit, clusters: Iterable[int]) -> Replayed:
    """Replays training without some clusters."""
    dropped, num_clusters = sorted(set(clusters)), exhibit.result.num_clusters
    if exhibit.attributor is None or exhibit.queries is None:
        raise ValueError(NEEDS)
    if not 0 < len(dropped) < num_clusters:
        raise ValueError(f"Choose clusters to remove: at least one of {num_clusters}, and not all.")
    objective = OBJECTIVES.get(exhibit.result.objective)
    num_values = 0 if objective is None else exhibit.result.num_queries
    shifts_labels = exhibit.attributor.model.shifts_labels

    def function(forward: Forward, queries: Queries) -> Tensor:
        # Both from one replay.
        parts = [] if objective is None else [objective.function(forward, queries)]
        if not shifts_labels and (logits := forward(queries.inputs)).dim() == 2:
            parts.append(logits.flatten())
        if not parts:
            raise ValueError(
                f"Neither is {exhibit.result.objective!r} a built-in objective nor the model a classifier: ask "
                "`Attributor.replayed_values` with the objective itself."
            )
        return torch.cat(parts)

    masks = torch.ones(2, num_clusters)
    masks[1, dropped] = 0
    values = exhibit.attributor.replayed_values(
        exhibit.queries,
        masks,
        objective=Objective("what if", function, differentiable=False),
        engine=engine_of(exhibit.result),
        data_collator=exhibit.data_collator,
    )
    if not np.isfinite(values).all():
        raise ValueError("The replay diverged: its predictions are NaN or infinite. Remove fewer clusters.")
    probabilities = None
    if values.shape[1] > num_values:
        logits = torch.from_numpy(values[:, num_values:]).reshape(2, len(exhibit.queries), -1)
        probabilities = logits.softmax(-1).numpy()
    return Replayed(None if objective is None else values[:, :num_values], probabilities)


def engine_of(result: AttributionResult) -> str:
    """The engine that replays: that of the scores if it can, so that both agree."""
    # The adjoint's scores are derivatives, which linearised replay integrates. Training on needs rows and is too slow.
    engine = ENGINES.get(result.engine)
    return result.engine if engine and engine.replays and engine.needs != "rows" else "linearized_replay"


def what_if_section(exhibit: Exhibit, replayed: Replayed, clusters: Iterable[int], position: int | None) -> Section:
    """Predictions before and after, of one query and over all."""
    result = exhibit.result
    engine, dropped = engine_of(result), sorted(set(clusters))
    names = ", ".join(str(result.cluster_names[k]) for k in dropped)
    section = Section(f"Without {shortened(names, 120)}")
    section.text(
        f"{result.cluster_sizes[dropped].sum()} of {result.cluster_sizes.sum()} training rows removed. Predicted by "
        f"{engine.replace('_', ' ')}, not by retraining."
        + (FIRST_ORDER if engine in ("linearized_replay", "responses") else "")
    )
    if position is not None and replayed.probabilities is not None and not exhibit.values_are_of_sets:
        _add_predictions(section, exhibit, replayed.probabilities[:, position], position)
    if replayed.objective is not None:
        lines = [] if position is None else [(query_name(result, position), replayed.objective[:, position])]
        if result.num_queries > 1:
            lines.append((query_name(result, None), replayed.objective.mean(axis=1)))
        section.table(
            ["", "before", "after", "change"],
            [[what, f"{v[0]:.4g}", f"{v[1]:.4g}", signed(float(v[1] - v[0]))] for what, v in lines],
            caption=f"{result.objective} before and after",
        )
    if replayed.probabilities is not None:
        _add_changes(section, exhibit, replayed.probabilities)
    return section


def _add_predictions(section: Section, exhibit: Exhibit, probabilities: np.ndarray, position: int) -> None:
    before, after = probabilities
    shown = np.argsort(-np.maximum(before, after), kind="stable")[:SHOWN_LABELS]
    section.table(
        ["label", "before", "after"],
        [[_label(exhibit, label), f"{before[label]:.1%}", f"{after[label]:.1%}"] for label in shown],
        caption=f"Predicted probabilities of {query_name(exhibit.result, position)}",
    )
    first, second = _label(exhibit, before.argmax()), _label(exhibit, after.argmax())
    section.text(f"Prediction stays {first}." if first == second else f"Prediction turns from {first} to {second}.")


def _add_changes(section: Section, exhibit: Exhibit, probabilities: np.ndarray) -> None:
    before, after = probabilities.argmax(-1)
    changed = np.flatnonzero(before != after)
    section.text(f"The prediction changes for {len(changed)} of {len(before)} queries.")
    if not len(changed):
        return
    loss = probabilities[0, changed, before[changed]] - probabilities[1, changed, before[changed]]
    shown = changed[np.argsort(-loss, kind="stable")[:SHOWN_CHANGES]]
    ids = range(len(before)) if exhibit.values_are_of_sets else exhibit.result.query_ids

    def told(query: int, which: int, label: np.integer) -> str:
        return f"{_label(exhibit, label)} ({probabilities[which, query, label]:.0%})"

    section.table(
        ["query", "before", "after"],
        [[str(ids[q]), told(q, 0, before[q]), told(q, 1, after[q])] for q in shown],
        caption="Changed predictions" + ("" if len(shown) == len(changed) else f", {len(shown)} of {len(changed)}"),
    )


def _label(exhibit: Exhibit, label: np.integer) -> str:
    return str(exhibit.label_names.get(int(label), int(label)))
