from __future__ import annotations

import numpy as np
import pytest

from benchmarks.distances import average_distance


def test_distances_of_outputs_by_hand():
    """Softmaxes (1/2, 1/2) and (1/4, 3/4)."""
    predicted, retrained = np.zeros((6, 2, 2)), np.zeros((6, 2, 2))
    retrained[..., 1] = np.log(3)
    distances = average_distance(predicted, retrained)
    assert {name: estimate.value for name, estimate in distances.items()} == pytest.approx(
        {"softmax_l2": np.sqrt(2) / 4, "cross_entropy": np.log(2), "logits_l2": np.log(3)}
    )
    reverse = average_distance(retrained, predicted)
    assert reverse["cross_entropy"].value == pytest.approx(-(np.log(1 / 4) + np.log(3 / 4)) / 2)
    for estimate in distances.values():
        assert estimate.low == pytest.approx(estimate.value) == estimate.high


def test_distances_vanish_for_equal_outputs_and_have_intervals():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(8, 10, 3))
    same = average_distance(logits, logits)
    assert same["softmax_l2"].value == same["logits_l2"].value == 0
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert same["cross_entropy"].value == pytest.approx(-(probabilities * np.log(probabilities)).sum(-1).mean())
    moved = average_distance(logits + generator.normal(size=logits.shape), logits, seed=3)
    assert all(0 < e.low < e.value < e.high for e in moved.values())
    assert average_distance(logits[:4], logits[1:5])["logits_l2"].low is None


@pytest.mark.parametrize(
    ("predicted", "retrained", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), r"logits of shape \(num_models, num_queries, num_labels\)"),
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 5)), "must be alike"),
        (np.zeros((0, 3, 4)), np.zeros((0, 3, 4)), "not empty"),
        (np.zeros((2, 3, 4)), np.full((2, 3, 4), np.nan), "`retrained` has 24 NaN"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(predicted, retrained, message):
    with pytest.raises(ValueError, match=message):
        average_distance(predicted, retrained)
