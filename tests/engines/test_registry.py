from __future__ import annotations

import pytest

from hf_rgm.engines.registry import ENGINES, check_engine, default_engine

EVERYTHING = {"rows": True, "samples": True, "responses": True}
ROWS = {"rows": True, "samples": False, "responses": False}
SAMPLES = {"rows": False, "samples": True, "responses": False}
KEPT = {"rows": False, "samples": True, "responses": True}


def test_names_are_those_of_the_engines():
    assert list(ENGINES) == ["linearized_replay", "adjoint", "replay", "training_on", "responses"]
    assert all(name == engine.name for name, engine in ENGINES.items())
    assert [name for name, engine in ENGINES.items() if not engine.replays] == ["adjoint"]


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (ROWS, "linearized_replay"),
        (SAMPLES, "linearized_replay"),
        (KEPT, "responses"),
        (EVERYTHING, "linearized_replay"),
    ],
)
def test_responses_are_the_default_where_rows_are_not_at_hand(available, expected):
    assert default_engine(available) == expected


@pytest.mark.parametrize("name", ENGINES)
def test_with_everything_at_hand_every_engine_can(name):
    assert check_engine(name, available=EVERYTHING) is ENGINES[name]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magic", {}, "Unknown engine 'magic'. Use one of linearized_replay, adjoint, replay, training_on"),
        ("adjoint", {"replays": True}, "Unknown engine 'adjoint'. Use one of linearized_replay, replay"),
        (
            "training_on",
            {"available": SAMPLES},
            "`engine='training_on'` needs the training dataset: pass it as `rows`",
        ),
        ("replay", {"available": ROWS}, "`engine='replay'` needs a synset: distil one, or use `engine=\"linear"),
        ("responses", {"available": SAMPLES}, "needs a synset that keeps responses"),
        ("responses", {"rows_given": True}, "`rows` are for engines linearized_replay, .* and training_on, got 'resp"),
        ("adjoint", {"num_masks": 4}, '`num_masks` = 4 is for replay engines; `engine="adjoint"` needs no masks'),
        ("replay", {"num_masks": 1}, "`num_masks` must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_done_is_said_with_what_can(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_engine(name, **{"available": EVERYTHING, **options})
