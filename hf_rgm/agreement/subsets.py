"""Subsets of clusters or rows for retraining."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import comb

from hf_rgm.clusters.cluster_map import ClusterMap


def random_masks(num_items: int, num_masks: int, *, keep: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """Different masks `(num_masks, num_items)` that keep a share; more masks begin with the same ones."""
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
    """Ways to keep some items, counted no further than `at_most`."""
    return round(min(comb(num_items, num_kept), at_most))  # floats: exact far beyond any `at_most`, or infinite


def kept_rows(masks: NDArray[np.bool_], clusters: ClusterMap | None = None) -> list[NDArray[np.int64]]:
    """Row indices that each mask keeps: `(num_masks, num_rows)` or, with `clusters`, `(num_masks, num_clusters)`."""
    return [np.flatnonzero(mask if clusters is None else mask[clusters.cluster_ids]) for mask in masks]
