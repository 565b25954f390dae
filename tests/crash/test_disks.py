"""Disks that are full or take no large files: errors that say what to do, and nothing that was there is touched."""

from __future__ import annotations

import os

import pytest

from tests.crash.campaigns import check_same_record, tree
from tests.crash.tasks import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_on_a_full_disk_leaves_what_was_there(workers, tmp_path, kind):
    target = tmp_path / "saved" / kind
    whole = workers.run("save", kind=kind, version=0, folder=target, watch=tmp_path)
    before = tree(target)
    writes = [i for i, name in enumerate(whole.operations) if name in ("serialize_file", "write_table", "write_text")]
    for full_from in (1, writes[-1]):
        outcome = workers.run("save", kind=kind, version=1, folder=target, watch=tmp_path, full_from=full_from)
        assert outcome.error["type"] == "OSError"
        assert f"No space left on device: {target} is not written, it needs more than the " in outcome.error["text"]
        assert "What was there before is untouched." in outcome.error["text"]
        assert tree(target) == before
        assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("kind", ["clusters", "trajectory", "unlearned"])
def test_a_file_that_is_too_large_leaves_what_was_there(workers, tmp_path, kind):
    target = tmp_path / "saved" / kind
    workers.run("save", kind=kind, version=0, folder=target)
    before = tree(target)
    outcome = workers.run("save", kind=kind, version=1, folder=target, largest_file=500)
    assert outcome.error["type"] == "OSError"
    assert f"File too large: {target} is not written" in outcome.error["text"]
    assert "`ulimit -f`" in outcome.error["text"]
    assert tree(target) == before
    assert os.listdir(target.parent) == [target.name]


def test_a_full_disk_stops_a_recorded_training_which_can_be_resumed(workers, tmp_path):
    whole = tmp_path / "whole"
    operations = workers.run("record", folder=whole, watch=whole / "trajectory").operations
    root = tmp_path / "run"
    for full_from in (len(operations) // 2, 30):
        outcome = workers.run("record", folder=root, watch=root / "trajectory", full_from=full_from)
        assert outcome.error["type"] == "OSError"
        assert f"No space left on device: {root / 'trajectory'}" in outcome.error["text"]
        assert "Training stops, as it would go on without a record of step" in outcome.error["text"]
        assert "`trainer.train(resume_from_checkpoint=True)`" in outcome.error["text"]
    workers.run("record", folder=root, watch=root / "trajectory")
    check_same_record(root / "trajectory", whole / "trajectory")


def test_a_full_disk_keeps_finished_blocks_of_a_distillation(workers, tmp_path):
    whole = workers.run("distill", folder=tmp_path / "whole", watch=tmp_path)
    second_block = [n for n, name in enumerate(whole.operations, 1) if name == "serialize_file"][1]
    root = tmp_path / "run"
    outcome = workers.run("distill", folder=root, watch=tmp_path, full_from=second_block)
    assert f"No space left on device: {root / 'blocks' / 'block-000002-000004.safetensors'}" in outcome.error["text"]
    assert os.listdir(root / "blocks") == ["block-000000-000002.safetensors"]
    workers.run("distill", folder=root, watch=tmp_path)
    assert tree(root / "blocks") == tree(tmp_path / "whole" / "blocks")
