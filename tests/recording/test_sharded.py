"""Two processes that each have a part of the model, by FSDP2: what is recorded is the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import MeanModel, assert_identical, dataset, replay, trainable
from tests.recording.sharded import RUNS, lora

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
# float32 arithmetic in another order: two processes' averages of averages, over at most 18 updates.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What both processes saw, by rank; and the folder they recorded to."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.recording.sharded", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def assert_ends_with(trajectory, seen):
    assert trajectory.final.parameters.keys() == seen["final"].keys()
    for name, values in seen["final"].items():
        assert torch.equal(trajectory.final.parameters[name], torch.tensor(values)), name


def assert_replayed(trajectory):
    replayed = replay(trajectory, MeanModel(), dataset())
    for step in trajectory.state_steps:
        recorded = trajectory.state(step)
        torch.testing.assert_close(replayed[step].parameters, recorded.parameters, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(replayed[step].moments, recorded.moments, rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_the_record_of_a_split_model_reproduces_training(launched, name):
    folder, ranks = launched
    trajectory = Trajectory.load(folder / name / "trajectory")
    assert [rank[name]["error"] for rank in ranks] == [None, None]
    for shard, parameter in ranks[0][name]["split"].items():
        assert len(trajectory.final.parameters[shard]) > parameter[0], "every process has the whole model"
    assert ranks[0][name]["seen"] != ranks[1][name]["seen"]
    assert_ends_with(trajectory, ranks[0][name])
    assert_replayed(trajectory)
    assert trajectory.metadata["model"]["class"] == RUNS[name][0].__name__


@pytest.mark.parametrize("name", RUNS)
def test_norms_and_factors_are_those_of_the_whole_gradient(launched, name):
    folder, ranks = launched
    trajectory = Trajectory.load(folder / name / "trajectory")
    logged = torch.tensor(ranks[0][name]["norms"], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(trajectory.steps.gradient_norm), logged, rtol=1e-5, atol=0)
    limit = RUNS[name][1]["max_grad_norm"]
    expected = (limit / (logged + 1e-6)).clamp(max=1)
    assert (expected < 0.9).any() == (limit < 1)
    torch.testing.assert_close(torch.tensor(trajectory.steps.clip_factor), expected, rtol=1e-5, atol=0)


def test_adapters_are_recorded_under_the_names_of_the_model_as_it_is_loaded(launched):
    folder, ranks = launched
    trajectory = Trajectory.load(folder / "lora" / "trajectory")
    wrapper = "_checkpoint_wrapped_module."
    seen = ranks[0]["lora"]["final"]
    assert any(wrapper in name for name in seen)
    assert_ends_with(trajectory, {"final": {name.replace(wrapper, ""): values for name, values in seen.items()}})
    assert set(FunctionalModel(lora()).space.names) == trajectory.final.parameters.keys()


def test_a_split_model_ends_with_its_best_checkpoint(launched):
    folder, ranks = launched
    trajectory = Trajectory.load(folder / "best" / "trajectory")
    assert 0 < trajectory.num_steps < 9
    assert_ends_with(trajectory, ranks[0]["best"])


def test_a_split_run_goes_on_from_its_checkpoint(launched):
    folder, ranks = launched
    assert all("interrupted" in rank["interrupted"]["error"] for rank in ranks)
    trajectory = Trajectory.load(folder / "resumed" / "trajectory")
    assert trajectory.num_steps == 9
    assert_ends_with(trajectory, ranks[0]["resumed"])
    assert_replayed(trajectory)


def test_a_split_run_that_stops_early_ends_there(launched):
    folder, ranks = launched
    trajectory = Trajectory.load(folder / "stopped" / "trajectory")
    assert trajectory.num_steps == 4
    assert_ends_with(trajectory, ranks[0]["stopped"])


def test_where_the_main_process_refuses_none_waits(launched):
    _, ranks = launched
    assert "holds the complete trajectory of another training run" in ranks[0]["taken"]["error"]
    assert "Recording failed on process 0" in ranks[1]["taken"]["error"]


def test_a_split_model_is_not_distilled(launched):
    _, ranks = launched
    assert "`model` (FSDPMeanModel) is split among processes" in ranks[0]["distilled"]


def test_the_first_state_is_the_whole_model_as_it_was_made(launched):
    folder, _ = launched
    first = Trajectory.load(folder / "clipped" / "trajectory").state(0).parameters
    assert_identical(first, trainable(MeanModel()))
