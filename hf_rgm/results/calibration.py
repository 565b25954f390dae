"""Sizes of scores: multiplied by the slope of retrained effects on them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hf_rgm.agreement.fidelity_figures import FidelityFigures

if TYPE_CHECKING:
    from hf_rgm.results.result import AttributionResult


def calibrated(result: AttributionResult, report: FidelityFigures | None) -> AttributionResult:
    """The result with calibrated sizes; see [`AttributionResult.calibrated`]."""
    kept = result.metadata
    if result.factors is not None:
        raise ValueError("These scores are calibrated already. Calibrate the result that they were computed from.")
    if report is None and kept.get("fidelity") is None:
        raise ValueError("No fidelity was measured with these scores. Pass the `FidelityReport` of their engine.")
    report = FidelityFigures.from_dict(kept["fidelity"]) if report is None else report
    clusters, rows = report.factors(
        engine=result.engine,
        objective=result.objective,
        rows=kept.get("used_rows"),
        settings={name: kept[name] for name in ("rewind", "num_masks") if kept.get(name) is not None},
        samples_sha256=None if kept.get("used_rows") else kept.get("samples_sha256"),
        parameters_sha256=kept.get("parameters_sha256"),
    )
    of_rows = result.row_scores
    scaled = replace(
        result,
        scores=result.scores * np.float32(clusters.value),
        row_scores=of_rows if of_rows is None or rows is None else of_rows * np.float32(rows.value),
        metadata={**kept, "calibrated": True, "fidelity": report.to_dict()},
    )
    scaled.tokenizer = result.tokenizer
    return scaled
