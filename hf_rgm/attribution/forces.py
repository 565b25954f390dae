"""What sets a deviation from the recorded path going: the clusters' gradients there, as they are weighted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_rgm.modeling import FunctionalModel
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.matching import SynsetGradients
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.trajectory.path import RecordedPath

ClusterGradients = Callable[[int, range], Tensor]
"""Takes a recorded step and some clusters, and returns their gradients there, `(len(clusters), num_parameters)`."""


def gradients_of_synset(
    model: FunctionalModel, inputs: InputSpace, samples: SyntheticSamples, path: RecordedPath
) -> ClusterGradients:
    """Those of the synthetic samples."""
    gradients = SynsetGradients(model, inputs)

    def taken(state: int, clusters: range) -> Tensor:
        some = samples[slice(clusters.start, clusters.stop)]
        return gradients(model.space.unflatten(path.state(state)), some).detach()

    return taken


def force(gradients: ClusterGradients, state: int, masks: Tensor, *, num_parameters: int, max_bytes: int) -> Tensor:
    """
    Change of the training gradient at a recorded step under cluster weights.

    Args:
        gradients (`ClusterGradients`): Of the clusters.
        state (`int`): The recorded step.
        masks (`Tensor`): `(num_masks, num_clusters)`, the weight p of each cluster.
        num_parameters (`int`): Trainable parameters.
        max_bytes (`int`): Memory for gradients on their way.

    Returns:
        `Tensor`: `(num_masks, num_parameters)`, float32: `sum_k (p_k - 1) G_k`.
    """
    at_once = max(1, max_bytes // (12 * num_parameters))
    result = torch.zeros(len(masks), num_parameters, device=masks.device)
    for start in range(0, masks.shape[1], at_once):
        clusters = range(start, min(start + at_once, masks.shape[1]))
        result += (masks[:, clusters.start : clusters.stop] - 1) @ gradients(state, clusters)
    return result
