"""When a block of clusters is matched well enough: rounds of iterations, and the quality after each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_rgm.synset.samples import SyntheticSamples

FIRST_ROUND = 10
"""Iterations of the first round. Each later round has twice as many as the one before."""

LEAST_ROUNDS = 2
"""The first round only brings samples near, so two are always made."""

SMALLEST_FACTOR = 0.01
"""A sample of weight 0 could not be learned any more: solving for a weight leaves this share of it."""

SWEEPS = 50
"""Passes of coordinate descent over a cluster's weights."""


def round_lengths(num_iterations: int) -> Iterator[int]:
    """Iterations of each round, doubling. The last is cut so that they sum to `num_iterations`."""
    length = FIRST_ROUND
    while num_iterations > 0:
        yield min(length, num_iterations)
        num_iterations -= length
        length *= 2


@dataclass(frozen=True)
class MatchQuality:
    """How well samples stand for a block of clusters: `error` and `disagreement`, 0 is perfect."""

    # error: |g - G|^2 / |G|^2 over the block's clusters, mean over the states.
    # disagreement: 1 - rank correlation over k of the first-order scores <g_k, G_j> and <G_k, G_j>, mean over
    # clusters j and states.
    error: float
    disagreement: float

    def is_enough(self, before: MatchQuality, tolerance: float) -> bool:
        """Whether to stop, given the best round so far. A tolerance of 0 never stops."""
        if not tolerance:
            return False
        # Nothing is left that could improve by more than the tolerance.
        if max(self.error, self.disagreement) <= tolerance:
            return True
        # The round improved neither by more than that.
        return max(before.error - self.error, before.disagreement - self.disagreement) <= tolerance


@dataclass
class SampleProducts:
    """Inner products of single samples' gradients, relative to the energy of the real gradients at each state."""

    # Among the samples of a cluster, summed over states: (num_clusters, samples_per_cluster, samples_per_cluster).
    gram: Tensor
    # With the real gradients of all clusters: (num_states, num_clusters, samples_per_cluster, num_clusters).
    real: Tensor
    # Of the real gradients with each other: (num_states, num_clusters, num_clusters).
    among_real: Tensor

    def best_factors(self) -> Tensor:
        """Factors of the weights with the smallest matching error: `(num_clusters, samples_per_cluster)`."""
        # g_k = sum_i f_i g_ki is linear in the factors f, so the error is a least-squares problem per cluster:
        # minimise f' A f - 2 b' f with A = gram, b = own products, f >= SMALLEST_FACTOR. Coordinate descent sets
        # f_i = (b_i - sum_{j != i} A_ij f_j) / A_ii in turn, from f = 1. No step raises the error.
        products = self._own().sum(0)
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        factors = torch.ones_like(products)
        for _ in range(SWEEPS):
            for sample in range(factors.shape[1]):
                of_others = (self.gram[:, sample] * factors).sum(1) - diagonal[:, sample] * factors[:, sample]
                best = (products[:, sample] - of_others) / diagonal[:, sample]
                factors[:, sample] = torch.where(diagonal[:, sample] > 0, best.clamp_min(SMALLEST_FACTOR), 1.0)
        return factors

    def quality(self, factors: Tensor) -> MatchQuality:
        """Quality with weights multiplied by `factors`, `(num_clusters, samples_per_cluster)`."""
        # |g - G|^2 = f' A f - 2 b' f + |G|^2, summed over clusters and states.
        squares = torch.einsum("ki,kij,kj->", factors, self.gram, factors)
        error = squares - 2 * (self._own().sum(0) * factors).sum() + self.among_real.diagonal(dim1=1, dim2=2).sum()
        synthetic = torch.einsum("ki,tkij->tkj", factors, self.real)
        return MatchQuality(
            max(0.0, float(error) / len(self.real)), 1 - float(_rank_correlation(synthetic, self.among_real))
        )

    def _own(self) -> Tensor:
        """Products with the real gradient of a sample's own cluster: `(num_states, num_clusters, num_samples)`."""
        return self.real.diagonal(dim1=1, dim2=3).transpose(1, 2)


def scaled(samples: SyntheticSamples, factors: Tensor) -> SyntheticSamples:
    """Samples with weights multiplied by `(num_clusters, samples_per_cluster)` factors, at all positions."""
    shape = (*factors.shape, *[1] * (samples.log_weights.dim() - 2))
    added = factors.log().to(samples.log_weights).reshape(shape)
    return replace(samples, log_weights=samples.log_weights + added)


def _rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation along dimension 1, mean over the others; 1 for a single element."""
    count = first.shape[1]
    if count < 2:
        return torch.ones(())
    ranks = [values.argsort(dim=1, stable=True).argsort(1).double() - (count - 1) / 2 for values in (first, second)]
    # The squares of centred ranks 0 ... n - 1 sum to (n^3 - n) / 12.
    return (ranks[0] * ranks[1]).sum(1).mean() * 12 / (count**3 - count)
