"""What an attribution is said to need."""

from __future__ import annotations

import pytest

from hf_rgm import Attributor, Objective
from hf_rgm.attribution.adjoint import AdjointEngine
from hf_rgm.attribution.linearized import LinearizedReplayEngine
from hf_rgm.attribution.replay import ReplayEngine
from hf_rgm.synset.costs import PieceOfWork
from hf_rgm.synset.memory import PeakTensors
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()
HITS = Objective(
    "hits", lambda forward, queries: (forward(queries.inputs).argmax(-1) == queries.labels).float(), False, True
)
SETTINGS = [
    {},
    {"rows": RUN.train_dataset},
    {"num_masks": 9, "stride": 2},
    {"engine": "adjoint"},
    {"engine": "adjoint", "rows": RUN.train_dataset, "rewind": 0.5},
    {"engine": "replay", "objective": "loss"},
    {"engine": "plain_replay", "objective": HITS},
    {"objective": "mean_loss"},
]


@pytest.fixture(scope="module")
def attributor():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings) or "defaults")
def test_memory_and_disk_are_told_within_a_factor_of_two(attributor, settings, tmp_path):
    told = attributor.estimate(RUN.queries, **settings)
    with PeakTensors() as memory:
        result = attributor.attribute(RUN.queries, **settings)
    assert memory.resident_bytes / 2 < told.memory_bytes < 2 * memory.resident_bytes
    folder = result.save_pretrained(tmp_path / "result")
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert written / 2 < told.disk_bytes < 2 * written
    assert told.num_blocks == 1 and not told.sketched


class TestTime:
    """With pieces of work that all take a second: how often is each done?"""

    @pytest.fixture(autouse=True)
    def seconds(self, monkeypatch):
        for module in ("adjoint", "linearized", "replay", "runs"):
            monkeypatch.setattr(f"hf_rgm.attribution.{module}.measured", lambda work: PieceOfWork(1.0, 0))
        monkeypatch.setattr("hf_rgm.attribution.training_rows.measure_rows", lambda *_: PieceOfWork(1.0, 0))

    def steps(self, engine, **settings):
        path = engine(*attributor_parts(), **settings).path
        return len(path.segments()), len(path.steps())

    def test_linearised_replay(self, attributor):
        states, steps = self.steps(LinearizedReplayEngine)
        seconds = attributor.estimate(RUN.queries).seconds
        assert seconds == 1 + states * (1 + 1) + steps  # the objective's gradients; curvature and forces; steps

    def test_rows_are_gone_through_at_every_state(self, attributor):
        states, steps = self.steps(LinearizedReplayEngine)
        adjoint_states, adjoint_steps = self.steps(AdjointEngine)
        seconds = attributor.estimate(RUN.queries, rows=RUN.train_dataset).seconds
        assert seconds == 1 + states * (1 + 48) + steps + adjoint_states * (1 + 1) + adjoint_steps

    def test_replay_takes_one_gradient_a_mask_and_one_for_the_path(self, attributor):
        _, steps = self.steps(ReplayEngine)
        seconds = attributor.estimate(RUN.queries, engine="replay", num_masks=100).seconds
        assert seconds == steps * (100 + 2 + 2) + 100  # two batches of masks, and the objective of every mask

    def test_a_few_queries_stand_for_more(self, attributor):
        one, ten = (
            attributor.estimate(RUN.queries, num_queries=count, engine="replay").seconds for count in (12, 120)
        )
        _, steps = self.steps(ReplayEngine)
        assert ten - one == pytest.approx(6 * (10 - 1))

    def test_several_runs_take_their_time_each(self):
        synset = tiny_synset(2)
        both = Attributor(RUN.model, synset, disable_tqdm=True)
        alone = both._runs[0]
        one = alone.estimate(
            "adjoint", *objective_and_queries(both), num_queries=12, rows=None, num_masks=None
        ).seconds
        assert both.estimate(RUN.queries, engine="adjoint").seconds == 2 * one


def attributor_parts():
    attributor = Attributor(RUN.model, tiny_synset(), disable_tqdm=True)
    return attributor.model, attributor.inputs, attributor.samples, RUN.trajectory


def objective_and_queries(attributor):
    from hf_rgm.engines.objectives import resolve_objective

    return resolve_objective("margin"), attributor._queries(RUN.queries, None)


def test_bad_requests_are_refused(attributor):
    with pytest.raises(ValueError, match="Unknown engine 'magic'"):
        attributor.estimate(RUN.queries, engine="magic")
    with pytest.raises(ValueError, match="`rows` are for engines"):
        attributor.estimate(RUN.queries, engine="plain_replay", rows=RUN.train_dataset)
