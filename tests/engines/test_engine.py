"""What all engines share: going back as far as can be trusted, trying a few models first, and what is said of it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from hf_rgm.engines.engine import LATER_REWINDS, NUM_PROBES, Engine
from hf_rgm.engines.objectives import Objective, Queries
from hf_rgm.engines.perturbations import leave_one_out, random_subsets, ridge_scores
from hf_rgm.engines.request import Evaluation, Request
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.cost_estimates import PieceOfWork
from tests.engines.parts import row_run, sample_run
from tests.recorded import record

FIRST = Objective("first parameters", lambda forward, queries: forward(queries.inputs)[:2, 0], differentiable=False)


class FakeMeter:
    """Drift is what the engine says: its models' last parameter."""

    def drifts(self, parameters, masks):
        return parameters[:, -1].double()


class FakeEngine(Engine):
    """Models are the trained one, moved by their masks and the rewind; the last parameter is their drift."""

    name = "fake"
    rewind = 0.14
    max_drift = 0.5
    drift_of = staticmethod(lambda rewind: 0.0)

    def __init__(self, run):
        super().__init__(run)
        run.drift_meter = FakeMeter()
        self.calls = []

    @property
    def batch_size(self):
        return 5

    def replay(self, masks, rewind):
        self.calls.append((rewind, masks.clone()))
        drift = self.drift_of(rewind)
        if drift is None:
            raise DivergenceError(f"exploded from {rewind}")
        models = self.run.final.repeat(len(masks), 1)
        models[:, 0] += masks @ torch.arange(1.0, 5.0)
        models[:, 1] += rewind
        models[:, -1] = drift
        return models

    def costs(self, num_masks, rewind):
        return PieceOfWork(0.0, 0)

    def rewinds(self):
        return list(dict.fromkeys(rewind for rewind, _ in self.calls))


@pytest.fixture
def engine():
    return FakeEngine(sample_run(record("sgd")))


def drifting(**drifts):
    """By rewind in percent, None for divergence; 0.9 by default."""
    return lambda rewind: drifts.get(f"r{round(100 * rewind)}", 0.9)


MASKS = random_subsets(4, 20, seed=0) + torch.arange(20)[:, None] / 100


def test_where_its_models_can_be_trusted_it_goes_back_as_far_as_it_does_by_itself(engine, caplog):
    outcome = engine.parameters(MASKS, None)
    assert engine.rewinds() == [0.14]
    assert (outcome.start, outcome.drift, caplog.text) == (3, 0.0, "")


@pytest.mark.parametrize("later", [0.4, 0.6, 0.9])
def test_else_it_takes_the_first_later_rewind_that_can_be(engine, later, caplog):
    engine.drift_of = drifting(**{f"r{round(100 * r)}": 0.1 for r in LATER_REWINDS if r >= later})
    with caplog.at_level(logging.INFO):
        outcome = engine.parameters(MASKS, None)
    tried = [0.14, *(rewind for rewind in LATER_REWINDS if rewind <= later)]
    assert engine.rewinds() == tried
    assert outcome.drift == pytest.approx(0.1) and outcome.start == engine.start(later)
    assert torch.equal(outcome.values[:, 1], (engine.run.final[1] + torch.tensor(later)).expand(20))
    assert len(caplog.messages) == len(tried) - 1 and "drift by 0.9, more than 0.5. Trying again" in caplog.text


def test_rewinds_before_its_own_are_not_tried(engine):
    engine.drift_of, engine.rewind = drifting(r80=0.2), 0.7
    engine.parameters(MASKS, None)
    assert engine.rewinds() == [0.7, 0.8]


@pytest.mark.parametrize(("make", "instead"), [(sample_run, True), (row_run, False)])
def test_where_none_can_be_the_least_drift_is_taken_and_told(make, instead, caplog):
    engine = FakeEngine(make(record("sgd")))
    engine.drift_of = drifting(r14=None, r40=3.0, r60=2.0, r80=0.8, r90=None)
    with caplog.at_level(logging.WARNING):
        outcome = engine.parameters(MASKS, None)
    assert outcome.start == engine.start(0.8) and outcome.drift == pytest.approx(0.8)
    assert "(drift 0.8 from step 16 of 20 on" in caplog.text and "up to 0.5 is trusted" in caplog.text
    assert ("pass the training rows as `rows`" in caplog.text) == instead
    assert "distil again" in caplog.text


def test_from_everywhere_it_diverges(engine):
    engine.drift_of = drifting(r14=None, r40=None, r60=None, r80=None, r90=None)
    with pytest.raises(DivergenceError, match=r"exploded from 0\.9"):
        engine.parameters(MASKS, None)


def test_a_rewind_that_is_asked_for_is_taken_whatever_comes_of_it(engine, caplog):
    engine.drift_of = drifting(r25=7.0)
    outcome = engine.parameters(MASKS, 0.25)
    assert engine.rewinds() == [0.25] and outcome.drift == pytest.approx(7.0)
    assert "drift 7 from step 5" in caplog.text
    engine.drift_of = drifting(r25=None)
    with pytest.raises(DivergenceError, match=r"exploded from 0\.25"):
        engine.parameters(MASKS, 0.25)


@pytest.mark.parametrize("is_dear", [True, False])
def test_dear_models_are_tried_on_a_few_masks_first(engine, is_dear):
    engine.drift_of, engine.is_dear = drifting(r40=0.2), is_dear
    outcome = engine.parameters(MASKS, None)
    probes = np.linspace(0, 19, NUM_PROBES).round().astype(int)
    early, late = (torch.cat([masks for r, masks in engine.calls if r == rewind]) for rewind in (0.14, 0.4))
    assert torch.equal(early, MASKS[probes] if is_dear else MASKS)
    assert len(late) == 20 and torch.equal(late[: len(early)], early)
    expected = engine.run.final[0] + MASKS @ torch.arange(1.0, 5.0)
    torch.testing.assert_close(outcome.values[:, 0], expected)
    assert max(len(masks) for _, masks in engine.calls) <= 5


def test_drift_is_the_mean_over_some_masks(engine):
    engine.is_dear, seen = False, []

    class Meter(FakeMeter):
        def drifts(self, parameters, masks):
            seen.append(masks)
            return masks[:, 0].double()

    engine.run.drift_meter = Meter()
    outcome = engine.parameters(MASKS / 10, None)
    probes = np.linspace(0, 19, NUM_PROBES).round().astype(int)
    assert torch.equal(torch.cat(seen), MASKS[probes] / 10)
    assert outcome.drift == pytest.approx(float(MASKS[probes, 0].mean() / 10))


def test_engines_whose_drift_says_nothing_are_not_measured(engine):
    engine.max_drift = None
    engine.run.drift_meter = None
    outcome = engine.parameters(MASKS, None)
    assert outcome.drift is None and engine.rewinds() == [0.14]
    assert sum(len(masks) for _, masks in engine.calls) == 20


def evaluation(engine, **options):
    features = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    queries = Queries({"features": features}, torch.zeros(3, dtype=torch.int64))
    return Evaluation(engine.run, Request(FIRST, queries, **options))


def test_scores_are_what_leaving_out_takes_away(engine):
    own = evaluation(engine)
    found = engine.scores(own).values
    values = torch.stack([own.at(model) for model in engine.parameters(leave_one_out(4), 0.14).values])
    torch.testing.assert_close(found, (own.values - values).T)
    assert found.shape == (2, 4) and found.abs().min() > 0


def test_scores_by_random_halves_are_a_regression(engine):
    found = engine.scores(evaluation(engine, num_masks=12, seed=3)).values
    masks = random_subsets(4, 12, seed=3)
    values = evaluation(engine).of_models(engine.parameters(masks, 0.14).values)
    torch.testing.assert_close(found, ridge_scores(masks, values))


@pytest.mark.parametrize(
    "masks",
    [torch.ones(4), torch.ones(2, 5), torch.full((1, 4), float("nan")), torch.full((1, 4), -0.1)],
    ids=["one dimension", "clusters", "nan", "negative"],
)
def test_bad_masks_are_refused_before_any_replay(engine, masks):
    with pytest.raises(ValueError, match=r"Masks must be finite, not negative and of shape \(num_masks, 4\)"):
        engine.parameters(masks, None)
    assert not engine.calls
