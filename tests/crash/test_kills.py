"""A few kills of everything that writes. `python -m tests.crash --kills 200` does as many as are wanted."""

from __future__ import annotations

import pytest

from tests.crash.campaigns import (
    around_the_last_rename,
    at_random_operations,
    at_random_times,
    distilling,
    pushing,
    recording,
    saving,
)
from tests.crash.tasks import KINDS
from tests.crash.workers import Workers
from tests.hub.conftest import HubShell


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_save_leaves_one_whole_version(workers, tmp_path, kind):
    assert saving(workers, tmp_path / "over", around_the_last_rename(), 6, kind=kind) == 6
    assert saving(workers, tmp_path / "inside", at_random_operations(0), 1, kind=kind) == 1
    assert saving(workers, tmp_path / "first", around_the_last_rename(), 2, kind=kind, first=True) == 2
    saving(workers, tmp_path / "times", at_random_times(0), 1, kind=kind)


@pytest.mark.parametrize("kind", ["clusters", "unlearned"])
def test_a_save_killed_between_two_renames_is_completed(workers, tmp_path, kind):
    assert saving(workers, tmp_path, around_the_last_rename(), 6, kind=kind, exchange=False) == 6


@pytest.mark.parametrize("best", [None, "first", "last"])
def test_a_killed_training_is_resumed_bit_for_bit(workers, tmp_path, best):
    recording(workers, tmp_path / "operations", at_random_operations(0), 2, best=best)
    recording(workers, tmp_path / "times", at_random_times(0), 2, best=best)


def test_a_killed_distillation_is_continued_bit_for_bit(workers, tmp_path):
    distilling(workers, tmp_path / "operations", at_random_operations(0), 3)
    distilling(workers, tmp_path / "times", at_random_times(0), 1)


def test_a_killed_push_leaves_one_whole_version(workers, crash_hub, tmp_path):
    assert pushing(workers, crash_hub, tmp_path / "requests", None, 8) >= 7
    pushing(workers, crash_hub, tmp_path / "times", at_random_times(0), 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "lora"])
def test_models_of_transformers_and_peft_withstand_kills(model, crash_hub, tmp_path):
    with Workers(HubShell(crash_hub, tmp_path).environment(), model) as workers:
        assert recording(workers, tmp_path / "recording", at_random_operations(0), 2) == 2
        assert distilling(workers, tmp_path / "distilling", at_random_operations(0), 2) == 2
        assert saving(workers, tmp_path / "saving", around_the_last_rename(), 2, kind="unlearned") == 2
        assert pushing(workers, crash_hub, tmp_path / "pushing", None, 3, kind="unlearned") >= 2
