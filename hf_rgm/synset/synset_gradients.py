"""Cluster gradients of synthetic samples, differentiable in the samples."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.func import grad, vmap

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.samples import SyntheticSamples, soft_cross_entropy

logger = logging.getLogger(__name__)

VECTORIZED_TOLERANCE = 1e-3


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
        return soft_cross_entropy(logits, one.targets, one.log_weights, one.target_ids)

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
