"""The correlation of training-data attributions with leave-one-out retraining."""

import evaluate

from hf_rgm.agreement.correlations import leave_cluster_out_correlation
from hf_rgm.fidelity.modules import frame

DESCRIPTION = """
The leave-one-out correlation says how well training-data attributions predict what happens when one cluster (or row)
is left out of training: for each query, the correlation over clusters of scores with retrained changes of the
objective; then the mean over queries.
"""

CITATION = """
@inproceedings{ye2024distilled,
    title={Distilled Datamodel with Reverse Gradient Matching},
    author={Jingwen Ye and Ruonan Yu and Songhua Liu and Xinchao Wang},
    booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year={2024},
}
"""

ARGUMENTS = """\
    predictions (`list` of `list` of `float`): For each query, the score of each cluster: predicted
        f(with) - f(without).
    references (`list` of `list` of `float`): For each query, the same by retraining without each cluster.
    correlation (`str`, *optional*, defaults to `"spearman"`): Or `"pearson"`.
    seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap over queries and clusters."""

USAGE = frame.USAGE.format(
    arguments=ARGUMENTS, name="leave_one_out_correlation", metric="LeaveOneOutCorrelation", points="clusters"
)


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, USAGE)
class LeaveOneOutCorrelation(frame.CorrelationMetric):
    correlation = staticmethod(leave_cluster_out_correlation)
    texts = {
        "description": DESCRIPTION,
        "citation": CITATION,
        "inputs_description": USAGE,
        "reference_urls": ["https://arxiv.org/abs/2404.14006"],
    }
