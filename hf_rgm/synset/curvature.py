"""Curvature of the training loss: products with the Gauss-Newton matrix of some samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap

from hf_rgm.modeling import FunctionalModel
from hf_rgm.synset.inputs import ContinuousInputs


class GaussNewton:
    """
    `C = sum over samples s of w_s J_s' (diag p_s - p_s p_s') J_s` at one value of the parameters.

    `J_s` is the Jacobian of the logits of sample s, `p_s` their softmax. Labels play no part, so the samples may be
    synthetic or real. The Jacobian is kept where it fits in memory. Else a product takes it anew, some samples at a
    time, or goes through the model forward (jvp) and back (vjp) for each vector where those are fewer than the labels.
    Products are differentiable in samples and weights.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        inputs (`ContinuousInputs`): How samples become forward arguments.
        samples (`Tensor`): `(num_samples, *input_shape)`, float32.
        weights (`Tensor`): `(num_samples,)`, float32, `w_s`.
        parameters (`Tensor`): `(num_parameters,)`, where the curvature is taken.
        max_bytes (`int`, *optional*, defaults to `2**30`): Memory for the Jacobian.
    """

    def __init__(
        self,
        model: FunctionalModel,
        inputs: ContinuousInputs,
        samples: Tensor,
        weights: Tensor,
        parameters: Tensor,
        *,
        max_bytes: int = 2**30,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._samples = samples
        self._weights = weights
        self._parameters = model.space.unflatten(parameters)
        self._probabilities = self._logits(self._parameters).softmax(-1)
        per_sample = 4 * self._probabilities.shape[1] * model.num_parameters
        self._samples_at_once = max(1, max_bytes // per_sample)
        self._jacobian = self._explicit_jacobian(samples) if len(samples) <= self._samples_at_once else None

    def product(self, vectors: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """
        `C v` for each row of `vectors`.

        Args:
            vectors (`Tensor`): `(batch_size, num_parameters)`, float32.
            weights (`Tensor`, *optional*): `(batch_size, num_samples)`, other weights of the samples for each row.

        Returns:
            `Tensor`: `(batch_size, num_parameters)`, float32.
        """
        weights = (self._weights if weights is None else weights)[..., None]
        if self._jacobian is not None:
            return self._explicit_product(vectors, self._jacobian, self._probabilities, weights)
        if len(vectors) <= self._probabilities.shape[1]:
            return self._implicit_product(vectors, weights)
        result = torch.zeros_like(vectors)
        for start in range(0, len(self._samples), self._samples_at_once):
            part = slice(start, start + self._samples_at_once)
            jacobian = self._explicit_jacobian(self._samples[part])
            result = result + self._explicit_product(
                vectors, jacobian, self._probabilities[part], weights[..., part, :]
            )
        return result

    def _explicit_product(self, vectors: Tensor, jacobian: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
        changes = (vectors @ jacobian.T).unflatten(1, probabilities.shape)
        return (weights * _covariance_times(probabilities, changes)).flatten(1) @ jacobian

    def _implicit_product(self, vectors: Tensor, weights: Tensor) -> Tensor:
        directions = self._model.space.unflatten(vectors)
        changes = vmap(lambda direction: jvp(self._logits, (self._parameters,), (direction,))[1])(directions)
        pull_back = vjp(self._logits, self._parameters)[1]
        scaled = weights * _covariance_times(self._probabilities, changes)
        return self._model.space.flatten(vmap(pull_back)(scaled)[0])

    def _logits(self, parameters: dict[str, Tensor]) -> Tensor:
        return self._model.logits(parameters, self._inputs.to_forward(self._samples))

    def _explicit_jacobian(self, samples: Tensor) -> Tensor:
        """`(num_samples * num_labels, num_parameters)`."""

        def one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return self._model.logits(parameters, self._inputs.to_forward(sample[None]))[0]

        jacobian = vmap(jacrev(one), in_dims=(None, 0))(self._parameters, samples)
        return self._model.space.flatten(jacobian).flatten(0, 1)


def _covariance_times(probabilities: Tensor, changes: Tensor) -> Tensor:
    """`(diag p - p p')` times each change of the logits: `(batch_size, num_samples, num_labels)`."""
    return probabilities * (changes - (probabilities * changes).sum(-1, keepdim=True))
