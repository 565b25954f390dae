"""Gradient norms before and after clipping, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class GradientNorms:
    """
    Measures how much gradient clipping scaled the gradient.

    Callbacks see gradients only after clipping, so a hook on every parameter keeps the norm its gradient had when the
    last backward pass finished. Norms stay on their device; nothing is synchronised.

    Args:
        parameters (`Mapping[str, torch.nn.Parameter]`): The trainable parameters, by name.
        clipping (`bool`): Whether gradients are clipped at all. Without clipping no hook is needed.

    Attributes:
        seconds (`float`): Time spent in the hooks so far.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, clipping: bool) -> None:
        self._parameters = dict(parameters)
        self._before: dict[str, Tensor] = {}
        self._clipping = clipping
        self.seconds = 0.0
        self._handles: list[RemovableHandle] = []
        if clipping:
            for name, parameter in self._parameters.items():
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._keeper(name)))

    def _keeper(self, name: str):
        def keep(parameter: Tensor) -> None:
            start = time.perf_counter()
            if parameter.grad is not None:
                self._before[name] = _norm(parameter.grad)
            self.seconds += time.perf_counter() - start

        return keep

    def measure(self) -> tuple[Tensor, Tensor]:
        """
        Call between clipping and the optimizer step.

        Returns:
            `tuple[Tensor, Tensor]`: the L2 norm of the whole gradient before clipping, and the factor that clipping
            multiplied it by (exactly 1 if it did nothing). Both `()`, float32, on the gradients' device.
        """
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        after = _total([_norm(gradient) for gradient in gradients.values()])
        if not self._clipping:
            return after, torch.ones_like(after)
        before = _total([self._before[name] for name in gradients if name in self._before])
        self._before.clear()
        return before, torch.where(after == before, torch.ones_like(after), after / before)

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
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
