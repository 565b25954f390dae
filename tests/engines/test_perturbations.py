from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rgm.engines.perturbations import leave_one_out, random_subsets, ridge_scores


def test_leave_one_out():
    assert leave_one_out(3).tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


@settings(max_examples=50, deadline=None)
@given(num_clusters=st.integers(3, 20), num_masks=st.integers(1, 10), keep=st.floats(0.2, 0.8))
def test_random_subsets_keep_the_same_number_each(num_clusters, num_masks, keep):
    masks = random_subsets(num_clusters, num_masks, keep=keep, seed=1)
    assert masks.shape == (num_masks, num_clusters)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert masks.sum(1).tolist() == [round(keep * num_clusters)] * num_masks


def test_random_subsets_follow_the_seed_and_nothing_else():
    first = random_subsets(10, 5, seed=1)
    torch.rand(3)
    assert torch.equal(first, random_subsets(10, 5, seed=1))
    assert torch.equal(first[:3], random_subsets(10, 3, seed=1))
    assert not torch.equal(first, random_subsets(10, 5, seed=2))
    assert len(torch.unique(first, dim=0)) > 1


@pytest.mark.parametrize(("num_clusters", "keep"), [(4, 0.0), (4, 1.0), (1, 0.5), (10, 0.01)])
def test_shares_that_keep_nothing_or_everything_are_refused(num_clusters, keep):
    with pytest.raises(ValueError, match=f"`keep` = {keep} keeps . of {num_clusters} clusters"):
        random_subsets(num_clusters, 2, keep=keep)


def test_ridge_recovers_a_linear_function():
    masks = (torch.rand(60, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    weights = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    values = masks @ weights.T + torch.tensor([5.0, -3.0, 100.0])
    torch.testing.assert_close(ridge_scores(masks, values, penalty=0.0), weights, atol=1e-4, rtol=1e-4)
    shrunk = ridge_scores(masks, values, penalty=10.0)
    assert (shrunk.norm(dim=1) < 0.3 * weights.norm(dim=1)).all()


def test_ridge_is_the_closed_form_solution():
    generator = torch.Generator().manual_seed(2)
    masks, values = random_subsets(5, 12, seed=3), torch.randn(12, 2, generator=generator)
    x, y = (t - t.mean(0) for t in (masks.double(), values.double()))
    penalty = 0.3 * (x.T @ x).diagonal().mean()
    expected = torch.linalg.inv(x.T @ x + penalty * torch.eye(5)) @ x.T @ y
    torch.testing.assert_close(ridge_scores(masks, values, penalty=0.3), expected.T.float())


def test_fewer_masks_than_clusters_are_solved_too():
    masks = random_subsets(8, 4, seed=0)
    assert torch.isfinite(ridge_scores(masks, torch.randn(4, 2))).all()


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 masks but 2 rows of values"):
        ridge_scores(torch.eye(3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="masks that differ, got 1 equal ones"):
        ridge_scores(torch.ones(1, 3), torch.zeros(1, 1))
