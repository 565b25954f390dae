"""The page that shows an attribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_rgm.pages.exhibit import Exhibit, of_query
from hf_rgm.pages.html import HtmlReport
from hf_rgm.pages.views import (
    banner,
    cluster_section,
    clusters_section,
    facts_section,
    heatmap_section,
    query_section,
    rows_section,
)

SHOWN_QUERIES = 4


def attribution_report(
    exhibit: Exhibit,
    *,
    title: str = "Training-data attribution",
    lead: str = "",
    query_ids: Sequence[str | int] | None = None,
    fidelity: str | None = None,
) -> HtmlReport:
    """A page with the attribution matrix, the clusters that matter on average, and some queries one by one."""
    result = exhibit.result
    shown = result.query_ids[:SHOWN_QUERIES] if query_ids is None else query_ids
    positions = [result.query_index(query) for query in shown]
    report = HtmlReport(title, lead=lead, banner=banner(result, fidelity))
    report.add(clusters_section(exhibit, None))
    report.add(heatmap_section(result))
    for position in positions:
        report.add(query_section(exhibit, position))
        report.add(clusters_section(exhibit, position))
        scores = of_query(result.scores, position)
        for cluster in dict.fromkeys((int(np.argmax(scores)), int(np.argmin(scores)))):
            report.add(cluster_section(exhibit, cluster, position))
        if result.row_scores is not None:
            report.add(rows_section(exhibit, position))
    report.add(facts_section(result))
    return report
