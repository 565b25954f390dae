"""Synthetic samples as tensors, and the loss they are trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class SyntheticSamples:
    """Synthetic samples of some clusters: learned inputs, targets and log-weights, and what these are logits of."""

    # A sample has a weighted target at each of its positions: one position for classification, one per token for
    # language models.
    # inputs: (num_clusters, samples_per_cluster, *input_shape), float32
    # targets: (num_clusters, samples_per_cluster, *positions, num_choices), float32 logits
    # log_weights: (num_clusters, samples_per_cluster, *positions), float32
    # input_ids: int64, like inputs: the tokens that inputs are logits of, for soft tokens
    # target_ids: int64, like targets: the labels that targets are logits of; all labels in order if None
    inputs: Tensor
    targets: Tensor
    log_weights: Tensor
    input_ids: Tensor | None = None
    target_ids: Tensor | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The learned tensors: inputs, targets and log-weights."""
        return self.inputs, self.targets, self.log_weights

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors that are not None, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> SyntheticSamples:
        return SyntheticSamples(**{name: function(tensor) for name, tensor in self.named_tensors().items()})

    def detach(self) -> SyntheticSamples:
        """The same values outside any graph."""
        return self.map(lambda tensor: tensor.detach().clone())

    def leaves(self) -> SyntheticSamples:
        """Detached copies whose learned tensors require gradients."""
        samples = self.detach()
        for tensor in samples.tensors():
            tensor.requires_grad_()
        return samples

    def flatten(self) -> SyntheticSamples:
        """The samples of all clusters in one dimension, `(num_clusters * samples_per_cluster, ...)`."""
        return self.map(lambda tensor: tensor.flatten(0, 1))

    def __getitem__(self, clusters: slice | Tensor) -> SyntheticSamples:
        return self.map(lambda tensor: tensor[clusters])


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, log_weights: Tensor, target_ids: Tensor | None = None
) -> Tensor:
    """`sum_j exp(w_j) * CE(logits_j, softmax(targets_j))` over samples and positions, a scalar."""
    return soft_cross_entropies(logits, targets, log_weights, target_ids).sum()


def soft_cross_entropies(
    logits: Tensor, targets: Tensor, log_weights: Tensor, target_ids: Tensor | None = None
) -> Tensor:
    """Soft cross entropies `(*samples,)`; logits `(*samples, num_labels)`, targets, ids `(*samples, num_choices)`."""
    log_probabilities = logits.log_softmax(-1)
    if target_ids is not None:
        log_probabilities = log_probabilities.gather(-1, target_ids)
    return log_weights.exp() * -(targets.softmax(-1) * log_probabilities).sum(-1)


def broadcast_masks(masks: Tensor, samples: SyntheticSamples) -> Tensor:
    """Masks `(*batch, num_clusters)` expanded to `(*batch, num_clusters, samples_per_cluster, *positions)`."""
    shape = samples.log_weights.shape
    return masks.reshape(*masks.shape, *[1] * (len(shape) - 1)).expand(*masks.shape[:-1], *shape)


def smoothed_one_hot(labels: Tensor, num_choices: int, smoothing: float) -> Tensor:
    """Logits `(*labels, num_choices)` whose softmax is the label, with `smoothing` of the mass spread evenly."""
    one_hot = torch.nn.functional.one_hot(labels, num_choices).float()
    return torch.log(one_hot * (1 - smoothing) + smoothing / num_choices)
