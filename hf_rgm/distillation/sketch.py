"""Short random projections that keep the lengths of long gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class CountSketch:
    """
    A random linear map that adds every element, with a random sign, to one of a few buckets.

    Inner products are kept on average; for vectors of length one their standard deviation is at most
    `sqrt(2 / dimension)` (Charikar et al. 2002; Weinberger et al. 2009). Costs one pass over the vector and one index
    and sign per element.

    Args:
        num_parameters (`int`): Length of the vectors.
        dimension (`int`): Number of buckets.
        seed (`int`, *optional*, defaults to `0`): Draws buckets and signs.
        device (`torch.device`, *optional*): Of the vectors. Defaults to the CPU.
    """

    def __init__(
        self, num_parameters: int, dimension: int, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dimension = dimension
        self._buckets = torch.randint(dimension, (num_parameters,), generator=generator, dtype=torch.int32).to(device)
        signs = torch.randint(2, (num_parameters,), generator=generator, dtype=torch.int8) * 2 - 1
        self._signs = signs.to(device)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Maps `(..., num_parameters)` to `(..., dimension)`, differentiably."""
        result = vectors.new_zeros(*vectors.shape[:-1], self.dimension)
        return result.index_add(-1, self._buckets, vectors * self._signs)


def identity(vectors: Tensor) -> Tensor:
    """The vectors themselves: what stands for a sketch where gradients fit in memory."""
    return vectors
