"""Synthetic samples as tensors, their loss, and its gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import grad, vmap

from hf_rgm.model.functional_model import FunctionalModel

if TYPE_CHECKING:
    from hf_rgm.synset.inputs import ContinuousInputs

logger = logging.getLogger(__name__)

VECTORIZED_TOLERANCE = 1e-3


@dataclass
class SyntheticSamples:
    """Synthetic samples of some clusters: learned inputs, targets and log-weights, and ids that these choose from."""

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


def soft_cross_entropies(
    logits: Tensor, targets: Tensor, log_weights: Tensor, target_ids: Tensor | None = None
) -> Tensor:
    """`exp(w_j) * CE(logits_j, softmax(targets_j))`, `(*samples,)`, of logits `(*samples, num_labels)`."""
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


class SynsetGradients:
    """Gradients of clusters' synthetic samples in the trainable parameters, differentiable in the samples."""

    def __init__(self, model: FunctionalModel, inputs: ContinuousInputs) -> None:
        self.model = model
        self.inputs = inputs
        self._vectorized: bool | None = None

    def loss(self, parameters: dict[str, Tensor], samples: dict[str, Tensor]) -> Tensor:
        """Weighted soft cross entropy of one cluster's samples (tensors by name), a scalar."""
        one = SyntheticSamples(**samples)
        logits = self.model.logits(parameters, self.inputs.to_forward(one))
        return soft_cross_entropies(logits, one.targets, one.log_weights, one.target_ids).sum()

    def __call__(self, parameters: dict[str, Tensor], samples: SyntheticSamples) -> Tensor:
        """Gradients `(num_clusters, num_parameters)`: `g_k = grad sum_j exp(w_kj) CE_kj`."""
        # Not every model works under vmap: the first call tries both ways.
        if self._vectorized is None:
            self._vectorized = self._choose(parameters, samples[:2].detach())
        return self._together(parameters, samples) if self._vectorized else self._one_by_one(parameters, samples)

    def _together(self, parameters: dict[str, Tensor], samples: SyntheticSamples) -> Tensor:
        gradients = vmap(grad(self.loss), in_dims=(None, 0))(parameters, samples.named_tensors())
        return self.model.space.flatten(gradients)

    def _one_by_one(self, parameters: dict[str, Tensor], samples: SyntheticSamples) -> Tensor:
        named = samples.named_tensors()
        rows = [
            self.model.space.flatten(grad(self.loss)(parameters, {name: t[k] for name, t in named.items()}))
            for k in range(len(samples.inputs))
        ]
        return torch.stack(rows)

    def _choose(self, parameters: dict[str, Tensor], samples: SyntheticSamples) -> bool:
        expected = self._probe(self._one_by_one, parameters, samples)
        try:
            got = self._probe(self._together, parameters, samples)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            logger.info("Cluster gradients one by one: the model does not vectorise over clusters (%s).", error)
            return False
        same = all(bool((g - e).norm() <= VECTORIZED_TOLERANCE * e.norm()) for g, e in zip(got, expected, strict=True))
        if same:
            logger.info("Cluster gradients are vectorised over clusters.")
        else:
            logger.info("Cluster gradients one by one: vectorised, they differ by more than %g.", VECTORIZED_TOLERANCE)
        return same

    @staticmethod
    def _probe(compute, parameters: dict[str, Tensor], samples: SyntheticSamples) -> tuple[Tensor, Tensor]:
        """Cluster gradients, and the derivative of their energy in the inputs: distilling needs both orders."""
        leaves = samples.detach()
        with torch.enable_grad():
            leaves.inputs.requires_grad_()
            value = compute(parameters, leaves)
            (slope,) = torch.autograd.grad(value.square().sum(), leaves.inputs)
        return value.detach(), slope
