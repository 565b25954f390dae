"""Signs, orientation and formulas of the peers' adapters, on a model whose leave-one-out changes are known exactly."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from benchmarks.peers import PEERS
from benchmarks.peers.captum_tracin import tracin
from benchmarks.peers.common import INSTALL, ensemble, load_peer, prediction
from benchmarks.peers.dattri_dvemb import dvemb
from benchmarks.peers.dattri_influence import conjugate_gradients
from benchmarks.peers.kronfluence_ekfac import ekfac
from benchmarks.peers.trak import trak
from benchmarks.recorded import Prediction
from hf_rgm.agreement.correlations import spearman_by_query
from hf_rgm.trajectory.trajectory import Trajectory
from tests.benchmarks.peers import linear

MODULES = {"captum": "captum.influence", "kronfluence": "kronfluence", "dattri": "dattri.algorithm", "trak": "trak"}
FLOAT32 = 2e-3  # relative to the largest score: float32 solutions of a Hessian with condition number 1e3
NUM_PARAMETERS = (linear.NUM_FEATURES + 1) * linear.NUM_LABELS


def need(peer: str) -> None:
    """Skips the test where a peer is not installed."""
    pytest.importorskip(MODULES[peer], reason=f"{peer} is not installed: {INSTALL}")


@pytest.fixture(scope="module")
def recorded():
    return linear.recorded_run()


def scores_of(method, recorded) -> np.ndarray:
    """Row scores `(num_queries, num_rows)`, after checking the rest of the prediction."""
    result: Prediction = method(recorded, recorded.task.queries)
    assert result.row_scores.shape == (linear.NUM_QUERIES, linear.NUM_ROWS)
    sums = [result.row_scores[:, recorded.task.clusters.rows(k)].sum(1) for k in range(5)]
    np.testing.assert_allclose(result.cluster_scores, np.stack(sums, 1), rtol=1e-4, atol=1e-6)
    assert result.online_seconds > 0
    assert result.details["kept_bytes"] >= 4 * NUM_PARAMETERS
    return result.row_scores


def assert_close(actual: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(actual, expected.numpy(), atol=FLOAT32 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("peer", "method", "at_least"),
    [
        ("captum", tracin(4), 0.5),
        ("kronfluence", ekfac(1e-8), 0.8),
        ("dattri", conjugate_gradients(1e-6, num_iterations=20), 0.95),
        ("dattri", dvemb("mean"), 0.5),
        ("trak", trak(1, regularization=1e-3, projection_dimension=64), 0.8),
    ],
    ids=["TracInCP", "EK-FAC", "conjugate gradients", "DVEmb", "TRAK"],
)
def test_scores_are_positive_where_a_row_raises_the_margin(recorded, peer, method, at_least):
    need(peer)
    scores = scores_of(method, recorded)
    assert spearman_by_query(scores, linear.exact_changes()).mean() > at_least


def test_tracin_is_learning_rates_times_inner_products(recorded):
    need("captum")
    trajectory = Trajectory.load(recorded.folder)
    steps = trajectory.state_steps[1:]
    expected = torch.zeros(linear.NUM_QUERIES, linear.NUM_ROWS, dtype=torch.float64)
    for step in steps:
        parameters = linear.flat(trajectory.state(step).parameters)
        rows = linear.per_row(linear.losses, parameters, recorded.task.train)
        queries = linear.per_row(linear.margins, parameters, recorded.task.queries)
        expected -= trajectory.steps.learning_rates[step - 1, 0] * queries @ rows.T
    assert_close(scores_of(tracin(len(steps)), recorded), expected)


def test_the_last_checkpoint_is_always_used(recorded):
    need("captum")
    trajectory = Trajectory.load(recorded.folder)
    parameters = linear.flat(trajectory.final.parameters)
    rows = linear.per_row(linear.losses, parameters, recorded.task.train)
    queries = linear.per_row(linear.margins, parameters, recorded.task.queries)
    expected = -trajectory.steps.learning_rates[-1, 0] * queries @ rows.T
    assert_close(scores_of(tracin(1), recorded), expected)


def test_conjugate_gradients_solve_with_the_regularised_hessian(recorded):
    need("dattri")
    parameters = linear.flat(dict(recorded.model.named_parameters()))
    damped = linear.mean_hessian(parameters, recorded.task.train) + 0.01 * torch.eye(NUM_PARAMETERS)
    rows = linear.per_row(linear.losses, parameters, recorded.task.train)
    queries = linear.per_row(linear.margins, parameters, recorded.task.queries)
    expected = -queries @ torch.linalg.solve(damped, rows.T)
    assert_close(scores_of(conjugate_gradients(0.01, num_iterations=12), recorded), expected)


def test_the_hessian_of_fewer_rows(recorded):
    need("dattri")
    some = scores_of(conjugate_gradients(0.01, num_iterations=12, num_hessian_rows=30), recorded)
    every = scores_of(conjugate_gradients(0.01, num_iterations=12, num_hessian_rows=linear.NUM_ROWS), recorded)
    assert 0.8 < np.corrcoef(some.ravel(), every.ravel())[0, 1] < 0.9999


@pytest.mark.parametrize("which", [None, "final", "mean"])
def test_embeddings_follow_every_step(recorded, which):
    need("dattri")
    trajectory = Trajectory.load(recorded.folder)
    path = linear.path()
    preconditioner = torch.ones(NUM_PARAMETERS, dtype=torch.float64)
    if which:
        second_moments = [
            linear.flat(trajectory.state(step).moments["exp_avg_sq"]) / (1 - 0.999**step)
            for step in trajectory.state_steps[-1 if which == "final" else 1 :]
        ]
        preconditioner = 1 / (torch.stack(second_moments).mean(0).sqrt() + 1e-8)
    survived = torch.eye(NUM_PARAMETERS, dtype=torch.float64)  # what later steps leave of an earlier change
    embeddings = torch.zeros(linear.NUM_ROWS, NUM_PARAMETERS, dtype=torch.float64)
    for step in range(len(path) - 1, -1, -1):
        rows = trajectory.steps.rows[step]
        gradients = linear.per_row(linear.losses, path[step], recorded.task.train)[rows]
        rate = trajectory.steps.learning_rates[step, 0] / len(rows)
        changes = rate * (gradients * preconditioner) @ survived.T
        embeddings[rows] += changes
        survived = survived - changes.T @ gradients
    queries = linear.per_row(linear.margins, linear.flat(trajectory.final.parameters), recorded.task.queries)
    assert_close(scores_of(dvemb(which), recorded), -queries @ embeddings.T)


def test_trak_is_its_formula_when_projections_lose_nothing(recorded):
    need("trak")
    parameters = linear.flat(dict(recorded.model.named_parameters()))
    rows = linear.per_row(linear.margins, parameters, recorded.task.train)
    queries = linear.per_row(linear.margins, parameters, recorded.task.queries)
    # Margins do not see the common shift of all logits, hence the pseudo-inverse.
    kernel = torch.linalg.pinv(rows.T @ rows, rtol=1e-9)
    weights = torch.sigmoid(-linear.margins(parameters, *linear.arrays(recorded.task.train)))
    expected = (queries @ kernel @ rows.T * weights).numpy()
    actual = scores_of(trak(1, regularization=1e-3, projection_dimension=512), recorded)
    assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.99


def test_an_ensemble_averages_and_its_trainings_count_as_offline(recorded):
    need("trak")
    one, two = (
        trak(size, regularization=1e-3, projection_dimension=64)(recorded, recorded.task.queries) for size in (1, 2)
    )
    # All members reach the same optimum; only their projections differ.
    assert np.corrcoef(one.row_scores.ravel(), two.row_scores.ravel())[0, 1] > 0.95
    assert two.details["kept_bytes"] == 2 * one.details["kept_bytes"]
    assert two.offline_seconds > ensemble(recorded, 2)[1].seconds > 0


def test_members_of_an_ensemble_are_trained_once(recorded):
    members = ensemble(recorded, 3)
    assert members[0].seconds == 0.0
    torch.testing.assert_close(members[0].parameters, dict(recorded.model.named_parameters()))
    assert [again is member for again, member in zip(ensemble(recorded, 2)[1:], members[1:], strict=False)] == [True]
    assert not torch.equal(*(member.parameters["classifier.bias"] for member in members[1:]))


def test_an_ensemble_never_uses_a_seed_of_the_truth(recorded, monkeypatch):
    monkeypatch.setattr(recorded.task, "seeds", (1, 101))
    with pytest.raises(ValueError, match=r"Seeds \[101\] belong to the ground truth"):
        ensemble(recorded, 3)


def test_scores_that_are_not_numbers_are_refused(recorded):
    scores = torch.zeros(2, linear.NUM_ROWS)
    scores[1, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 120 scores are NaN"):
        prediction(recorded, scores, offline_seconds=0.0, online_seconds=1.0, kept_bytes=0)


def test_a_missing_peer_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.influence", None)
    with pytest.raises(ImportError, match=r"captum.influence cannot be imported.*\.\[bench\]"):
        load_peer("captum.influence")


def test_every_peer_has_a_grid():
    assert PEERS
    for name, grid in PEERS.items():
        assert grid and all(callable(method) for method in grid.values()), name
