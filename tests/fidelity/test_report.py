from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_rgm.agreement.correlations import (
    Estimate,
    leave_cluster_out_correlation,
    linear_datamodeling_score,
    noise_ceiling,
    retrained_slope,
)
from hf_rgm.agreement.fidelity_figures import Agreement
from hf_rgm.attribution.attributor import Attributor
from hf_rgm.engines.objectives import Objective
from hf_rgm.fidelity import report as module
from hf_rgm.fidelity.report import FidelityReport
from hf_rgm.testing import tiny_dataset, tiny_recorded_run, tiny_synset, tiny_trainer

RUN = tiny_recorded_run()
CLUSTER_IDS = RUN.clusters.cluster_ids


@pytest.fixture(scope="module")
def attributor():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True)


@pytest.fixture(scope="module")
def scores(attributor):
    return attributor.attribute(RUN.queries, engine="adjoint", rows=RUN.train_dataset)


def refuse(*_, **__):
    raise AssertionError("nothing may be trained")


def measure(attributor, *, queries=RUN.queries, build_trainer=refuse, train_dataset=RUN.train_dataset, **settings):
    settings = {"disable_tqdm": True, **settings}
    return FidelityReport.measure(attributor, queries, build_trainer, train_dataset, **settings)


class LinearTraining:
    """In the place of `retrain`: the objective is a sum of effects of the rows, and some noise of each seed."""

    def __init__(self, row_effects, noise=0.0):
        self.row_effects = row_effects
        self.noise = noise

    def __call__(self, build_trainer, train_dataset, subsets, queries, *, seeds, **_):
        self.masks = np.zeros((len(subsets), len(train_dataset)))
        for mask, rows in zip(self.masks, subsets, strict=True):
            mask[rows] = 1
        exact = (self.row_effects @ self.masks.T).T
        draws = np.stack([np.random.default_rng(seed).normal(size=exact.shape) for seed in seeds], axis=1)
        self.values = exact[:, None] + self.noise * exact.std() * draws
        return self.values


@pytest.fixture
def training(monkeypatch, scores):
    fake = LinearTraining(scores.row_scores)
    monkeypatch.setattr(module, "retrain", fake)
    return fake


@pytest.mark.parametrize("sign", [1, -1])
def test_exact_predictions_agree_fully_and_reversed_ones_not_at_all(attributor, training, sign):
    """Also of clusters: the effects of their rows add up to the adjoint's scores."""
    training.row_effects = sign * training.row_effects
    report = measure(attributor, budget=60, engine="adjoint", rows=True)
    assert {name: part.num_points for name, part in report.agreements.items()} == {
        "lds_clusters": 12,
        "leave_cluster_out": 6,
        "lds_rows": 12,
    }
    for part in report.agreements.values():
        assert part.estimate.value == pytest.approx(sign)
        assert part.ceiling.value == pytest.approx(1)
        assert part.slope.value == pytest.approx(sign, rel=1e-4)
        assert part.slope.low <= part.slope.value <= part.slope.high
    assert report.num_retrainings == 60


def test_figures_are_those_of_the_scores_on_the_subsets_that_were_retrained(attributor, training, scores):
    training.noise = 0.5
    report = measure(attributor, budget=60, engine="adjoint", rows=True, seed=3)
    by_seed = training.values.transpose(1, 2, 0)
    masks = training.masks
    assert by_seed.shape == (2, 12, 30)
    for name, part, correlate in (
        ("lds_clusters", slice(0, 12), linear_datamodeling_score),
        ("leave_cluster_out", slice(12, 18), leave_cluster_out_correlation),
        ("lds_rows", slice(18, 30), linear_datamodeling_score),
    ):
        predicted = scores.row_scores @ masks[part].T

        def agreement(left, right, correlate=correlate):
            return correlate(left, right, seed=3)

        found = report.agreements[name]
        assert found.estimate.value == pytest.approx(agreement(predicted, by_seed[..., part].mean(0)).value, abs=1e-6)
        assert found.ceiling == noise_ceiling(by_seed[..., part], agreement)
        assert found.estimate.low < found.estimate.value < 1


def test_the_subsets_are_what_their_names_say(attributor, training):
    measure(attributor, budget=60, rows=True)
    by_cluster = np.stack([training.masks[:, CLUSTER_IDS == k].mean(1) for k in range(6)], axis=1)
    halves, left_out, rows = np.split(by_cluster, [12, 18])
    assert set(halves.ravel()) == {0, 1}
    assert (halves.sum(1) == 3).all()
    np.testing.assert_array_equal(left_out, 1 - np.eye(6))
    assert (training.masks[18:].sum(1) == 24).all()
    assert len(set(rows.ravel())) > 2
    assert len({mask.tobytes() for mask in training.masks}) == 30


@pytest.mark.parametrize(
    ("engine", "of_halves"), [("linearized_replay", True), ("replay", False)], ids=["linear", "anchored"]
)
def test_the_slope_is_that_of_retrained_effects_on_scores(attributor, training, engine, of_halves):
    """Not on replays of halves, of another size; where scores take a replay each, only where these are measured."""
    report = measure(attributor, budget=30, engine=engine, measures=["lds_clusters", "leave_cluster_out"], seeds=(1,))
    scores = attributor.attribute(RUN.queries, engine=engine).scores
    masks = np.stack([training.masks[:, CLUSTER_IDS == k].mean(1) for k in range(6)], axis=1)
    num_halves = report.agreements["lds_clusters"].num_points
    for name, part in (("lds_clusters", slice(0, num_halves)), ("leave_cluster_out", slice(num_halves, None))):
        slope = report.agreements[name].slope
        if name == "lds_clusters" and not of_halves:
            assert slope is None
        else:
            expected = retrained_slope(scores @ masks[part].T, training.values[part, 0].T)
            assert slope.value == pytest.approx(expected.value, rel=1e-3)
            assert f"retrained effects are {slope} times the scores" in str(report)


def test_replay_engines_are_asked_for_the_subset_itself(attributor, training):
    report = measure(attributor, budget=5, engine="replay", rewind=0.5)
    masks = np.stack([training.masks[:, CLUSTER_IDS == k].mean(1) for k in range(6)], axis=1)
    weights = torch.from_numpy(masks.astype(np.float32))
    replayed = attributor.replayed_values(RUN.queries, weights, engine="replay", rewind=0.5)
    expected = linear_datamodeling_score(replayed.T, training.values[:, 0].T)
    assert report.agreements["lds_clusters"].estimate == expected
    assert report.settings == {"rewind": 0.5}
    assert report.engine == "replay"


def test_a_real_measurement_is_resumed_and_other_queries_are_kept_apart(attributor, tmp_path):
    def quick(dataset, seed):
        return tiny_trainer(dataset, seed, num_train_epochs=2)

    report = measure(attributor, build_trainer=quick, budget=5, output_dir=tmp_path)
    assert report.agreements["lds_clusters"].estimate.value > 0.3
    assert report.agreements["lds_clusters"].ceiling is None
    assert report.seeds == (1,)
    assert measure(attributor, budget=5, output_dir=tmp_path) == report
    for changed in ({"queries": tiny_dataset(12, seed=5)}, {"objective": "loss"}):
        with pytest.raises(AssertionError, match="nothing may be trained"):
            measure(attributor, budget=5, output_dir=tmp_path, **changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 4}, "`budget` = 4 is too small"),
        ({"engine": "magic"}, "Unknown engine 'magic'"),
        (
            {"engine": "responses", "rows": True},
            "`rows` are for engines linearized_replay, adjoint, replay and training_on",
        ),
        ({"measures": ["lds_rows"]}, "rows are not scored"),
        ({"measures": ["lds_rows"], "rows": True, "objective": "accuracy"}, "rows are not scored"),
        ({"objective": "beauty"}, "Unknown objective 'beauty'"),
        ({"train_dataset": tiny_dataset(47, seed=0)}, "47 rows"),
        ({"train_dataset": tiny_dataset(48, seed=1)}, "other rows or another order"),
        ({"queries": RUN.queries.remove_columns("labels"), "output_dir": "retrainings"}, "`queries` have no labels"),
        (
            {"objective": Objective("one", lambda forward, q: forward(q.inputs)[:, 0] * 0, differentiable=False)},
            "same",
        ),
    ],
)
def test_bad_requests_are_refused_before_any_training(attributor, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        measure(attributor, **settings)


def test_queries_that_training_does_not_touch_are_refused(attributor, training):
    training.row_effects = 0 * training.row_effects
    with pytest.raises(ValueError, match="All 12 queries have constant retrained values over the 12 points"):
        measure(attributor)


def test_the_recorded_seed_is_avoided_or_warned_of(attributor, training, caplog):
    assert RUN.trajectory.metadata["seeds"]["seed"] == 0
    assert measure(attributor).seeds == (1, 2)
    assert not caplog.records
    assert measure(attributor, seeds=(0, 4)).seeds == (0, 4)
    assert "seed 0, that of a recorded run" in caplog.text


ONE_SEED = FidelityReport(
    agreements={"lds_clusters": Agreement(Estimate(0.5, 0.25, 0.75, 1), 6)},
    engine="adjoint",
    objective="margin",
    num_queries=1,
    seeds=(3,),
    rows=False,
    samples_sha256=tiny_synset().samples_sha256,
    settings={"rewind": 0.5},
)
TWO_SEEDS = replace(
    ONE_SEED,
    agreements={
        "lds_clusters": Agreement(Estimate(0.5, 0.25, 0.75), 12, Estimate(0.9, 0.8, 1.0)),
        "lds_rows": Agreement(Estimate(0.4, None, None), 4, Estimate(0.7, None, None), Estimate(2.5, None, None)),
    },
    parameters_sha256="0" * 64,
    num_queries=20,
    seeds=(3, 4),
    rows=True,
)


def test_reports_in_plain_language():
    assert str(ONE_SEED).splitlines() == [
        "Agreement of the adjoint engine on the synset alone with 6 retrainings (seed 3), objective margin, mean over "
        "1 query, 95% intervals:",
        "- random halves of the clusters (LDS): 0.500 [0.250, 0.750], 1 queries undefined over 6 retrained subsets",
        "1 is perfect agreement, 0 none. With one seed the noise ceiling, what retraining itself reaches, is unknown.",
    ]
    assert str(TWO_SEEDS).splitlines() == [
        "Agreement of the adjoint engine on synset and training rows with 32 retrainings (seeds 3 and 4), objective "
        "margin, mean over 20 queries, 95% intervals:",
        "- random halves of the clusters (LDS): 0.500 [0.250, 0.750] over 12 retrained subsets; noise ceiling 0.900 "
        "[0.800, 1.000]",
        "- random halves of the rows (LDS): 0.400 (no interval: fewer than 5 points) over 4 retrained subsets; noise "
        "ceiling 0.700 (no interval: fewer than 5 points); retrained effects are 2.500 (no interval: fewer than 5 "
        "points) times the scores",
        "1 is perfect agreement, 0 none. Noise ceiling: how well retraining with one seed agrees with the others.",
    ]


@pytest.mark.parametrize("report", [ONE_SEED, TWO_SEEDS], ids=["one seed", "two seeds"])
def test_reports_go_through_json(report):
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["format_version"] == 1
    assert FidelityReport.from_dict(content) == report


def damaged(**changes):
    return {**ONE_SEED.to_dict(), **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged(format_version=2), "format version 2, this release of hf_rgm reads 1"),
        ([], "format version list"),
        ({"format_version": 1}, "damaged.*KeyError"),
        (damaged(agreements={}), "damaged.*must hold some of"),
        (damaged(agreements={"lds": ONE_SEED.to_dict()["agreements"]["lds_clusters"]}), "damaged.*got lds"),
        (damaged(agreements={"lds_clusters": None}), "damaged.*TypeError"),
        (
            damaged(
                agreements={
                    "lds_clusters": {
                        "estimate": {"value": float("nan"), "low": 0, "high": 1, "num_nan": 0},
                        "num_points": 6,
                        "ceiling": None,
                    }
                }
            ),
            "damaged.*not an estimate",
        ),
    ],
)
def test_damaged_reports_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        FidelityReport.from_dict(content)
