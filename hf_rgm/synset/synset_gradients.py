"""Reverse gradient matching: the loss between a synset's cluster gradients and the data's."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import grad, vmap

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.samples import SyntheticSamples, soft_cross_entropy

logger = logging.getLogger(__name__)

VECTORIZED_TOLERANCE = 1e-3


class SynsetGradients:
    """
    Gradient that each cluster's synthetic samples exert on the trainable parameters, differentiable in the samples.

    Clusters go through `torch.func.vmap` together where the model allows it, else one after another; the choice is
    made on the first call, by trying both on two clusters, and logged.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        inputs (`InputSpace`): How samples become forward arguments.
    """

    def __init__(self, model: FunctionalModel, inputs: InputSpace) -> None:
        self.model = model
        self.inputs = inputs
        self._vectorized: bool | None = None

    def loss(self, parameters: dict[str, Tensor], samples: dict[str, Tensor]) -> Tensor:
        """Weighted soft cross entropy of one cluster's samples (tensors by name), a scalar."""
        one = SyntheticSamples(**samples)
        logits = self.model.logits(parameters, self.inputs.to_forward(one))
        return soft_cross_entropy(logits, one.targets, one.log_weights, one.target_ids)

    def __call__(self, parameters: dict[str, Tensor], samples: SyntheticSamples) -> Tensor:
        """
        Returns:
            `Tensor`: `(num_clusters, num_parameters)`, `g_k(S; theta) = grad sum_j exp(w_kj) CE_kj`.
        """
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
            logger.info(
                "Cluster gradients one by one: vectorised over clusters, they or their derivatives differ by more "
                "than %g.",
                VECTORIZED_TOLERANCE,
            )
        return same

    @staticmethod
    def _probe(compute, parameters: dict[str, Tensor], samples: SyntheticSamples) -> tuple[Tensor, Tensor]:
        """Cluster gradients, and the derivative of their energy in the inputs: both orders are needed to distil."""
        leaves = samples.detach()
        with torch.enable_grad():
            leaves.inputs.requires_grad_()
            value = compute(parameters, leaves)
            (slope,) = torch.autograd.grad(value.square().sum(), leaves.inputs)
        return value.detach(), slope


def matching_error(synthetic: Tensor, real: Tensor, energy: Tensor, total_weight: float) -> Tensor:
    """
    Squared distance between cluster gradients at one state, relative to an energy.

    Args:
        synthetic, real (`Tensor`): `(num_clusters, num_parameters)`.
        energy (`Tensor`): Sum of the squares of the real gradients of all clusters, a scalar.
        total_weight (`float`): tau, the weight of the term that matches the sum over clusters.

    Returns:
        `Tensor`: scalar; 0 is a perfect match, 1 what empty samples would give (for tau = 0).
    """
    difference = synthetic - real
    error = difference.square().sum()
    if total_weight:
        error = error + total_weight * len(real) * difference.sum(0).square().sum()
    return error / energy


def cluster_residuals(synthetic: Tensor, real: Tensor) -> Tensor:
    """`|g_k - G_k|^2 / |G_k|^2` for each cluster: `(num_clusters,)`; 0 / 0 counts as 0."""
    energy = real.square().sum(1)
    distance = (synthetic - real).square().sum(1)
    return torch.where(energy > 0, distance / energy.clamp_min(torch.finfo(energy.dtype).tiny), distance)


def draw_states(num_states: int, states_per_iteration: int, generator: torch.Generator) -> Iterator[list[int]]:
    """
    Which recorded states each iteration matches, without end: all of them in random order, again and again.

    Args:
        num_states (`int`): Number of states.
        states_per_iteration (`int`): States of an iteration; fewer where the last of a pass are left.
        generator (`torch.Generator`): Draws the order.
    """
    while True:
        for batch in torch.randperm(num_states, generator=generator).split(states_per_iteration):
            yield batch.tolist()
