"""Whether replayed models still fit what they were trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALL = 0.05
"""Of the way to the replayed parameters, for a derivative by central differences."""


class DriftMeter:
    """
    How far replayed parameters are from where training under their cluster weights could have led (docs/method.md,
    how far back).

    Training under weights p lowers the loss `L_p = sum_k p_k L_k` of the clusters as they are weighted. Without some
    of them it ends a little elsewhere, and that loss changes a little: to first order by its derivative along the way
    (which is not 0, as training seldom goes on to the end), and little beyond that, whatever becomes of the clusters
    that are gone. A replay that goes back too far for its approximation does otherwise: its error grows along the way,
    and breaks what it should have kept. Drift is the change beyond first order, made free of units:

        |L_p(replayed) - L_p(trained) - derivative| / (V * (L_p(initial) - L_p(trained)))

    or, where that is more, what the loss rises by in units of what was learned, whatever the order,

        (L_p(replayed) - L_p(trained)) / (L_p(initial) - L_p(trained)),

    with `V` the share of the data that changes: the total variation distance of the mixtures under p and under 1. All
    losses are those of the synthetic samples, or of some training rows where they are given; neither queries nor
    retraining are needed.

    Args:
        losses (`Callable`): What each cluster adds to the training loss, `(num_clusters,)`, float64, at parameters
            `(num_parameters,)`.
        sizes (`Tensor`): `(num_clusters,)`, rows of each cluster.
        initial, final (`Tensor`): `(num_parameters,)`, the first and the last recorded state.
    """

    def __init__(self, losses: Callable[[Tensor], Tensor], sizes: Tensor, *, initial: Tensor, final: Tensor) -> None:
        self._losses = losses
        self._shares = sizes.double() / sizes.sum()
        self._final = final
        self._trained = self._losses(final)
        self._progress = self._losses(initial) - self._trained

    def drifts(self, parameters: Tensor, masks: Tensor) -> Tensor:
        """
        Drift of each replayed model; 0 where its weights are those of the recorded run, or that run learned nothing.

        Args:
            parameters (`Tensor`): `(num_masks, num_parameters)`.
            masks (`Tensor`): `(num_masks, num_clusters)`, the weight p of each cluster.

        Returns:
            `Tensor`: `(num_masks,)`, float64, on the CPU; at least 0, infinite where a loss is not finite.
        """
        changes, derivatives = (torch.stack(part) for part in zip(*map(self._changes, parameters), strict=True))
        return self.relative(changes, derivatives, masks)

    def relative(self, changes: Tensor, derivatives: Tensor, masks: Tensor) -> Tensor:
        """
        Drift by what changes in the clusters' losses.

        Args:
            changes, derivatives (`Tensor`): `(num_masks, num_clusters)`, of each cluster's loss, and to first order.
            masks (`Tensor`): `(num_masks, num_clusters)`, the weight p of each cluster.

        Returns:
            `Tensor`: `(num_masks,)`, float64, on the CPU; at least 0, infinite where a loss is not finite.
        """
        weights, changes, derivatives = (part.detach().cpu().double() for part in (masks, changes, derivatives))
        mixtures = weights * self._shares
        variation = 0.5 * (mixtures / mixtures.sum(1, keepdim=True) - self._shares).abs().sum(1)
        learned = weights @ self._progress
        scale = variation * learned
        drifts = (weights * (changes - derivatives)).sum(1).abs() / scale
        # Whatever its order: what stays is not unlearned.
        drifts = torch.maximum(drifts, (weights * changes).sum(1) / learned)
        drifts = torch.where(scale > 1e-9, drifts, 0.0)
        return torch.where(torch.isfinite(scale), drifts, torch.inf).nan_to_num(nan=torch.inf)

    def _changes(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Change of each cluster's loss from the trained parameters, and to first order: `(num_clusters,)` each."""
        way = vector.to(self._final.device) - self._final
        derivative = self._losses(self._final + SMALL * way) - self._losses(self._final - SMALL * way)
        return self._losses(vector) - self._trained, derivative / (2 * SMALL)
