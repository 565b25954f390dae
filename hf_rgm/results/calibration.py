"""Sizes of scores: multiplied by the slope of retrained effects on them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from hf_rgm.agreement.fidelity_figures import FidelityFigures

if TYPE_CHECKING:
    from hf_rgm.results.result import AttributionResult


def calibrated(result: AttributionResult, report: FidelityFigures | None) -> AttributionResult:
    """The result with calibrated sizes; see [`AttributionResult.calibrated`]."""
    kept = result.metadata
    if result.calibration is not None:
        raise ValueError("These scores are calibrated already. Calibrate the result that they were computed from.")
    if report is None and kept.get("fidelity") is None:
        raise ValueError("No fidelity was measured with these scores. Pass the `FidelityReport` of their engine.")
    report = FidelityFigures.from_dict(kept["fidelity"]) if report is None else report
    factors = report.calibration(
        engine=result.engine,
        objective=result.objective,
        rows=kept.get("used_rows"),
        settings={name: kept[name] for name in ("rewind", "num_masks") if kept.get(name) is not None},
        samples_sha256=None if kept.get("used_rows") else kept.get("samples_sha256"),
        parameters_sha256=kept.get("parameters_sha256"),
    )
    rows = result.row_scores
    if rows is not None and factors.rows is not None:
        rows = rows * np.float32(factors.rows.value)
    scaled = replace(
        result,
        scores=result.scores * np.float32(factors.clusters.value),
        row_scores=rows,
        metadata={**kept, "calibration": asdict(factors), "fidelity": report.to_dict()},
    )
    scaled.tokenizer = result.tokenizer
    return scaled
