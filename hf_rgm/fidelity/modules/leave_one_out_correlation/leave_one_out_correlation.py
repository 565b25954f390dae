"""The correlation of training-data attributions with leave-one-out retraining."""

from hf_rgm.agreement.correlations import leave_cluster_out_correlation
from hf_rgm.fidelity.modules import frame
from hf_rgm.hub.cards import CITATION


class LeaveOneOutCorrelation(frame.CorrelationMetric):
    """
    The leave-one-out correlation says how well training-data attributions predict what happens when one cluster (or
    row) is left out of training: for each query, the correlation over clusters of scores with retrained changes of the
    objective; then the mean over queries.
    """

    correlation = staticmethod(leave_cluster_out_correlation)
    points = "clusters"
    paper = ("https://arxiv.org/abs/2404.14006", CITATION)
    arguments = """\
    predictions (`list` of `list` of `float`): For each query, the score of each cluster: predicted
        f(with) - f(without).
    references (`list` of `list` of `float`): For each query, the same by retraining without each cluster.
    correlation (`str`, *optional*, defaults to `"spearman"`): Or `"pearson"`.
    seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap over queries and clusters."""
