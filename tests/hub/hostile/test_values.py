"""Values that are formally right and mean nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hf_rgm import Trajectory
from hf_rgm.testing import tiny_recorded_run
from tests.hub.hostile.artefacts import ARTEFACTS
from tests.hub.hostile.damage import STATE, STEPS
from tests.hub.hostile.edits import tensor


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("learning_rates", torch.zeros_like),
        ("clip_factor", torch.zeros_like),
        ("skipped", torch.ones_like),
    ],
)
def test_a_run_that_changed_nothing_is_told_of(column, change, tmp_path, caplog):
    folder = Path(shutil.copytree(ARTEFACTS["Trajectory"].pristine, tmp_path / "run"))
    Trajectory.load(folder)
    assert "Every score by it is 0" not in caplog.text
    tensor(STEPS, column, change)(folder)
    Trajectory.load(folder)
    assert f"No step of the run in {folder} changed the model" in caplog.text


@pytest.mark.parametrize("key", ["parameters_scale.hidden.weight", "exp_avg_sq_scale.hidden.weight"])
def test_negative_scales_are_refused(key, tmp_path):
    tiny_recorded_run().trajectory.save(tmp_path / "run", precision="int8")
    tensor(STATE, key, lambda scale: -scale.abs() - 1)(tmp_path / "run")
    with pytest.raises(ValueError, match="has negative scales of"):
        Trajectory.load(tmp_path / "run").state(10)


def test_steps_whose_bits_changed_are_refused(tmp_path):
    folder = Path(shutil.copytree(ARTEFACTS["Trajectory"].pristine, tmp_path / "run"))
    content = (folder / STEPS).read_bytes()
    (folder / STEPS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="is not what was recorded: its content changed"):
        Trajectory.load(folder)
