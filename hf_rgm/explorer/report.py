"""The page that shows an attribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_rgm.attribution.result import AttributionResult
from hf_rgm.explorer.html import HtmlReport, Section
from hf_rgm.explorer.plots import plot_heatmap, plot_synset_gallery
from hf_rgm.grouping import as_numpy

SHOWN_QUERIES = 4
# More would be too small to read on a page.
SHOWN_LINES = 40
SHOWN_SCORES = 5

RowImage = Callable[[int], Any]


def attribution_report(
    result: AttributionResult,
    *,
    title: str = "Training-data attribution",
    queries: Sequence[str | int] | None = None,
    row_image: RowImage | None = None,
    query_image: RowImage | None = None,
) -> HtmlReport:
    """
    A page with the attribution matrix, the clusters that matter on average, and some queries one by one.

    Args:
        result (`AttributionResult`): What to show.
        title (`str`, *optional*): Title of the page.
        queries (`Sequence`, *optional*): Ids of queries to show one by one. Defaults to the first four.
        row_image (`Callable`, *optional*): The picture of a training row, `(channels, height, width)` or
            `(height, width)`.
        query_image (`Callable`, *optional*): The same for the query at a position.

    Returns:
        `HtmlReport`: add sections of your own, then `save` it.

    Raises:
        KeyError: If there is no such query.
    """
    shown = list(result.query_ids[:SHOWN_QUERIES] if queries is None else queries)
    positions = [result.query_index(query) for query in shown]
    report = HtmlReport(title, lead=AttributionResult.SIGN_CONVENTION)
    overview = report.section("Overview")
    facts = {
        "objective": result.objective,
        "mean objective of the trained model": f"{result.objective_values.mean():.4g}",
        "engine": result.engine,
        "queries": result.num_queries,
        "clusters": result.num_clusters,
        "training rows": int(result.cluster_sizes.sum()),
        **result.metadata,
    }
    overview.table(["setting", "value"], [[name, str(value)] for name, value in facts.items()])
    heatmap = plot_heatmap(
        result.scores, result.query_ids, result.cluster_names, max_queries=SHOWN_LINES, max_clusters=SHOWN_LINES
    )
    report.section("Queries and clusters").figure(heatmap, caption="Alike queries and clusters stand together.")
    report.section("On average over queries").figure(result.plot("bars"))
    for query, position in zip(shown, positions, strict=True):
        section = report.section(f"Query {query}")
        section.text(f"Objective of the trained model: {result.objective_values[position]:.4g}.")
        section.figure(result.plot("bars", query=query, k=SHOWN_SCORES))
        if result.row_scores is not None:
            _add_rows(section, result, query, row_image, query_image and query_image(position))
    return report


def _add_rows(
    section: Section, result: AttributionResult, query: str | int, row_image: RowImage | None, query_picture: Any
) -> None:
    for largest, what in ((True, "Rows that raise the objective most"), (False, "Rows that lower it most")):
        rows = result.top(SHOWN_SCORES, query, rows=True, largest=largest)
        if row_image is None:
            section.frame(rows, caption=what)
            continue
        pictures = [as_numpy(row_image(int(row))) for row in rows["row"]]
        titles = [f"{row}: {score:+.2g}" for row, score in zip(rows["row"], rows["score"], strict=True)]
        if query_picture is not None:
            pictures, titles = [as_numpy(query_picture), *pictures], ["the query", *titles]
        section.figure(plot_synset_gallery(np.stack(pictures), titles), caption=f"{what} (row: score)")
