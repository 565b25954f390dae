"""What an attribution is said to need."""

from __future__ import annotations

import pytest

from hf_rgm import Attributor, Objective
from hf_rgm.model.cost_estimates import PieceOfWork
from hf_rgm.model.peak_memory import PeakTensors
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()
HITS = Objective(
    "hits", lambda forward, queries: (forward(queries.inputs).argmax(-1) == queries.labels).float(), False, True
)
SETTINGS = [
    {},
    {"rows": RUN.train_dataset},
    {"num_masks": 9},
    {"engine": "adjoint"},
    {"engine": "adjoint", "rows": RUN.train_dataset, "rewind": 0.5},
    {"engine": "replay", "objective": "loss"},
    {"engine": "replay", "objective": HITS},
    {"engine": "training_on", "objective": HITS, "rows": RUN.train_dataset},
    {"objective": "mean_loss"},
]


@pytest.fixture(scope="module")
def attributor():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings) or "defaults")
def test_memory_and_disk_are_told_within_a_factor_of_two(attributor, settings, tmp_path):
    told = attributor.estimate(RUN.queries, **settings)
    fresh = Attributor(RUN.model, tiny_synset(), disable_tqdm=True)  # nothing is known from the estimate
    with PeakTensors() as memory:
        result = fresh.attribute(RUN.queries, **settings)
    assert memory.resident_bytes / 2 < told.memory_bytes < 2 * memory.resident_bytes
    folder = result.save_pretrained(tmp_path / "result")
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert written / 2 < told.disk_bytes < 2 * written
    assert told.num_blocks == (6 if settings.get("engine") == "training_on" else 1) and not told.sketched


STATES, STEPS = 5, 41
"""Recorded states in use, and training steps from 14% of the training on."""


class TestTime:
    """With pieces of work that all take a second: how often is each done?"""

    @pytest.fixture(autouse=True)
    def seconds(self, monkeypatch):
        engines = (
            "recorded_run",
            "adjoint",
            "linear",
            "anchored_replay",
            "training_on",
            "row_scores",
            "gradient_sources",
        )
        for module in ("attribution.answers", *(f"engines.{name}" for name in engines)):
            monkeypatch.setattr(f"hf_rgm.{module}.measured", lambda work: PieceOfWork(1.0, 0))
        monkeypatch.setattr("hf_rgm.engines.gradient_sources.measure_rows", lambda *_: PieceOfWork(1.0, 0))

    def test_what_is_known_already_is_told_as_if_it_were_not(self, attributor):
        before = attributor.estimate(RUN.queries).seconds
        attributor.attribute(RUN.queries)
        assert attributor.estimate(RUN.queries).seconds == before

    def test_linearised_replay(self, attributor):
        seconds = attributor.estimate(RUN.queries).seconds
        assert seconds == 1 + STATES * (1 + 1 + 1)  # the objective's gradients; curvature, forces and the map

    def test_rows_are_gone_through_at_every_state(self, attributor):
        seconds = attributor.estimate(RUN.queries, rows=RUN.train_dataset).seconds
        clusters, adjoint, rows = STATES * (1 + 48 + 1), STATES * (1 + 1), STATES * 1
        assert seconds == 1 + clusters + adjoint + rows

    def test_replay_takes_one_gradient_a_mask_and_one_for_the_path(self, attributor):
        seconds = attributor.estimate(RUN.queries, engine="replay", num_masks=100).seconds
        assert seconds == STEPS * (100 + 2 + 2) + 100  # two batches of masks, and the objective of every mask

    def test_training_goes_on_for_every_mask(self, attributor):
        seconds = attributor.estimate(
            RUN.queries, engine="training_on", rows=RUN.train_dataset, objective=HITS, num_masks=3
        ).seconds
        assert seconds == 3 * (48 - 10) + 3  # from the recorded state nearest to 27%

    def test_a_few_queries_stand_for_more(self, attributor):
        one, ten = (
            attributor.estimate(RUN.queries, num_queries=count, engine="replay").seconds for count in (12, 120)
        )
        assert ten - one == pytest.approx(6 * (10 - 1))

    def test_several_runs_take_their_time_each(self, attributor):
        both = Attributor(RUN.model, tiny_synset(2), disable_tqdm=True)
        one = attributor.estimate(RUN.queries, engine="adjoint").seconds
        assert both.estimate(RUN.queries, engine="adjoint").seconds == 2 * one


def test_bad_requests_are_refused(attributor):
    with pytest.raises(ValueError, match="Unknown engine 'magic'"):
        attributor.estimate(RUN.queries, engine="magic")
    with pytest.raises(ValueError, match="`rows` are for engines"):
        attributor.estimate(RUN.queries, engine="responses", rows=RUN.train_dataset)
