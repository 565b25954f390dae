"""Curvature of the training loss: products with the Gauss-Newton matrix of some samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap

from hf_rgm.modeling import FunctionalModel
from hf_rgm.vectorize import map_rows

CHUNK_BYTES = {True: 2**24, False: 2**28}
"""Of a Jacobian that is taken at once, on the CPU and elsewhere. On the CPU what stays in its caches is fastest: of 1
to 256 MB, this was best or near it for a ViT of 18,000 parameters (1.9 times as fast as 4 MB) and CNNs of 6,000 and
20,000."""

MAX_SAMPLES_AT_ONCE = 256
"""Of those that go through the model forward and back: their activations are held meanwhile."""


class GaussNewton:
    """
    `C = sum over samples s of w_s J_s' (diag p_s - p_s p_s') J_s` at one value of the parameters.

    `J_s` is the Jacobian of the logits of sample s, `p_s` their softmax. Labels play no part, so the samples may be
    synthetic or real. The Jacobian is kept where it fits in memory. Else a product goes through some samples at a
    time: it takes their Jacobian anew or, for fewer vectors than labels, the model forward (jvp) and back (vjp) for
    each. Products are differentiable in samples and weights.

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
        self._num_samples = len(next(iter(self._samples.values())))
        self._outputs_per_sample = self._probabilities(self._part(0, 1)).numel()
        self._samples_at_once = max(1, max_bytes // (4 * self._outputs_per_sample * model.num_parameters))
        self._kept: tuple[Tensor, Tensor] | None = None
        if self._num_samples <= self._samples_at_once:
            self._kept = self._explicit_jacobian(self._samples), self._probabilities(self._samples)

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
        if self._kept is not None:
            return self._explicit_product(vectors, *self._kept, weights)
        explicit = len(vectors) > self._outputs_per_sample
        # Forward and back, each vector takes the logits of all samples that go together, some times.
        fitting = max(1, self._max_bytes // (16 * self._outputs_per_sample))
        at_once = self._samples_at_once if explicit else min(MAX_SAMPLES_AT_ONCE, fitting)
        result = torch.zeros_like(vectors)
        for start in range(0, self._num_samples, at_once):
            part, own = self._part(start, start + at_once), weights[:, start : start + at_once]
            if explicit:
                jacobian = self._explicit_jacobian(part)
                result = result + self._explicit_product(vectors, jacobian, self._probabilities(part), own)
                del jacobian  # goes before the next one is made
            else:
                result = result + self._implicit_product(vectors, part, own, max(1, fitting // at_once))
        return result

    def _explicit_product(self, vectors: Tensor, jacobian: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
        changes = (vectors @ jacobian.T).unflatten(1, probabilities.shape)
        return (weights * _covariance_times(probabilities, changes)).flatten(1) @ jacobian

    def _implicit_product(
        self, vectors: Tensor, samples: Mapping[str, Tensor], weights: Tensor, at_once: int
    ) -> Tensor:
        """Some vectors at a time: forward mode holds every activation of the model twice for each."""

        def logits(parameters: dict[str, Tensor]) -> Tensor:
            return self._model.logits(parameters, samples)

        found, pull_back = vjp(logits, self._parameters)[:2]
        probabilities = found.softmax(-1)
        products = []
        for start in range(0, len(vectors), at_once):
            directions = self._model.space.unflatten(vectors[start : start + at_once])
            changes = vmap(lambda direction: jvp(logits, (self._parameters,), (direction,))[1])(directions)
            own = weights if len(weights) == 1 else weights[start : start + at_once]
            scaled = own * _covariance_times(probabilities, changes)
            products.append(self._model.space.flatten(vmap(pull_back)(scaled)[0]))
        return torch.cat(products)

    def _part(self, start: int, stop: int) -> dict[str, Tensor]:
        return {name: value[start:stop] for name, value in self._samples.items()}

    def _probabilities(self, samples: Mapping[str, Tensor]) -> Tensor:
        return self._model.logits(self._parameters, samples).softmax(-1)

    def _explicit_jacobian(self, samples: Mapping[str, Tensor]) -> Tensor:
        """`(num_samples * outputs_per_sample, num_parameters)`."""

        def one(parameters: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
            return self._model.logits(parameters, {name: value[None] for name, value in sample.items()})[0]

        def jacobian(sample: dict[str, Tensor]) -> Tensor:
            return self._model.space.flatten(jacrev(one)(self._parameters, sample))

        num_samples = len(next(iter(samples.values())))
        per_sample = 4 * self._outputs_per_sample * self._model.num_parameters
        # Taking it holds a chunk some times over.
        chunk = min(CHUNK_BYTES[self._model.device.type == "cpu"], self._max_bytes // 16)
        at_once = max(1, chunk // per_sample)
        parts = [slice(start, start + at_once) for start in range(0, num_samples, at_once)]
        pieces = (map_rows(jacobian, {name: value[part] for name, value in samples.items()}) for part in parts)
        if torch.is_grad_enabled():
            return torch.cat(list(pieces)).flatten(0, -2)
        # Filled piece by piece: joining them at the end would take the memory twice.
        result = None
        for part, piece in zip(parts, pieces, strict=True):
            if result is None:
                result = piece.new_empty(num_samples, *piece.shape[1:])
            result[part] = piece
        assert result is not None
        return result.flatten(0, -2)


def _covariance_times(probabilities: Tensor, changes: Tensor) -> Tensor:
    """`(diag p - p p')` times each change of the logits, over the last dimension."""
    return probabilities * (changes - (probabilities * changes).sum(-1, keepdim=True))
