"""Drift: whether replayed models still fit what they were trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALL = 0.05
"""Of the way to the replayed parameters, for a derivative by central differences."""


class DriftMeter:
    """
    Distance of replayed parameters from where training under their weights could have led (docs/method.md, how far
    back).

    Training under weights p lowers the loss `L_p = sum_k p_k L_k`; without some clusters it changes this loss little
    beyond first order. A replay that goes back too far breaks what it should have kept. Drift is the larger of

        |L_p(replayed) - L_p(trained) - derivative| / (V * (L_p(initial) - L_p(trained)))
        (L_p(replayed) - L_p(trained)) / (L_p(initial) - L_p(trained))

    with `V` the share of the data that changes: the total variation distance of the mixtures under p and under 1. The
    derivative is that along the way; it is not 0, since training seldom runs to the end.
    """

    def __init__(
        self,
        losses: Callable[[Tensor], Tensor],
        sizes: Tensor,
        *,
        initial: Tensor,
        final: Tensor,
        initial_loss: float | None = None,
    ) -> None:
        self._losses = losses  # (num_parameters,) -> (num_clusters,), float64: summands of the training loss
        self._shares = sizes.double() / sizes.sum()
        self._final = final
        self._trained = self._losses(final)
        before = self._losses(initial)
        self._progress = before - self._trained
        if initial_loss is not None:  # `initial` is a later state: what clusters lost before it is not known of each
            self._progress = self._shares * (max(initial_loss, float(before.sum())) - self._trained.sum())

    def drifts(self, parameters: Tensor, masks: Tensor) -> Tensor:
        """Drift of models `(num_masks, num_parameters)` under their masks: `(num_masks,)`, see `relative`."""
        changes, derivatives = (torch.stack(part) for part in zip(*map(self._changes, parameters), strict=True))
        return self.relative(changes, derivatives, masks)

    def relative(self, changes: Tensor, derivatives: Tensor, masks: Tensor) -> Tensor:
        """
        Drift by the changes of the clusters' losses, and these to first order; all `(num_masks, num_clusters)`.

        `(num_masks,)`, float64, CPU, at least 0: infinite where a loss is not finite, 0 where the weights are those of
        the recorded run or that run learned nothing.
        """
        weights, changes, derivatives = (part.detach().cpu().double() for part in (masks, changes, derivatives))
        mixtures = weights * self._shares
        variation = 0.5 * (mixtures / mixtures.sum(1, keepdim=True) - self._shares).abs().sum(1)
        learned = weights @ self._progress
        scale = variation * learned
        drifts = (weights * (changes - derivatives)).sum(1).abs() / scale
        # Whatever its order: what stays must not be unlearned.
        drifts = torch.maximum(drifts, (weights * changes).sum(1) / learned)
        drifts = torch.where(scale > 1e-9, drifts, 0.0)
        return torch.where(torch.isfinite(scale), drifts, torch.inf).nan_to_num(nan=torch.inf)

    def _changes(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Change of each cluster's loss from the trained parameters, and to first order: `(num_clusters,)` each."""
        way = vector.to(self._final.device) - self._final
        derivative = self._losses(self._final + SMALL * way) - self._losses(self._final - SMALL * way)
        return self._losses(vector) - self._trained, derivative / (2 * SMALL)
