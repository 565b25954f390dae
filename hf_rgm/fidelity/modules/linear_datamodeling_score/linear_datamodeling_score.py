"""The linear datamodeling score (LDS) of training-data attributions."""

from hf_rgm.agreement.correlations import linear_datamodeling_score
from hf_rgm.fidelity.modules import frame

CITATION = """
@inproceedings{park2023trak,
    title={{TRAK}: Attributing Model Behavior at Scale},
    author={Sung Min Park and Kristian Georgiev and Andrew Ilyas and Guillaume Leclerc and Aleksander Madry},
    booktitle={International Conference on Machine Learning},
    year={2023},
}
"""


class LinearDatamodelingScore(frame.CorrelationMetric):
    """
    The linear datamodeling score (LDS) says how well training-data attributions predict what models trained on random
    subsets of the data do: for each query, the Spearman correlation over subsets of predicted with retrained values of
    the objective; then the mean over queries.
    """

    correlation = staticmethod(linear_datamodeling_score)
    points = "subsets"
    paper = ("https://arxiv.org/abs/2303.14186", CITATION)
    arguments = """\
    predictions (`list` of `list` of `float`): For each query, one prediction per subset: the sum of the scores of the
        rows or clusters that the subset keeps.
    references (`list` of `list` of `float`): For each query, the objective of the model retrained on each subset.
    seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap over queries and subsets."""
