"""Short random projections that keep the lengths of long gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class CountSketch:
    """A random linear map: adds every element of a vector, with a random sign, to one of `dimension` buckets."""

    # Inner products are kept on average. For vectors of length 1 their standard deviation is at most
    # sqrt(2 / dimension) (Charikar et al. 2002; Weinberger et al. 2009).
    def __init__(
        self, num_parameters: int, dimension: int, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dimension = dimension
        self._buckets = torch.randint(dimension, (num_parameters,), generator=generator, dtype=torch.int32).to(device)
        signs = torch.randint(2, (num_parameters,), generator=generator, dtype=torch.int8) * 2 - 1
        self._signs = signs.to(device)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Sketches `(..., dimension)` of vectors `(..., num_parameters)`, differentiable."""
        result = vectors.new_zeros(*vectors.shape[:-1], self.dimension)
        return result.index_add(-1, self._buckets, vectors * self._signs)
