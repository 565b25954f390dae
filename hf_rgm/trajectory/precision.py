"""Recorded states in fewer bits: parameters as differences from the trained ones, moments rounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PRECISIONS = ("float32", "bfloat16", "int8")
BLOCK_SIZE = 256
SCALE_SUFFIX = "_scale"
_LEVELS = 127
_LOG_LEVELS = 254


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"The precision of states must be one of {', '.join(PRECISIONS)}, got {precision!r}.")


def scale_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scale that belongs to an int8 tensor."""
    if kind == "exp_avg_sq":
        return (2,)
    return (math.ceil(math.prod(shape) / BLOCK_SIZE),)


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a float32 tensor to int8, with one scale for each block of 256 elements: `(num_blocks,)`, float32."""
    values, scale = quantize_rows(_blocks(tensor))
    return values.flatten()[: tensor.numel()].view(tensor.shape), scale


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds `(num_rows, row_length)` to int8, with one scale for each row: `(num_rows,)`, float32."""
    scale = rows.abs().amax(1) / _LEVELS if rows.shape[1] else rows.new_zeros(len(rows))
    rounded = (rows / scale.clamp_min(torch.finfo(scale.dtype).tiny)[:, None]).round().clamp(-_LEVELS, _LEVELS)
    return rounded.to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantize`, up to rounding."""
    return (_blocks(values.float()) * scale[:, None]).flatten()[: values.numel()].view(values.shape)


def quantize_logarithm(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds logarithms of a tensor >= 0 to uint8 (0 stays 0), with the lowest and their distance: `(2,)`, float32."""
    positive = tensor > 0
    logarithms = tensor.clamp_min(torch.finfo(tensor.dtype).tiny).log2()
    present = logarithms[positive]
    low, high = (present.min(), present.max()) if len(present) else (torch.zeros(()), torch.zeros(()))
    step = (high - low) / _LOG_LEVELS
    levels = ((logarithms - low) / step.clamp_min(torch.finfo(step.dtype).tiny)).round().clamp(0, _LOG_LEVELS) + 1
    return torch.where(positive, levels, torch.zeros_like(levels)).to(torch.uint8), torch.stack([low, step])


def dequantize_logarithm(values: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantize_logarithm`, up to rounding."""
    powers = torch.exp2(scale[0] + scale[1] * (values.float() - 1))
    return torch.where(values > 0, powers, torch.zeros_like(powers))


def _blocks(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
