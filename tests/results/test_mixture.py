from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import pipeline

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.objectives import OBJECTIVES, Objective, log_odds_margin
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.functional_model import parameters_sha256
from hf_rgm.results.mixture import MixtureSuggestion, mixture_weights, trusted_mixture
from hf_rgm.synset.matched_states import MatchedState
from hf_rgm.synset.synset import Synset
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.recorded import engine_parts, record

RUN = tiny_recorded_run()
FLOAT_TOLERANCE = 1e-4
"""Float32 adjoint and replay against float64 retraining, relative to objectives of order one."""
NUM_DRAWS = 400


@pytest.fixture(scope="module")
def attributor():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True)


class ConvexProblem:
    """
    Logistic regression by full-batch SGD whose synset is its rows: the adjoint is the derivative of retraining, and
    replay is retraining, so that every prediction has its exact value to compare with.
    """

    def __init__(self, rows_per_cluster: int = 3) -> None:
        self.run = record("sgd", num_steps=30)
        _, _, samples = engine_parts(self.run, rows_per_cluster)
        num_clusters = len(samples.log_weights)
        self.clusters = ClusterMap.from_ids(np.repeat(np.arange(num_clusters), rows_per_cluster))
        self.synset = Synset(
            samples=samples,
            clusters=self.clusters,
            trajectories=(self.run.trajectory,),
            residuals=torch.zeros(1, num_clusters),
            matched_states=(MatchedState(0, self.run.trajectory.num_steps),),
            parameters_sha256=parameters_sha256(dict(self.run.model.named_parameters())),
            input_name="features",
        )
        self.attributor = Attributor(self.run.model, self.synset, disable_tqdm=True)
        generator = torch.Generator().manual_seed(5)
        self.features = torch.randn(8, 5, generator=generator)
        self.labels = torch.randint(3, (8,), generator=generator)
        self.queries = [{"features": x, "labels": int(y)} for x, y in zip(self.features, self.labels, strict=True)]

    def retrained(self, weights: torch.Tensor, objective: str) -> torch.Tensor:
        """Mean objective of the model retrained with cluster weights, differentiable in them."""
        parameters = self.run.train(weights.double()[torch.tensor(self.clusters.cluster_ids)])
        model = self.attributor.model
        logits = model.logits(model.space.unflatten(parameters), {"features": self.features.double()})
        if objective == "margin":
            return log_odds_margin(logits, self.labels).mean()
        return F.cross_entropy(logits, self.labels)


@pytest.fixture(scope="module")
def convex():
    return ConvexProblem()


@pytest.mark.parametrize("objective", ["margin", "mean_loss"])
def test_scores_are_the_derivative_of_retraining_by_the_weights(convex, objective, monkeypatch):
    monkeypatch.setattr("hf_rgm.trajectory.exposure.states_by_epochs", lambda trajectory: trajectory.num_steps + 1)
    attributor = Attributor(convex.run.model, convex.synset, disable_tqdm=True)
    mixture = attributor.suggest_mixture(convex.queries, objective=objective, rewind=0)
    derivative = torch.autograd.functional.jacobian(
        lambda weights: convex.retrained(weights, objective), torch.ones(4, dtype=torch.float64)
    )
    np.testing.assert_allclose(mixture.scores, derivative.numpy(), rtol=1e-3, atol=FLOAT_TOLERANCE)
    assert mixture.linear_change == pytest.approx(float(derivative.numpy() @ (mixture.weights - 1)), rel=1e-2)


@pytest.mark.parametrize("max_change", [1.1, 3.0])
@pytest.mark.parametrize(("objective", "sign"), [("margin", 1), ("mean_loss", -1)])
def test_the_predicted_change_is_that_of_retraining_with_the_weights(convex, objective, sign, max_change):
    mixture = convex.attributor.suggest_mixture(convex.queries, objective=objective, rewind=0, max_change=max_change)
    before, after = (
        float(convex.retrained(torch.as_tensor(weights), objective)) for weights in (np.ones(4), mixture.weights)
    )
    assert mixture.objective_value == pytest.approx(before, abs=FLOAT_TOLERANCE)
    assert mixture.predicted_change == pytest.approx(after - before, abs=FLOAT_TOLERANCE)
    assert sign * (after - before) > 10 * FLOAT_TOLERANCE


def test_small_changes_are_linear(convex):
    """The relative error of the first-order prediction goes to nothing with the step."""
    errors = []
    for max_change in (4.0, 1.5):
        mixture = convex.attributor.suggest_mixture(convex.queries, rewind=0, max_change=max_change)
        errors.append(abs(mixture.predicted_change - mixture.linear_change) / mixture.linear_change)
    assert errors[1] < 0.2 * errors[0] < 0.05


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 100)), min_size=2, max_size=12),
    st.floats(1.01, 20),
)
def test_weights_keep_the_total_the_bounds_and_the_order(clusters, max_change):
    scores, sizes = (np.array(values) for values in zip(*clusters, strict=True))
    per_row = scores / sizes
    if np.ptp(per_row) < 1e-3:
        return
    weights = mixture_weights(scores, sizes, max_change)
    np.testing.assert_allclose(weights @ sizes, sizes.sum(), rtol=1e-9)
    assert (weights <= max_change).all() and (weights >= 1 / max_change).all()
    order = np.argsort(per_row, kind="stable")
    assert (np.diff(weights[order]) >= -1e-12).all()
    assert scores @ (weights - 1) > 0


def test_weights_of_two_equal_clusters_are_known():
    """z = (1, -1); the loser goes to the lower bound, the winner takes what it gives up."""
    np.testing.assert_allclose(mixture_weights(np.array([3.0, 1.0]), np.array([5, 5]), 2.0), [1.5, 0.5], rtol=1e-9)


def test_only_the_score_per_row_counts():
    """A cluster cut in two keeps its weight."""
    whole = mixture_weights(np.array([4.0, 1.0, -2.0]), np.array([4, 6, 10]), 3.0)
    cut = mixture_weights(np.array([4.0, 1.0, -0.5, -1.5]), np.array([4, 6, 2.5, 7.5]), 3.0)
    np.testing.assert_allclose(cut, whole[[0, 1, 2, 2]], rtol=1e-9)


def test_clusters_that_score_alike_cannot_be_mixed():
    with pytest.raises(ValueError, match="All 3 clusters have the same score per row"):
        mixture_weights(np.array([1.0, 2.0, 3.0]), np.array([10, 20, 30]), 2.0)


def suggestion(weights, sizes):
    clusters = ClusterMap.from_ids(np.repeat(np.arange(len(sizes)), sizes)[::-1].copy())
    return MixtureSuggestion(
        np.array(weights), clusters, np.zeros(len(sizes)), "margin", 0.0, maximize=True, max_change=4.0
    )


def test_resampling_gives_every_row_its_weight_on_average():
    mixture = suggestion([0.51, 2.47, 1.0], [30, 10, 20])
    ids = mixture.clusters.cluster_ids
    copies = np.stack([np.bincount(mixture.resample(seed), minlength=60) for seed in range(NUM_DRAWS)])
    assert (copies.sum(1) == 60).all()
    expected = mixture.weights[ids]
    assert ((copies == np.floor(expected)) | (copies == np.ceil(expected))).all()
    totals = np.stack([copies[:, ids == k].sum(1) for k in range(3)], axis=1)
    assert (np.abs(totals - mixture.weights * [30, 10, 20]) < 1).all()
    fraction = expected % 1
    standard_error = np.sqrt(fraction * (1 - fraction) / NUM_DRAWS)
    assert (np.abs(copies.mean(0) - expected) <= 4.5 * standard_error).all()
    assert len({tuple(row) for row in copies}) == NUM_DRAWS


def test_resampling_is_seeded_and_sorted_and_nothing_without_a_change():
    mixture = suggestion([0.51, 2.47, 1.0], [30, 10, 20])
    rows = mixture.resample(3)
    np.testing.assert_array_equal(rows, mixture.resample(3))
    assert (np.diff(rows) >= 0).all() and rows.dtype == np.int64
    assert (mixture.resample(4) != rows).any()
    np.testing.assert_array_equal(suggestion([1.0, 1.0], [3, 4]).resample(), np.arange(7))


def trusted(replayed_change, **overrides):
    clusters = ClusterMap.from_ids([0, 0, 1, 1])
    options = {"maximize": True, "max_change": 16.0, "min_agreement": 0.5, "replayed_change": replayed_change}
    return trusted_mixture(np.array([2.0, -2.0]), clusters, "margin", 1.0, **{**options, **overrides})


def test_the_bound_shrinks_until_replay_agrees():
    """Weights are (2 - 1 / bound, 1 / bound), the first-order change 4 * (1 - 1 / bound)."""
    mixture = trusted(lambda weights: 2.0 if weights[1] > 0.2 else 0.1)
    assert mixture.max_change == 4.0
    np.testing.assert_allclose(mixture.weights, [1.75, 0.25], rtol=1e-9)
    assert mixture.linear_change == pytest.approx(3.0)
    assert mixture.predicted_change == 2.0


def test_a_replay_that_diverges_does_not_agree():
    def replayed_change(weights):
        if weights[1] < 0.1:
            raise DivergenceError("The replay gave NaN.")
        return 100.0

    assert trusted(replayed_change).max_change == 4.0


def test_a_prediction_that_no_replay_bears_out_is_refused():
    with pytest.raises(ValueError, match=r"less than `min_agreement` = 0.5 .* \(16: -0.27, 4: -0.33, .*min_agreement"):
        trusted(lambda weights: -1.0)


def test_without_replay_the_bound_is_taken_as_it_is():
    mixture = trusted(lambda weights: -1.0, min_agreement=None)
    assert mixture.max_change == 16.0 and mixture.replayed_change is None
    assert mixture.predicted_change == mixture.linear_change == pytest.approx(4 * (1 - 1 / 16))


def test_losses_are_minimized_unless_told_otherwise(attributor):
    for name in ("loss", "mean_loss"):
        mixture = attributor.suggest_mixture(RUN.queries, objective=name)
        assert not mixture.maximize and mixture.predicted_change < 0 and mixture.linear_change < 0
    worse = attributor.suggest_mixture(RUN.queries, objective="mean_loss", maximize=True)
    assert worse.maximize and worse.predicted_change > 0
    own = Objective("loss", OBJECTIVES["loss"].function, per_query=True)
    assert attributor.suggest_mixture(RUN.queries, objective=own).maximize


def test_several_queries_are_averaged(attributor):
    mixture = attributor.suggest_mixture(RUN.queries)
    result = attributor.attribute(RUN.queries, engine="adjoint")
    np.testing.assert_allclose(mixture.scores, result.scores.mean(0), rtol=1e-6)
    assert mixture.objective_value == pytest.approx(float(result.objective_values.mean()))
    weights = torch.from_numpy(mixture.weights[None]).float()
    replayed = attributor.replayed_values(RUN.queries, weights, engine="replay")
    assert mixture.predicted_change == pytest.approx(float(replayed.mean()) - mixture.objective_value, abs=1e-5)


def test_own_class_is_trained_on_more(attributor):
    """Clusters 2k and 2k + 1 hold class k."""
    mixture = attributor.suggest_mixture([row for row in RUN.queries if row["labels"] == 1])
    assert mixture.weights[2:4].min() > 1
    assert mixture.weights[2:4].mean() > 1 > mixture.weights[[0, 1, 4, 5]].mean()


def test_scores_may_come_from_the_rows(attributor):
    mixture = attributor.suggest_mixture(RUN.queries, rows=RUN.train_dataset)
    expected = attributor.attribute(RUN.queries, engine="adjoint", rows=RUN.train_dataset).scores.mean(0)
    np.testing.assert_allclose(mixture.scores, expected, rtol=1e-6)


def test_the_table_is_sorted_and_adds_up(attributor):
    mixture = attributor.suggest_mixture(RUN.queries)
    table = mixture.to_pandas()
    assert list(table) == ["cluster", "weight", "size", "suggested_size", "share", "score"]
    assert table["weight"].is_monotonic_decreasing
    assert table["suggested_size"].sum() == pytest.approx(48) and table["share"].sum() == pytest.approx(1)
    first = RUN.clusters.index(table["cluster"][0])
    assert table["weight"][0] == mixture.weights[first] and table["score"][0] == mixture.scores[first]
    assert "maximize margin" in repr(mixture) and "6 weights" in repr(mixture)


def test_the_pipeline_suggests_the_same(attributor):
    attribute = pipeline("data-attribution", model=RUN.model, synset=tiny_synset(), disable_tqdm=True)
    expected = attributor.suggest_mixture(RUN.queries, max_change=1.5)
    mixture = attribute.suggest_mixture((row for row in RUN.queries), max_change=1.5)
    np.testing.assert_allclose(mixture.weights, expected.weights, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "accuracy"}, "'accuracy' is not differentiable"),
        ({"max_change": 1.0}, "`max_change` must be above 1 and finite, got 1.0"),
        ({"max_change": float("nan")}, "`max_change` must be above 1 and finite, got nan"),
        ({"min_agreement": 0.0}, r"`min_agreement` must lie in \(0, 1\], got 0.0"),
        ({"objective": "f1"}, "Unknown objective 'f1'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_requests_are_refused(attributor, options, message):
    with pytest.raises(ValueError, match=message):
        attributor.suggest_mixture(RUN.queries, **options)


def test_one_cluster_cannot_be_mixed():
    problem = ConvexProblem(rows_per_cluster=12)
    with pytest.raises(ValueError, match="one cluster only"):
        problem.attributor.suggest_mixture(problem.queries)
