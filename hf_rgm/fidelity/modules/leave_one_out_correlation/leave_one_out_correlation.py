"""The correlation of training-data attributions with leave-one-out retraining."""

from __future__ import annotations

from dataclasses import asdict

import datasets
import evaluate
import numpy as np

from hf_rgm.agreement.correlations import leave_cluster_out_correlation

_DESCRIPTION = """
The leave-one-out correlation says how well training-data attributions predict what happens when one cluster (or row)
is left out of training: for each query, the correlation over clusters of scores with retrained changes of the
objective; then the mean over queries.
"""

_CITATION = """
@inproceedings{ye2024distilled,
    title={Distilled Datamodel with Reverse Gradient Matching},
    author={Jingwen Ye and Ruonan Yu and Songhua Liu and Xinchao Wang},
    booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year={2024},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `float`): For each query, the score of each cluster: predicted
        f(with) - f(without).
    references (`list` of `list` of `float`): For each query, the same by retraining without each cluster.
    correlation (`str`, *optional*, defaults to `"spearman"`): Or `"pearson"`.
    seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap over queries and clusters.

Returns:
    `leave_one_out_correlation` (`float`): Between -1 and 1, higher is better.
    `low`, `high` (`float` or `None`): Its 95% interval; `None` with fewer than 5 clusters.
    `num_nan` (`int`): Queries whose predictions or references are all equal; they count as 0.

Examples:

    >>> from hf_rgm.fidelity.modules.leave_one_out_correlation import LeaveOneOutCorrelation
    >>> metric = LeaveOneOutCorrelation()
    >>> results = metric.compute(
    ...     predictions=[[0.1, 0.4, 0.2, 0.9, 0.7], [0.3, 0.2, 0.8, 0.1, 0.5]],
    ...     references=[[1.0, 3.0, 2.0, 5.0, 4.0], [2.0, 3.0, 5.0, 1.0, 4.0]],
    ... )
    >>> round(results["leave_one_out_correlation"], 2)
    0.95
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LeaveOneOutCorrelation(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        values = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": values, "references": values}),
            reference_urls=["https://arxiv.org/abs/2404.14006"],
        )

    def _compute(
        self, predictions, references, correlation: str = "spearman", seed: int = 0
    ) -> dict[str, float | int | None]:
        result = asdict(
            leave_cluster_out_correlation(
                np.asarray(predictions), np.asarray(references), correlation=correlation, seed=seed
            )
        )
        return {"leave_one_out_correlation": result.pop("value"), **result}
