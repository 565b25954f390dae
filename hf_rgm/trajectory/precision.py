"""Recorded states in fewer bits: parameters as differences from the trained ones, moments rounded."""

from __future__ import annotations

import torch
from torch import Tensor

PRECISIONS = ("float32", "bfloat16", "int8")
BLOCK_SIZE = 256
SCALE_SUFFIX = "_scale"
_LEVELS = 127
_LOG_LEVELS = 254


def check_precision(precision: str) -> None:
    """Raises a `ValueError` unless the precision is known."""
    if precision not in PRECISIONS:
        raise ValueError(f"The precision of states must be one of {', '.join(PRECISIONS)}, got {precision!r}.")


def scale_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scale that belongs to a tensor in int8."""
    if kind == "exp_avg_sq":
        return (2,)
    num_elements = 1
    for size in shape:
        num_elements *= size
    return (-(-num_elements // BLOCK_SIZE),)


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """
    Rounds to 8 bits, evenly between the extremes of each block of 256 elements.

    Args:
        tensor (`Tensor`): Of any shape, float32.

    Returns:
        `tuple[Tensor, Tensor]`: int8 of the same shape, and the scale of each block, `(num_blocks,)`, float32.
    """
    values, scale = quantize_rows(_blocks(tensor))
    return values.flatten()[: tensor.numel()].view(tensor.shape), scale


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """
    Rounds to 8 bits, evenly between the extremes of each row.

    Args:
        rows (`Tensor`): `(num_rows, row_length)`, float32.

    Returns:
        `tuple[Tensor, Tensor]`: int8 of the same shape, and the scale of each row, `(num_rows,)`, float32.
    """
    scale = rows.abs().amax(1) / _LEVELS if rows.shape[1] else rows.new_zeros(len(rows))
    rounded = (rows / scale.clamp_min(torch.finfo(scale.dtype).tiny)[:, None]).round().clamp(-_LEVELS, _LEVELS)
    return rounded.to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """The inverse of [`quantize`], up to rounding: float32 of the shape of `values`."""
    return (_blocks(values.float()) * scale[:, None]).flatten()[: values.numel()].view(values.shape)


def quantize_logarithm(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """
    Rounds the logarithms of positive numbers to 8 bits; zero stays zero.

    Args:
        tensor (`Tensor`): Of any shape, float32, not negative.

    Returns:
        `tuple[Tensor, Tensor]`: uint8 of the same shape, and the smallest logarithm (base 2) with the distance between
        neighbours, `(2,)`, float32.
    """
    positive = tensor > 0
    logarithms = tensor.clamp_min(torch.finfo(tensor.dtype).tiny).log2()
    present = logarithms[positive]
    low, high = (present.min(), present.max()) if len(present) else (torch.zeros(()), torch.zeros(()))
    step = (high - low) / _LOG_LEVELS
    levels = ((logarithms - low) / step.clamp_min(torch.finfo(step.dtype).tiny)).round().clamp(0, _LOG_LEVELS) + 1
    return torch.where(positive, levels, torch.zeros_like(levels)).to(torch.uint8), torch.stack([low, step])


def dequantize_logarithm(values: Tensor, scale: Tensor) -> Tensor:
    """The inverse of [`quantize_logarithm`], up to rounding: float32 of the shape of `values`."""
    powers = torch.exp2(scale[0] + scale[1] * (values.float() - 1))
    return torch.where(values > 0, powers, torch.zeros_like(powers))


def _blocks(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
