"""Comparison of two gradients of the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """The gradient of a batch under the Trainer's own loss against that of the mean loss of its labels or rows."""

    cosine: float
    ratio: float
    count: int  # labels, or rows
    counted: int  # as a Trainer may count them, with or without the first of a text, whatever is predicted
    norm: float  # of the mean's gradient
    rows: NDArray[np.int64]


def compared(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], counts: tuple[int, int], rows: NDArray[np.int64]
) -> Comparison:
    """Cosine and ratio of the trained gradient, `theirs`, to ours, by parameter."""
    products = torch.zeros(3, dtype=torch.float64)
    for name, own in ours.items():
        other = theirs[name].to(own.device)
        for index, (one, two) in enumerate(((own, own), (other, other), (own, other))):
            products[index] += torch.sum(one * two, dtype=torch.float64).cpu()
    squared, squared_own, product = products.tolist()
    if not np.isfinite(squared_own + squared):
        raise ValueError(
            f"The gradient of rows {rows.tolist()} is NaN or infinite. Check these rows, the weights, and "
            "whether the model takes bf16 or fp16."
        )
    if squared == squared_own == 0:
        return Comparison(1.0, 1.0, *counts, 0.0, rows)
    if squared == 0:
        return Comparison(0.0, float("inf"), *counts, 0.0, rows)
    cosine = product / max(1e-300, (squared * squared_own) ** 0.5)
    return Comparison(cosine, product / squared, *counts, squared**0.5, rows)
