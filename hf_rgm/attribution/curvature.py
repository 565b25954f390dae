"""Curvature of the synset's loss: products with its Gauss-Newton matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap

from hf_rgm.modeling import FunctionalModel
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.matching import SyntheticSamples


class GaussNewton:
    """
    `C = sum over samples s of exp(w_s) J_s' (diag p_s - p_s p_s') J_s` at one value of the parameters.

    `J_s` is the Jacobian of the logits of synthetic sample s, `p_s` their softmax. `C = B' B` with
    `B_s = sqrt(exp(w_s)) diag(sqrt p_s) (I - 1 p_s') J_s`; where B fits in memory it is kept, else products go through
    the model forward (jvp) and back (vjp).

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        inputs (`ContinuousInputs`): How samples become forward arguments.
        samples (`SyntheticSamples`): On the model's device.
        parameters (`Tensor`): `(num_parameters,)`, where the curvature is taken.
        max_bytes (`int`, *optional*, defaults to `2**30`): Memory for B.
    """

    def __init__(
        self,
        model: FunctionalModel,
        inputs: ContinuousInputs,
        samples: SyntheticSamples,
        parameters: Tensor,
        *,
        max_bytes: int = 2**30,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._samples = samples.inputs.flatten(0, 1)
        self._weights = samples.log_weights.flatten().exp()
        self._parameters = model.space.unflatten(parameters)
        with torch.no_grad():
            self._probabilities = self._logits(self._parameters).softmax(-1)
        bytes_needed = 4 * self._probabilities.numel() * model.num_parameters
        self._factor = self._explicit_factor() if bytes_needed <= max_bytes else None

    def product(self, vectors: Tensor) -> Tensor:
        """
        `C v` for each row of `vectors`.

        Args:
            vectors (`Tensor`): `(batch_size, num_parameters)`, float32.

        Returns:
            `Tensor`: `(batch_size, num_parameters)`, float32.
        """
        if self._factor is not None:
            return (vectors @ self._factor.T) @ self._factor
        directions = self._model.space.unflatten(vectors)
        changes = vmap(lambda direction: jvp(self._logits, (self._parameters,), (direction,))[1])(directions)
        p, w = self._probabilities, self._weights
        scaled = w[:, None] * p * (changes - (p * changes).sum(-1, keepdim=True))
        pull_back = vjp(self._logits, self._parameters)[1]
        return self._model.space.flatten(vmap(pull_back)(scaled)[0])

    def _logits(self, parameters: dict[str, Tensor]) -> Tensor:
        return self._model.logits(parameters, self._inputs.to_forward(self._samples))

    def _explicit_factor(self) -> Tensor:
        def one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return self._model.logits(parameters, self._inputs.to_forward(sample[None]))[0]

        jacobian = self._model.space.flatten(vmap(jacrev(one), in_dims=(None, 0))(self._parameters, self._samples))
        p = self._probabilities
        centred = jacobian - torch.einsum("sc,scp->sp", p, jacobian).unsqueeze(1)
        factor = (p * self._weights[:, None]).sqrt().unsqueeze(-1) * centred
        return factor.flatten(0, 1)
