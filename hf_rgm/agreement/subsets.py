"""Which rows the retrainings of a fidelity check keep."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hf_rgm.clusters.cluster_map import ClusterMap


def leave_one_out_masks(num_items: int) -> NDArray[np.bool_]:
    """Masks that drop one item each: `(num_items, num_items)`, bool."""
    return ~np.eye(num_items, dtype=bool)


def random_masks(num_items: int, num_masks: int, *, keep: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """
    Masks that keep a random share of the items, the same number in each, no two alike.

    Args:
        num_items (`int`): Clusters or rows.
        num_masks (`int`): Masks.
        keep (`float`, *optional*, defaults to `0.5`): Share of the items that stays, rounded down to whole items.
        seed (`int`, *optional*, defaults to `0`): Seed. More masks with the same seed begin with the same masks.

    Returns:
        `np.ndarray`: `(num_masks, num_items)`, bool, `True` where an item is kept.

    Raises:
        ValueError: If the share keeps no item or all, or there are fewer such masks than asked for.
    """
    kept = math.floor(keep * num_items + 1e-9)  # 0.29 * 100 is a little less than 29
    if not 0 < kept < num_items:
        raise ValueError(
            f"`keep` = {keep} keeps {kept} of {num_items} items. Choose a share that keeps some and drops some."
        )
    if num_masks > (possible := count_masks(num_items, kept, at_most=num_masks)):
        raise ValueError(
            f"`num_masks` must be at most {possible}, the ways to keep {kept} of {num_items} items, got {num_masks}."
        )
    generator = np.random.default_rng(seed)
    masks: dict[bytes, NDArray[np.bool_]] = {}
    while len(masks) < num_masks:
        mask = np.zeros(num_items, dtype=bool)
        mask[generator.permutation(num_items)[:kept]] = True
        masks.setdefault(mask.tobytes(), mask)
    return np.stack(list(masks.values())) if masks else np.zeros((0, num_items), dtype=bool)


def count_masks(num_items: int, num_kept: int, *, at_most: int) -> int:
    """In how many ways some items can be kept, counted no further than `at_most`."""
    count = 1
    for i in range(1, min(num_kept, num_items - num_kept) + 1):
        count = count * (num_items - i + 1) // i
        if count >= at_most:
            return at_most
    return min(count, at_most)


def kept_rows(masks: NDArray[np.bool_], clusters: ClusterMap | None = None) -> list[NDArray[np.int64]]:
    """
    Row indices that each mask keeps, for [`~hf_rgm.fidelity.retraining.retrain`].

    Args:
        masks (`np.ndarray`): `(num_masks, num_rows)`, bool; with `clusters`, `(num_masks, num_clusters)`.
        clusters (`ClusterMap`, *optional*): Whose clusters the masks keep.

    Raises:
        ValueError: If the masks are not boolean, or not one entry a cluster.

    Example:

    ```python
    >>> from hf_rgm import ClusterMap
    >>> from hf_rgm.agreement.subsets import kept_rows, leave_one_out_masks
    >>> clusters = ClusterMap.from_ids([0, 1, 1, 2])
    >>> [rows.tolist() for rows in kept_rows(leave_one_out_masks(3), clusters)]
    [[1, 2, 3], [0, 3], [0, 1, 2]]

    ```
    """
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.ndim != 2 or (clusters is not None and masks.shape[1] != clusters.num_clusters):
        expected = "num_rows" if clusters is None else f"{clusters.num_clusters} clusters"
        raise ValueError(
            f"`masks` must be boolean of shape (num_masks, {expected}), got {masks.dtype} of shape {masks.shape}."
        )
    return [np.flatnonzero(mask if clusters is None else mask[clusters.cluster_ids]) for mask in masks]
