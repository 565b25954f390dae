"""Gradient norms before and after clipping, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_rgm.model.sharding import whole

SAMPLE_SIZE = 2**14
"""Elements of the gradient that processes average once more to tell the factor of clipping."""
UNCLIPPED_MARGIN = 1e-5


class GradientNorms:
    """
    Measures how much gradient clipping scaled the gradient.

    Callbacks see gradients only after clipping, so a hook on every parameter keeps the norm its gradient had when the
    last backward pass finished. Norms stay on their device; nothing is synchronised.

    Where several processes train together, the hooks see each process's own gradient, before DistributedDataParallel
    averages them. They keep an evenly spread sample of its elements there, whose average is what the sample of the
    clipped gradient is compared with: clipping multiplies all elements by one factor. Where FSDP2 splits the model,
    the hooks see the averaged gradient, and norms are added up over the processes.

    Args:
        parameters (`Mapping[str, torch.nn.Parameter]`): The trainable parameters, by name.
        max_norm (`float`): What gradients are clipped to; 0 for no clipping, which needs no hook.
        num_processes (`int`, *optional*, defaults to `1`): Processes that train together. Each must call
            [`~GradientNorms.measure`] at every update.
        is_sharded (`bool`, *optional*, defaults to `False`): Whether FSDP2 splits the parameters among them.

    Attributes:
        seconds (`float`): Time spent in the hooks so far.
    """

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
        self._stride = -(-sum(p.numel() for p in self._parameters.values()) // SAMPLE_SIZE)
        self.seconds = 0.0
        self._handles: list[RemovableHandle] = []
        if max_norm:
            for name, parameter in self._parameters.items():
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._keeper(name)))

    def _keeper(self, name: str):
        def keep(parameter: Tensor) -> None:
            start = time.perf_counter()
            if parameter.grad is not None:
                self._before[name] = self._sample(parameter, copy=True) if self._shared else _norm(parameter.grad)
            self.seconds += time.perf_counter() - start

        return keep

    def measure(self, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """
        Call between clipping and the optimizer step.

        Args:
            loss_scale (`float`, *optional*, defaults to `1.0`): What the loss was multiplied by for the backward pass
                (mixed precision in fp16); gradients are no longer, by now.

        Returns:
            `tuple[Tensor, Tensor]`: the L2 norm of the whole gradient before clipping, and the factor that clipping
            multiplied it by (exactly 1 if it did nothing). Both `()`, float32, on the gradients' device.
        """
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        after = _total([_norm(gradient) for gradient in gradients.values()])
        one = torch.ones_like(after)
        if not self._max_norm:
            return after, one
        if self._shared:
            factor = self._sampled_factor(loss_scale).to(after.device)
            # Averages may differ in their last bits, which is no clipping.
            factor = torch.where(after < self._max_norm * (1 - UNCLIPPED_MARGIN), one, factor.clamp(max=1))
            return after / factor, factor
        before = _total([self._before[name] for name in gradients if name in self._before]) / loss_scale
        self._before.clear()
        return before, torch.where(after == before, one, after / before)

    def _sampled_factor(self, loss_scale: float) -> Tensor:
        """What clipping multiplied the average over processes by, told from the samples."""
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
        return torch.zeros(-(-parameter.numel() // self._stride), device=parameter.device)

    def remove(self) -> None:
        """Removes the hooks."""
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
