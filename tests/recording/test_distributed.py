"""Two processes that train together: what the main one records is what both did."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.distributed import CHECKPOINT, RESUMED, RUNS
from tests.recording.helpers import MeanModel, OutOfMemoryModel, dataset, make_trainer, replay, trainable

ROOT = Path(__file__).parents[2]
# float32 arithmetic in another order: two processes' averages of averages, over at most 18 updates.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What both processes saw, by rank; and the folder they recorded to."""
    folder = tmp_path_factory.mktemp("launched")
    # A run of one process that two go on with.
    trainer = make_trainer(
        folder / "resumed",
        OutOfMemoryModel(fails_at=14, message="interrupted"),
        TrajectoryCallback(folder / "resumed" / "trajectory", num_states=4),
        **RESUMED,
    )
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.train()
    del trainer
    gc.collect()  # Until then, this process is the one that records there.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.recording.distributed", str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def rows_of_both(seen, trajectory, done=0):
    """Rows by update: each process's first batch, then each one's second, and so on."""
    dealt = [batch for pair in zip(*seen, strict=True) for batch in pair]
    sizes = [len(sizes) for sizes in trajectory.steps.micro_batch_sizes[done:]]
    starts = [sum(sizes[:update]) for update in range(len(sizes))]
    assert sum(sizes) == len(dealt)
    return [sum(dealt[start : start + size], []) for start, size in zip(starts, sizes, strict=True)]


def assert_replayed(trajectory, final):
    replayed = replay(trajectory, MeanModel(), dataset())
    for step in trajectory.state_steps:
        recorded = trajectory.state(step)
        torch.testing.assert_close(replayed[step].parameters, recorded.parameters, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(replayed[step].moments, recorded.moments, rtol=1e-4, atol=TOLERANCE)
    for name, values in final.items():
        assert torch.equal(trajectory.final.parameters[name], torch.tensor(values))


@pytest.mark.parametrize("name", RUNS)
def test_the_record_of_two_processes_reproduces_training(launched, name):
    folder, ranks = launched
    trajectory = Trajectory.load(folder / name / "trajectory")
    assert [rank[name]["world_size"] for rank in ranks] == [2, 2]
    assert ranks[0][name]["seen"] != ranks[1][name]["seen"]
    rows = rows_of_both([rank[name]["seen"] for rank in ranks], trajectory)
    assert [step.tolist() for step in trajectory.steps.rows] == rows
    assert ranks[0][name]["final"] == ranks[1][name]["final"]
    assert_replayed(trajectory, ranks[0][name]["final"])
    assert trajectory.metadata["num_processes"] == 2
    assert [rank[name]["hooks"] for rank in ranks] == [0, 0]
    assert "Recorded" in ranks[0][name]["summary"]


def test_uneven_ends_repeat_rows_which_are_recorded_as_often(launched):
    folder, _ = launched
    steps = Trajectory.load(folder / "clipped" / "trajectory").steps
    assert [sum(map(len, steps.rows[epoch : epoch + 3])) for epoch in (0, 3, 6)] == [24] * 3
    assert {row for rows in steps.rows[:3] for row in rows.tolist()} == set(range(22))


@pytest.mark.parametrize("name", RUNS)
def test_norms_and_factors_are_those_of_the_averaged_gradient(launched, name):
    folder, ranks = launched
    trajectory = Trajectory.load(folder / name / "trajectory")
    logged = torch.tensor(ranks[0][name]["norms"], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(trajectory.steps.gradient_norm), logged, rtol=1e-5, atol=0)
    limit = RUNS[name][1]["max_grad_norm"]
    if 0 < limit < 1:
        expected = (limit / (logged + 1e-6)).clamp(max=1)
        assert (expected < 0.9).any()
        torch.testing.assert_close(torch.tensor(trajectory.steps.clip_factor), expected, rtol=1e-5, atol=0)
    else:
        assert (trajectory.steps.clip_factor == 1).all()


def test_two_processes_go_on_where_one_was_interrupted(launched):
    folder, ranks = launched
    trajectory = Trajectory.load(folder / "resumed" / "trajectory")
    counts = [len(sizes) for sizes in trajectory.steps.micro_batch_sizes]
    # 11 batches an epoch: one process takes 2 in an update, two processes 4 (and 4, and 3 of 11 with one repeated).
    assert counts[:CHECKPOINT] == [2] * CHECKPOINT
    assert counts[CHECKPOINT:] == [4] * 5
    rows = rows_of_both([rank["resumed"]["seen"] for rank in ranks], trajectory, done=CHECKPOINT)
    assert [step.tolist() for step in trajectory.steps.rows[CHECKPOINT:]] == rows
    assert_replayed(trajectory, ranks[0]["resumed"]["final"])


def test_one_process_goes_on_where_two_were_interrupted(launched):
    folder, ranks = launched
    assert "interrupted" in ranks[0]["interrupted"]["error"]
    model = MeanModel(seed=5)
    callback = TrajectoryCallback(folder / "interrupted" / "trajectory", num_states=4)
    trainer = make_trainer(folder / "interrupted", model, callback, **RESUMED)
    trainer.train(resume_from_checkpoint=str(folder / "interrupted" / "output" / f"checkpoint-{CHECKPOINT}"))
    trajectory = Trajectory.load(callback.folder)
    counts = [len(sizes) for sizes in trajectory.steps.micro_batch_sizes]
    assert counts == [4] * CHECKPOINT + [2, 1] + [2, 2, 2, 2, 2, 1] * 2
    seen = [step.tolist() for step in trajectory.steps.rows[CHECKPOINT:]]
    assert seen == rows_of_both([model.seen], trajectory, done=CHECKPOINT)
    assert_replayed(trajectory, {name: tensor.tolist() for name, tensor in trainable(model).items()})


def test_a_full_disk_on_the_main_process_ends_both(launched):
    _, ranks = launched
    main, other = (rank["full disk"]["error"] for rank in ranks)
    assert main.startswith("OSError: [Errno 28] No space left on device.")
    assert "Training stops, as it would go on without a record of step 3" in main
    assert other.startswith("RuntimeError: Recording failed on process 0, so that all stop: OSError")
    first, second = (len(rank["full disk"]["seen"]) for rank in ranks)
    assert first == second  # both stop at the same step: where the write failed, or at the next state
    assert 3 <= first <= 6
    assert [rank["full disk"]["hooks"] for rank in ranks] != [0, 0]


def test_set_ups_that_cannot_be_recorded_are_refused_by_both(launched):
    folder, ranks = launched
    for rank in ranks:
        assert (
            "2 processes that train together differ in `dataset_fingerprint`, `num_rows`"
            in (rank["other data"]["error"])
        )
        assert "NotImplementedError: The dataloader dispatches batches" in rank["dispatched"]["error"]
        for name in ("other data", "dispatched"):
            assert rank[name]["seen"] == []
            assert rank[name]["hooks"] == 0
    assert not (folder / "other" / "trajectory").exists()
