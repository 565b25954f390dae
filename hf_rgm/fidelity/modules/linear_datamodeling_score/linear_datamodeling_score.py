"""The linear datamodeling score (LDS) of training-data attributions."""

from __future__ import annotations

from dataclasses import asdict

import datasets
import evaluate
import numpy as np

from hf_rgm.agreement.correlations import linear_datamodeling_score

_DESCRIPTION = """
The linear datamodeling score (LDS) says how well training-data attributions predict what models trained on random
subsets of the data do: for each query, the Spearman correlation over subsets of predicted with retrained values of the
objective; then the mean over queries.
"""

_CITATION = """
@inproceedings{park2023trak,
    title={{TRAK}: Attributing Model Behavior at Scale},
    author={Sung Min Park and Kristian Georgiev and Andrew Ilyas and Guillaume Leclerc and Aleksander Madry},
    booktitle={International Conference on Machine Learning},
    year={2023},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `float`): For each query, one prediction per subset: the sum of the scores of the
        rows or clusters that the subset keeps.
    references (`list` of `list` of `float`): For each query, the objective of the model retrained on each subset.
    seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap over queries and subsets.

Returns:
    `linear_datamodeling_score` (`float`): Between -1 and 1, higher is better.
    `low`, `high` (`float` or `None`): Its 95% interval; `None` with fewer than 5 subsets.
    `num_nan` (`int`): Queries whose predictions or references are all equal; they count as 0.

Examples:

    >>> from hf_rgm.fidelity.modules.linear_datamodeling_score import LinearDatamodelingScore
    >>> lds = LinearDatamodelingScore()
    >>> results = lds.compute(
    ...     predictions=[[0.1, 0.4, 0.2, 0.9, 0.7], [0.3, 0.2, 0.8, 0.1, 0.5]],
    ...     references=[[1.0, 3.0, 2.0, 5.0, 4.0], [2.0, 3.0, 5.0, 1.0, 4.0]],
    ... )
    >>> round(results["linear_datamodeling_score"], 2)
    0.95
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LinearDatamodelingScore(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        values = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": values, "references": values}),
            reference_urls=["https://arxiv.org/abs/2303.14186"],
        )

    def _compute(self, predictions, references, seed: int = 0) -> dict[str, float | int | None]:
        result = asdict(linear_datamodeling_score(np.asarray(predictions), np.asarray(references), seed=seed))
        return {"linear_datamodeling_score": result.pop("value"), **result}
