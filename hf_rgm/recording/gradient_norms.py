"""Gradient norms before and after clipping, without waiting for the device."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_rgm.model.sharding import local, whole

SAMPLE_SIZE = 2**14
"""Elements of the gradient that processes average to find the clipping factor."""
UNCLIPPED_MARGIN = 1e-5
ALTERED_MARGIN, SHARED_MARGIN = 1e-5, 2e-2
"""Deviations from one factor for all gradients, relative to their norms, that are rounding: exact, or of averages."""


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
        self._turn = 0  # of the parameter whose gradient's sign is looked at, another one in every update
        self._row: Tensor | None = None  # sum of its first row
        self._max_norm = max_norm
        self._shared = num_processes > 1 and not is_sharded
        self._list = list(self._parameters.values())
        self._rounding = max(ALTERED_MARGIN, *(4 * torch.finfo(p.dtype).eps for p in self._list))
        self._stride = math.ceil(sum(p.numel() for p in self._parameters.values()) / SAMPLE_SIZE)
        self.seconds = 0.0
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._keep, name))
            for name, parameter in self._parameters.items()
        ]

    def _keep(self, name: str, parameter: Tensor) -> None:
        start = time.perf_counter()
        if parameter.grad is not None:
            if self._shared:
                self._before[name] = self._sample(parameter, copy=True)
            else:
                self._before[name] = _norm(parameter.grad)
                if parameter is self._watched:
                    self._row = _first_row(parameter.grad)
        self.seconds += time.perf_counter() - start

    @staticmethod
    def is_own(hook: object) -> bool:
        """Whether a hook of a parameter is one of these."""
        return isinstance(hook, functools.partial) and isinstance(getattr(hook.func, "__self__", None), GradientNorms)

    def measure(self, loss_scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Norm before clipping, factor of clipping, and whether gradients changed otherwise, each `()`."""
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        norms = _stacked(map(_norm, gradients.values()))
        after = torch.linalg.vector_norm(norms)
        one = torch.ones_like(after)
        if self._shared:
            factor, altered = self._sampled_factor(loss_scale)
            # Averages may differ in their last bits without clipping.
            unclipped = after < self._max_norm * (1 - UNCLIPPED_MARGIN) if self._max_norm else one.bool()
            factor = torch.where(unclipped, one, factor.to(after.device).clamp(max=1))
            found = after / factor, factor, altered
        elif gradients.keys() != self._before.keys():
            found = after, one, one.bool()
        else:
            own = _stacked(self._before[name] for name in gradients)
            scaled = torch.linalg.vector_norm(own)
            before = scaled / loss_scale
            # Fused optimizers may undo the scaling of the loss themselves, later.
            factor = torch.where((after == before) | (after == scaled), one, after / before)
            found = before, factor, self._altered(norms, own, torch.where(scaled == 0, one, after / scaled))
        self._before.clear()
        self._row, self._turn = None, self._turn + 1
        return found

    @property
    def _watched(self) -> torch.nn.Parameter:
        return self._list[self._turn % len(self._list)]

    def _altered(self, norms: Tensor, before: Tensor, factor: Tensor) -> Tensor:
        """Whether gradients, of norms `(num_gradients,)`, are not those before times one factor."""
        expected = before * factor
        difference = (norms - expected).abs() - self._rounding * expected
        gradient = self._watched.grad
        if self._row is not None and gradient is not None:
            turned = (_first_row(gradient) - self._row * factor).abs() - self._rounding * _norm(local(gradient))
            difference = torch.cat([difference, turned[None].to(difference.device)])
        return (difference > self._rounding * ALTERED_MARGIN * torch.linalg.vector_norm(expected)).any()

    def _sampled_factor(self, loss_scale: float) -> tuple[Tensor, Tensor]:
        """Factor of clipping, from samples of the gradient averaged over processes, and whether there is no such."""
        own = [self._before.get(name, self._nothing(p)) for name, p in self._parameters.items()]
        averaged = cast(Tensor, reduce(torch.cat(own), reduction="mean")) / loss_scale
        clipped = torch.cat([self._sample(p) for p in self._parameters.values()])
        norm = torch.linalg.vector_norm(clipped)
        factor = norm / torch.linalg.vector_norm(averaged)
        return factor, torch.linalg.vector_norm(clipped - factor * averaged) > SHARED_MARGIN * norm

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


def _first_row(gradient: Tensor) -> Tensor:
    """Sum of the first row of a gradient, `()`, float32; 0 of a sparse one."""
    own = local(gradient.detach())
    if own.is_sparse:
        return torch.zeros((), device=own.device)
    return (own[:1] if own.dim() else own).sum(dtype=torch.float32)


def _stacked(norms: Iterable[Tensor]) -> Tensor:
    """Norms `(num_gradients,)` of whole gradients, one 0 of none."""
    found = [*norms] or [torch.zeros(())]
    return whole(torch.stack([norm.to(found[0].device) for norm in found]))
