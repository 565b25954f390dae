"""The page about attributions, and its sections, which the explorer shows too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hf_rgm.agreement.fidelity_figures import DESCRIPTIONS, FidelityFigures, describe_sizes
from hf_rgm.pages.exhibit import Exhibit, of_query
from hf_rgm.pages.html import Card, HtmlReport, Section
from hf_rgm.pages.shown_rows import shortened

if TYPE_CHECKING:
    from hf_rgm.results.result import AttributionResult

SHOWN_QUERIES = 4
SHOWN_CLUSTERS = 8
SHOWN_ROWS = 6
NOT_MEASURED = "not measured: how well these scores agree with retraining is not known."

# Figures from docs/benchmarks.md.
ROWS_IN_GROUPS = (
    "Take these rows together: on the digits benchmark a query's gap to the next class fell by 0.334 ± 0.051 without "
    "the 3 rows that score highest for it, by 0.012 ± 0.043 without 3 random rows. What one row does was not "
    "measured: its score says where to look, and differences between neighbours in rank are not meaningful."
)


def attribution_report(exhibit: Exhibit, *, title: str, query_ids: Sequence[str | int] | None = None) -> HtmlReport:
    """Page with the attribution matrix, the clusters that matter on average, and some queries one by one."""
    result = exhibit.result
    shown = result.query_ids[:SHOWN_QUERIES] if query_ids is None else query_ids
    report = HtmlReport(title, banner=banner(result))
    report.sections += [clusters_section(exhibit, None), heatmap_section(result)]
    for position in map(result.query_index, shown):
        report.sections += [query_section(exhibit, position), clusters_section(exhibit, position)]
        scores = of_query(result.scores, position)
        for cluster in dict.fromkeys((int(np.argmax(scores)), int(np.argmin(scores)))):
            report.sections.append(cluster_section(exhibit, cluster, position))
        if result.row_scores is not None:
            report.sections.append(rows_section(exhibit, position))
    report.sections.append(facts_section(result))
    return report


def banner(result: AttributionResult) -> list[str]:
    """What stays in sight beside every score: its sign, and how far to trust it."""
    sign = f"Score > 0: presence of the data raises the {result.objective}; score = f(with) − f(without)."
    better = f"{'Higher' if result.maximize else 'Lower'} is better: blue helps, orange harms."
    return [f"{sign} {better}", f"Fidelity: {fidelity_line(result)} {describe_sizes(result.factors)}"]


def fidelity_line(result: AttributionResult) -> str:
    """The measured agreement with retraining in one line, or that it was not measured."""
    if result.metadata.get("fidelity") is None:
        return NOT_MEASURED
    report = FidelityFigures.from_dict(result.metadata["fidelity"])
    name, agreement = next(iter(report.agreements.items()))
    return (
        f"rank correlation with retraining {agreement.estimate}, {DESCRIPTIONS[name]}, {agreement.num_points} "
        f"retrained subsets, engine {report.engine}."
    )


def query_name(result: AttributionResult, position: int | None) -> str:
    """The name of a query; `None` is the mean over all."""
    if position is None:
        return f"mean over {result.num_queries} queries"
    return shortened(f"query {result.query_ids[position]}", 80)


def query_section(exhibit: Exhibit, position: int | None) -> Section:
    """The picture or text of a query, and its objective under the trained model."""
    result = exhibit.result
    if position is None:
        section = Section("All queries")
        section.text(
            f"The trained model's mean {result.objective} over {result.num_queries} queries: "
            f"{result.objective_values.mean():.4g}."
        )
        return section
    section = Section(query_name(result, position).capitalize())
    card = exhibit.query(position)
    if card is not None:
        section.cards({"": [card]})
    section.text(f"The trained model's {result.objective}: {result.objective_values[position]:.4g}.")
    if card is None:
        section.text("Pass the queries to see what it looks like.")
    return section


def clusters_section(exhibit: Exhibit, position: int | None, *, k: int = SHOWN_CLUSTERS) -> Section:
    """Bars of the clusters that raise and lower the objective most."""
    result = exhibit.result
    section = Section("Clusters that raise and lower the objective most")
    section.bars(
        [f"{name} ({size} rows)" for name, size in zip(result.cluster_names, result.cluster_sizes, strict=True)],
        of_query(result.scores, position),
        k=k,
        caption=f"Change of the {result.objective}, {query_name(result, position)}",
        maximize=result.maximize,
    )
    return section


def cluster_section(exhibit: Exhibit, cluster: int, position: int | None) -> Section:
    """Real rows and synthetic samples of a cluster side by side."""
    result = exhibit.result
    score = of_query(result.scores, position)[cluster]
    section = Section(f"Cluster {shortened(str(result.cluster_names[cluster]), 80)}")
    section.text(
        f"{result.cluster_sizes[cluster]} training rows; score {score:+.3g} ({query_name(result, position)}): with "
        f"them the {result.objective} is {'higher' if score > 0 else 'lower' if score < 0 else 'the same'}."
    )
    rows, samples = exhibit.cluster_rows(cluster, position), exhibit.cluster_samples(cluster)
    groups = {name: cards for name, cards in (("Real rows", rows), ("Synthetic samples", samples)) if cards}
    if groups:
        section.cards(groups)
    for known, what in (
        (result.cluster_ids is not None, "These attributions do not say which rows belong to it."),
        (exhibit.rows is not None, "Pass the training rows to see them."),
        (exhibit.synset is not None, "Pass the synset to see synthetic samples."),
    ):
        if not known:
            section.text(what)
    return section


def rows_section(exhibit: Exhibit, position: int | None, *, k: int = SHOWN_ROWS) -> Section:
    """Training rows that raise and lower the objective most."""
    result = exhibit.result
    section = Section("Rows that raise and lower the objective most")
    if result.row_scores is None:
        section.text("Rows were not scored: attribute with the training rows (`rows=...`) to score them.")
        return section
    query = None if position is None else result.query_ids[position]
    section.text(ROWS_IN_GROUPS)
    best, worst = (result.top(k, query, rows=True, largest=largest) for largest in (True, False))
    if exhibit.rows is None:
        for frame, what in ((best, "Rows that raise it most"), (worst, "Rows that lower it most")):
            caption = f"{what}, {query_name(result, position)}"
            section.table(frame.columns, frame.itertuples(index=False), caption=caption)
        return section
    section.text(f"Change of the {result.objective}, {query_name(result, position)}.")

    def cards(frame: pd.DataFrame) -> list[Card]:
        return [
            exhibit.row_card(int(row), float(score)) for row, score in zip(frame["row"], frame["score"], strict=True)
        ]

    section.cards({"Raise it most": cards(best), "Lower it most": cards(worst)})
    return section


def heatmap_section(result: AttributionResult) -> Section:
    """The attribution matrix as colours."""
    section = Section("Queries and clusters")
    section.figure(result.plot(), caption="Scores of queries and clusters; alike ones stand together.")
    return section


def facts_section(result: AttributionResult) -> Section:
    """How the scores were computed, and all measured fidelity."""
    section = Section("How this was computed")
    kept, model = result.metadata, result.metadata.get("model")
    described: dict[str, Any] = model if isinstance(model, dict) else {}
    used, rewind = kept.get("used_rows"), kept.get("rewind_step")
    facts = {
        "model": described.get("class"),
        "trained from": described.get("name_or_path"),
        "objective": result.objective,
        "its mean for the trained model": f"{result.objective_values.mean():.4g}",
        "engine": result.engine,
        "scored with": None if used is None else "the training rows" if used else "the synset alone",
        "rewound to": None if rewind is None else f"step {rewind} of {kept.get('num_steps')}",
        "recorded runs": kept.get("num_runs"),
        "queries": result.num_queries,
        "clusters": result.num_clusters,
        "training rows": int(result.cluster_sizes.sum()),
        "trained parameters (SHA-256)": kept.get("parameters_sha256"),
    }
    section.table(["setting", "value"], [[n, shortened(str(v), 200)] for n, v in facts.items() if v not in (None, "")])
    section.text(f"{result.SIGN_CONVENTION} {describe_sizes(result.factors)}")
    fidelity = kept.get("fidelity")
    section.text(f"Fidelity: {NOT_MEASURED}" if fidelity is None else str(FidelityFigures.from_dict(fidelity)))
    return section
