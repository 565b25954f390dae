"""When a block of clusters is matched well enough: rounds of iterations, and what is looked at between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_rgm.synset.samples import SyntheticSamples

FIRST_ROUND = 10
"""Iterations of the first round, which only brings samples near; every further one has twice as many."""

LEAST_ROUNDS = 2
"""Rounds that are made whatever they bring."""

SMALLEST_FACTOR = 0.01
"""What is left at least of a weight that is solved for: a sample of weight 0 could not be learned any more."""

SWEEPS = 50
"""Times that each weight of a cluster is solved for while the others stay; every one lowers the error."""


def round_lengths(num_iterations: int) -> Iterator[int]:
    """Iterations of each round, doubling; the last is cut so that they sum to `num_iterations`."""
    length = FIRST_ROUND
    while num_iterations > 0:
        yield min(length, num_iterations)
        num_iterations -= length
        length *= 2


@dataclass(frozen=True)
class MatchQuality:
    """
    How well samples stand for a block of clusters: what decides whether another round is worth its time.

    Args:
        error (`float`): Squared distance of the synthetic from the real cluster gradients, relative to the latter's
            squares, mean over the matched states.
        disagreement (`float`): 1 less the rank correlation of scores of first order, the inner products with a
            cluster's real gradient, between synthetic and real gradients of the clusters of the block; mean over
            clusters and states. 0 for a single cluster, which has no order.
    """

    error: float
    disagreement: float

    def is_enough(self, before: MatchQuality, tolerance: float) -> bool:
        """
        Whether to stop: nothing is left that could change by more than `tolerance`, or the round changed less.

        Args:
            before (`MatchQuality`): Of the best round before this one.
            tolerance (`float`): 0 never stops.
        """
        if not tolerance:
            return False
        if max(self.error, self.disagreement) <= tolerance:
            return True
        return max(before.error - self.error, before.disagreement - self.disagreement) <= tolerance


@dataclass
class SampleProducts:
    """
    Inner products of the gradients of single samples: what the weights' closed form and the quality need.

    Args:
        gram (`Tensor`): Among the samples of a cluster, relative to the energy of the real gradients, summed over the
            states: `(num_clusters, samples_per_cluster, samples_per_cluster)`.
        real (`Tensor`): With the real gradients of all clusters, relative to the same, at each state:
            `(num_states, num_clusters, samples_per_cluster, num_clusters)`.
        among_real (`Tensor`): Of the real gradients among themselves, likewise: `(num_states, num_clusters,
            num_clusters)`.
    """

    gram: Tensor
    real: Tensor
    among_real: Tensor

    def best_factors(self) -> Tensor:
        """
        Factors of the samples' weights with the smallest matching error: `(num_clusters, samples_per_cluster)`.

        A cluster's gradient is linear in its samples' weights, so that this is a least-squares problem of a few
        unknowns, none below [`SMALLEST_FACTOR`], solved one unknown at a time from factors of 1. No step raises the
        error.
        """
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
        """The quality if weights are multiplied by `factors`, `(num_clusters, samples_per_cluster)`."""
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
    """Samples with their weights, at all positions, multiplied by `(num_clusters, samples_per_cluster)`."""
    shape = (*factors.shape, *[1] * (samples.log_weights.dim() - 2))
    added = factors.log().to(samples.log_weights).reshape(shape)
    return replace(samples, log_weights=samples.log_weights + added)


def _rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation along dimension 1, mean over the others; 1 where there is but one element."""
    count = first.shape[1]
    if count < 2:
        return torch.ones(())
    ranks = [values.argsort(dim=1, stable=True).argsort(1).double() - (count - 1) / 2 for values in (first, second)]
    return (ranks[0] * ranks[1]).sum(1).mean() * 12 / (count**3 - count)
