from __future__ import annotations

import numpy as np
import pytest

from hf_rgm.agreement.subsets import count_masks, kept_rows, random_masks
from hf_rgm.clusters.cluster_map import ClusterMap

CLUSTERS = ClusterMap.from_ids([1, 0, 1, 2, 0, 1], names=["a", "b", "c"])


def test_leaving_clusters_out_keeps_the_rows_of_all_others():
    rows = kept_rows(~np.eye(3, dtype=bool), CLUSTERS)
    assert [subset.tolist() for subset in rows] == [[0, 2, 3, 5], [1, 3, 4], [0, 1, 2, 4, 5]]
    assert all(subset.dtype == np.int64 for subset in rows)


def test_masks_of_rows_need_no_clusters():
    assert [subset.tolist() for subset in kept_rows(np.array([[True, False, True]]))] == [[0, 2]]


@pytest.mark.parametrize("num_items", [50, 51])
def test_halves_are_the_draws_the_benchmarks_use(num_items):
    generator = np.random.default_rng(7)
    expected = np.zeros((64, num_items), dtype=bool)
    for mask in expected:
        mask[generator.permutation(num_items)[: num_items // 2]] = True
    np.testing.assert_array_equal(random_masks(num_items, 64, seed=7), expected)
    np.testing.assert_array_equal(random_masks(num_items, 10, seed=7), expected[:10])


def test_no_two_masks_are_alike_down_to_the_last():
    masks = random_masks(5, 10, keep=0.4)
    assert (masks.sum(1) == 2).all()
    assert len({mask.tobytes() for mask in masks}) == 10
    assert random_masks(5, 0).shape == (0, 5)


def test_shares_survive_float_error():
    assert random_masks(100, 1, keep=0.29).sum() == 29


def test_masks_are_counted_no_further_than_needed():
    assert [count_masks(n, k, at_most=100) for n, k in ((4, 2), (6, 3), (5, 1), (7, 7), (50, 25))] == [
        6,
        20,
        5,
        1,
        100,
    ]
    assert count_masks(10**9, 5 * 10**8, at_most=24) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_items": 5, "num_masks": 11, "keep": 0.4}, "at most 10, the ways to keep 2 of 5 items, got 11"),
        ({"num_items": 5, "num_masks": 1, "keep": 0.1}, "keeps 0 of 5"),
        ({"num_items": 5, "num_masks": 1, "keep": 1.0}, "keeps 5 of 5"),
    ],
)
def test_impossible_masks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_masks(**arguments)
