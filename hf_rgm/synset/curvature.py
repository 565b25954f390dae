"""Curvature of the training loss: products with the Gauss-Newton matrix of some samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap

from hf_rgm.modeling import FunctionalModel
from hf_rgm.vectorize import map_rows

CHUNK_BYTES = {True: 2**22, False: 2**28}
"""Of a Jacobian that is taken at once, on the CPU and elsewhere. On the CPU what stays in its caches is fastest."""


class GaussNewton:
    """
    `C = sum over samples s of w_s J_s' (diag p_s - p_s p_s') J_s` at one value of the parameters.

    `J_s` is the Jacobian of the logits of sample s, `p_s` their softmax. Labels play no part, so the samples may be
    synthetic or real. The Jacobian is kept where it fits in memory. Else a product takes it anew, some samples at a
    time, or goes through the model forward (jvp) and back (vjp) for each vector where those are fewer than the labels.
    Products are differentiable in samples and weights.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        samples (`dict[str, Tensor]`): The forward's keyword arguments, first dimension `num_samples`.
        weights (`Tensor`): `(num_samples, *positions)`, float32, `w_s` of each output of the model.
        parameters (`Tensor`): `(num_parameters,)`, where the curvature is taken.
        max_bytes (`int`, *optional*, defaults to `2**30`): Memory for the Jacobian, or for what takes its place.
    """

    def __init__(
        self,
        model: FunctionalModel,
        samples: Mapping[str, Tensor],
        weights: Tensor,
        parameters: Tensor,
        *,
        max_bytes: int = 2**30,
    ) -> None:
        self._model = model
        self._samples = dict(samples)
        self._weights = weights
        self._max_bytes = max_bytes
        self._parameters = model.space.unflatten(parameters)
        self._probabilities = self._logits(self._parameters).softmax(-1)
        self._num_samples = len(self._probabilities)
        self._outputs_per_sample = self._probabilities[0].numel()
        self._samples_at_once = max(1, max_bytes // (4 * self._outputs_per_sample * model.num_parameters))
        fits = self._num_samples <= self._samples_at_once
        self._jacobian = self._explicit_jacobian(self._samples) if fits else None

    def product(self, vectors: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """
        `C v` for each v.

        Args:
            vectors (`Tensor`): `(batch_size, num_parameters)`.
            weights (`Tensor`, *optional*): `(batch_size, num_samples, *positions)`, another `w` for each vector.

        Returns:
            `Tensor`: `(batch_size, num_parameters)`, float32.
        """
        weights = (self._weights[None] if weights is None else weights)[..., None]
        if self._jacobian is not None:
            return self._explicit_product(vectors, self._jacobian, self._probabilities, weights)
        if len(vectors) <= self._outputs_per_sample:
            return self._implicit_product(vectors, weights)
        result = torch.zeros_like(vectors)
        for start in range(0, self._num_samples, self._samples_at_once):
            part = slice(start, start + self._samples_at_once)
            jacobian = self._explicit_jacobian({name: value[part] for name, value in self._samples.items()})
            result = result + self._explicit_product(vectors, jacobian, self._probabilities[part], weights[:, part])
        return result

    def _explicit_product(self, vectors: Tensor, jacobian: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
        changes = (vectors @ jacobian.T).unflatten(1, probabilities.shape)
        return (weights * _covariance_times(probabilities, changes)).flatten(1) @ jacobian

    def _implicit_product(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Some vectors at a time: forward mode holds every activation of the model twice for each."""
        pull_back = vjp(self._logits, self._parameters)[1]
        at_once = max(1, self._max_bytes // (16 * self._probabilities.numel()))
        products = []
        for start in range(0, len(vectors), at_once):
            directions = self._model.space.unflatten(vectors[start : start + at_once])
            changes = vmap(lambda direction: jvp(self._logits, (self._parameters,), (direction,))[1])(directions)
            own = weights if len(weights) == 1 else weights[start : start + at_once]
            scaled = own * _covariance_times(self._probabilities, changes)
            products.append(self._model.space.flatten(vmap(pull_back)(scaled)[0]))
        return torch.cat(products)

    def _logits(self, parameters: dict[str, Tensor]) -> Tensor:
        return self._model.logits(parameters, self._samples)

    def _explicit_jacobian(self, samples: dict[str, Tensor]) -> Tensor:
        """`(num_samples * outputs_per_sample, num_parameters)`."""

        def one(parameters: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
            return self._model.logits(parameters, {name: value[None] for name, value in sample.items()})[0]

        def jacobian(sample: dict[str, Tensor]) -> Tensor:
            return self._model.space.flatten(jacrev(one)(self._parameters, sample))

        num_samples = len(next(iter(samples.values())))
        per_sample = 4 * self._outputs_per_sample * self._model.num_parameters
        at_once = max(1, CHUNK_BYTES[self._model.device.type == "cpu"] // per_sample)
        parts = [slice(start, start + at_once) for start in range(0, num_samples, at_once)]
        pieces = (map_rows(jacobian, {name: value[part] for name, value in samples.items()}) for part in parts)
        if torch.is_grad_enabled():
            return torch.cat(list(pieces)).flatten(0, -2)
        # Filled piece by piece: joining them at the end would take the memory twice.
        result = torch.empty(num_samples, *self._probabilities.shape[1:], self._model.num_parameters)
        result = result.to(self._model.device)
        for part, piece in zip(parts, pieces, strict=True):
            result[part] = piece
        return result.flatten(0, -2)


def _covariance_times(probabilities: Tensor, changes: Tensor) -> Tensor:
    """`(diag p - p p')` times each change of the logits, over the last dimension."""
    return probabilities * (changes - (probabilities * changes).sum(-1, keepdim=True))
