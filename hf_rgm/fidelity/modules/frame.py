"""Base of the `evaluate` modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import ClassVar

import datasets
import evaluate
import numpy as np
from evaluate.naming import camelcase_to_snakecase

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
    """A correlation of `(num_queries, num_points)` predictions with references; docstrings describe the metrics."""

    correlation: ClassVar[Callable[..., Estimate]]
    arguments: ClassVar[str]
    points: ClassVar[str]
    paper: ClassVar[tuple[str, str]]  # address and BibTeX

    def _info(self) -> evaluate.MetricInfo:
        values, metric = datasets.Sequence(datasets.Value("float64")), type(self).__name__
        name = camelcase_to_snakecase(metric)
        url, citation = self.paper
        return evaluate.MetricInfo(
            description=inspect.getdoc(self) or "",
            citation=citation,
            inputs_description=USAGE.format(arguments=self.arguments, name=name, metric=metric, points=self.points),
            features=datasets.Features({"predictions": values, "references": values}),
            reference_urls=[url],
        )

    def _compute(self, predictions, references, **options) -> dict[str, float | int | None]:
        result = asdict(self.correlation(np.asarray(predictions), np.asarray(references), **options))
        return {self.name: result.pop("value"), **result}
