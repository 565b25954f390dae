"""What the `evaluate` modules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from hf_rgm.agreement.correlations import Estimate

USAGE = """
Args:
{arguments}

Returns:
    `{name}` (`float`): Between -1 and 1, higher is better.
    `low`, `high` (`float` or `None`): Its 95% interval; `None` with fewer than 5 {points}.
    `num_nan` (`int`): Queries whose predictions or references are all equal; they count as 0.

Examples:

    >>> from hf_rgm.fidelity.modules.{name} import {metric}
    >>> metric = {metric}()
    >>> results = metric.compute(
    ...     predictions=[[0.1, 0.4, 0.2, 0.9, 0.7], [0.3, 0.2, 0.8, 0.1, 0.5]],
    ...     references=[[1.0, 3.0, 2.0, 5.0, 4.0], [2.0, 3.0, 5.0, 1.0, 4.0]],
    ... )
    >>> round(results["{name}"], 2)
    0.95
"""


class CorrelationMetric(evaluate.Metric):
    """A correlation of `(num_queries, num_points)` predictions with references, as a metric of its own name."""

    texts: ClassVar[dict[str, Any]]
    """Those of `evaluate.MetricInfo`."""

    correlation: ClassVar[Callable[..., Estimate]]

    def _info(self) -> evaluate.MetricInfo:
        values = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            features=datasets.Features({"predictions": values, "references": values}), **self.texts
        )

    def _compute(self, predictions, references, **options) -> dict[str, float | int | None]:
        result = asdict(self.correlation(np.asarray(predictions), np.asarray(references), **options))
        return {self.name: result.pop("value"), **result}
