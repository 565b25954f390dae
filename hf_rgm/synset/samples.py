"""Synthetic samples as tensors, and the loss they are trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class SyntheticSamples:
    """
    Synthetic samples of some clusters.

    A sample is an input with a weighted target at each of its positions: one for classification, one per token for
    language models. The first three tensors are learned, the others say what they are logits of.

    Args:
        inputs (`Tensor`): `(num_clusters, samples_per_cluster, *input_shape)`, float32.
        targets (`Tensor`): `(num_clusters, samples_per_cluster, *positions, num_choices)`, float32 logits.
        log_weights (`Tensor`): `(num_clusters, samples_per_cluster, *positions)`, float32.
        input_ids (`Tensor`, *optional*): The tokens that inputs are logits of, int64, shaped like `inputs`; for soft
            tokens.
        target_ids (`Tensor`, *optional*): The labels that targets are logits of, int64, shaped like `targets`; all
            others have probability 0. Defaults to all labels, in order.
    """

    inputs: Tensor
    targets: Tensor
    log_weights: Tensor
    input_ids: Tensor | None = None
    target_ids: Tensor | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is learned: inputs, targets and log-weights."""
        return self.inputs, self.targets, self.log_weights

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors there are, by the name of the argument."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> SyntheticSamples:
        """Samples with a function applied to every tensor."""
        return SyntheticSamples(**{name: function(tensor) for name, tensor in self.named_tensors().items()})

    def detach(self) -> SyntheticSamples:
        """The same values outside any graph."""
        return self.map(lambda tensor: tensor.detach().clone())

    def flatten(self) -> SyntheticSamples:
        """The samples of all clusters in one dimension, `(num_clusters * samples_per_cluster, ...)`."""
        return self.map(lambda tensor: tensor.flatten(0, 1))

    def __getitem__(self, clusters: slice | Tensor) -> SyntheticSamples:
        return self.map(lambda tensor: tensor[clusters])


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, log_weights: Tensor, target_ids: Tensor | None = None
) -> Tensor:
    """
    `sum_j exp(w_j) * CE(logits_j, softmax(targets_j))` over samples and positions, a scalar.

    Args:
        logits (`Tensor`): `(*samples, num_labels)`.
        targets (`Tensor`): `(*samples, num_choices)`, logits of the targets.
        log_weights (`Tensor`): `(*samples,)`.
        target_ids (`Tensor`, *optional*): `(*samples, num_choices)`, the labels that targets are logits of.
    """
    return soft_cross_entropies(logits, targets, log_weights, target_ids).sum()


def soft_cross_entropies(
    logits: Tensor, targets: Tensor, log_weights: Tensor, target_ids: Tensor | None = None
) -> Tensor:
    """The terms of [`soft_cross_entropy`], `(*samples,)`."""
    log_probabilities = logits.log_softmax(-1)
    if target_ids is not None:
        log_probabilities = log_probabilities.gather(-1, target_ids)
    return log_weights.exp() * -(targets.softmax(-1) * log_probabilities).sum(-1)


def broadcast_masks(masks: Tensor, samples: SyntheticSamples) -> Tensor:
    """
    The weight that each cluster's mask gives to each of its samples and positions.

    Args:
        masks (`Tensor`): `(*batch, num_clusters)`.
        samples (`SyntheticSamples`): Of as many clusters.

    Returns:
        `Tensor`: `(*batch, num_clusters, samples_per_cluster, *positions)`, expanded.
    """
    shape = samples.log_weights.shape
    return masks.reshape(*masks.shape, *[1] * (len(shape) - 1)).expand(*masks.shape[:-1], *shape)


def smoothed_one_hot(labels: Tensor, num_choices: int, smoothing: float) -> Tensor:
    """
    Logits whose softmax is the label with `smoothing` of the mass spread evenly: shape `(*labels, num_choices)`.
    """
    one_hot = torch.nn.functional.one_hot(labels, num_choices).float()
    return torch.log(one_hot * (1 - smoothing) + smoothing / num_choices)
