"""Masks of clusters that are present, and scores from values under masks."""

from __future__ import annotations

import torch
from torch import Tensor


def leave_one_out(num_clusters: int) -> Tensor:
    """Masks that drop one cluster each, `(num_clusters, num_clusters)`, float32: `1 - e_k`."""
    return 1 - torch.eye(num_clusters)


def random_subsets(num_clusters: int, num_masks: int, *, keep: float = 0.5, seed: int = 0) -> Tensor:
    """Masks `(num_masks, num_clusters)` of zeros and ones that keep a random share, equally many clusters each."""
    kept = round(keep * num_clusters)
    if not 0 < kept < num_clusters:
        raise ValueError(
            f"`keep` = {keep} keeps {kept} of {num_clusters} clusters. Choose a share that keeps some and drops some."
        )
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(num_masks, num_clusters)
    for mask in masks:
        mask[torch.randperm(num_clusters, generator=generator)[:kept]] = 1
    return masks


def check_masks(masks: Tensor, num_clusters: int) -> None:
    """Raises a `ValueError` unless masks are finite, not negative and of shape `(num_masks, num_clusters)`."""
    if masks.dim() != 2 or masks.shape[1] != num_clusters or not (torch.isfinite(masks) & (masks >= 0)).all():
        raise ValueError(
            f"Masks must be finite, not negative and of shape (num_masks, {num_clusters}), one weight a cluster, "
            f"got shape {tuple(masks.shape)}."
        )


def ridge_scores(masks: Tensor, values: Tensor, *, penalty: float = 1e-2) -> Tensor:
    """
    Cluster scores `(num_values, num_clusters)` by ridge regression of values `(num_masks, num_values)` on masks.

    The least-squares datamodel of the paper: `values ~ masks @ scores + intercept`. The penalty is relative to the
    mean variance of a mask entry.
    """
    if len(masks) != len(values):
        raise ValueError(f"{len(masks)} masks but {len(values)} rows of values. Pass one row of values per mask.")
    centred = (masks - masks.mean(0)).double()
    responses = (values - values.mean(0)).double()
    if not centred.any():
        raise ValueError(f"A regression needs masks that differ, got {len(masks)} equal ones. Draw more masks.")
    gram = centred.T @ centred
    gram += penalty * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, centred.T @ responses).T.float()
