"""Gradient norms before and after clipping, without waiting for the device."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from typing import cast

import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_rgm.model.sharding import whole

SAMPLE_SIZE = 2**14
"""Elements of the gradient that processes average to find the clipping factor."""
UNCLIPPED_MARGIN = 1e-5


class GradientNorms:
    """Gradient norms and clipping factors, measured without waiting for the device."""

    # Callbacks see gradients only after clipping, so hooks keep each gradient's norm after the last backward pass.
    # With several processes, hooks run before DistributedDataParallel averages the gradients: they keep samples, whose
    # average is compared with the clipped gradient, as clipping multiplies all elements by one factor. Under FSDP2,
    # hooks see averaged gradients, and norms are added up over processes.

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        max_norm: float,
        num_processes: int = 1,
        is_sharded: bool = False,
    ) -> None:
        self._parameters = dict(parameters)
        self._before: dict[str, Tensor] = {}
        self._max_norm = max_norm
        self._shared = num_processes > 1 and not is_sharded
        self._stride = math.ceil(sum(p.numel() for p in self._parameters.values()) / SAMPLE_SIZE)
        self.seconds = 0.0
        self._handles: list[RemovableHandle] = []
        if max_norm:
            for name, parameter in self._parameters.items():
                keep = functools.partial(self._keep, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(keep))

    def _keep(self, name: str, parameter: Tensor) -> None:
        start = time.perf_counter()
        if parameter.grad is not None:
            self._before[name] = self._sample(parameter, copy=True) if self._shared else _norm(parameter.grad)
        self.seconds += time.perf_counter() - start

    def measure(self, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Norm before clipping and factor of clipping, each `()`; call it between clipping and the optimizer step."""
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        after = _total([_norm(gradient) for gradient in gradients.values()])
        one = torch.ones_like(after)
        if not self._max_norm:
            return after, one
        if self._shared:
            factor = self._sampled_factor(loss_scale).to(after.device)
            # Averages may differ in their last bits without clipping.
            factor = torch.where(after < self._max_norm * (1 - UNCLIPPED_MARGIN), one, factor.clamp(max=1))
            return after / factor, factor
        before = _total([self._before[name] for name in gradients if name in self._before]) / loss_scale
        self._before.clear()
        return before, torch.where(after == before, one, after / before)

    def _sampled_factor(self, loss_scale: float) -> Tensor:
        """Factor of clipping, from samples of the gradient averaged over processes."""
        own = [self._before.get(name, self._nothing(p)) for name, p in self._parameters.items()]
        self._before.clear()
        averaged = cast(Tensor, reduce(torch.cat(own), reduction="mean"))
        clipped = torch.cat([self._sample(p) for p in self._parameters.values()])
        return torch.linalg.vector_norm(clipped) / (torch.linalg.vector_norm(averaged) / loss_scale)

    def _sample(self, parameter: Tensor, *, copy: bool = False) -> Tensor:
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse:
            return self._nothing(parameter)
        return gradient.detach().reshape(-1)[:: self._stride].to(torch.float32, copy=copy)

    def _nothing(self, parameter: Tensor) -> Tensor:
        return torch.zeros(math.ceil(parameter.numel() / self._stride), device=parameter.device)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.linalg.vector_norm(values.detach(), dtype=torch.float32)


def _total(norms: list[Tensor]) -> Tensor:
    if not norms:
        return torch.zeros(())
    return whole(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))
