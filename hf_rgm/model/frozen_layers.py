"""Frozen layers with weights in 16 bits: these stay as they are, and are float32 only while they are multiplied."""

from __future__ import annotations

import types
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


class _Product(torch.autograd.Function):
    """`x @ weight.T` in the dtype of x; backward passes keep the frozen weight `(num_outputs, num_inputs)` itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.to(x.dtype).T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(gradients[0], ctx.saved_tensors[0].T), None  # type: ignore[return-value]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _Product.apply(tangents[0], ctx.saved_tensors[0])  # type: ignore[return-value]


def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    product: Any = _Product.apply(input.to(torch.float32), self.weight)
    return product if self.bias is None else product + self.bias


def _embedding(self: nn.Embedding, input: Tensor) -> Tensor:
    return nn.Embedding.forward(self, input).float()


_FORWARDS = {nn.Linear: _linear, nn.Embedding: _embedding}


def _keeps(module: nn.Module) -> bool:
    """Whether a layer computes in float32 with a weight in 16 bits."""
    return type(module) in _FORWARDS and module.weight.dtype in (torch.bfloat16, torch.float16)  # type: ignore


def kept_in_16_bits(model: nn.Module, trained: Collection[str]) -> set[int]:
    """`id`s of the frozen weights in 16 bits that stay so."""
    trained_ids = {id(parameter) for name, parameter in model.named_parameters() if name in trained}
    weights = (module.weight for module in model.modules() if _keeps(module))
    return {id(weight) for weight in weights} - trained_ids


def to_float(model: nn.Module, kept: Collection[int]) -> nn.Module:
    """The model in float32, but for frozen weights in 16 bits that are kept, by `id`."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.float()
    for module in model.modules():
        if _keeps(module):
            module.forward = types.MethodType(_FORWARDS[type(module)], module)
    return model
