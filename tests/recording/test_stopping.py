"""Training that is asked to stop, a clock that is set, and two runs that want one folder."""

import os
import signal
import subprocess
import sys
import time

import pytest
from transformers import TrainerCallback

from hf_rgm.files.writing import FOLDER_LOCK, FolderLock
from hf_rgm.recording import recording
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.trajectory.trajectory import Trajectory
from tests.files.test_writing import HOLDER
from tests.recording.helpers import MeanModel, StopAt, make_trainer, trainable
from tests.recording.test_resume import ARGUMENTS, assert_same_steps, resume, uninterrupted


class Terminate(TrainerCallback):
    """Sends SIGTERM to the own process at a step, and from then on slows training down."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        if state.global_step >= self.step:
            time.sleep(1)


def test_training_that_the_trainer_stops_on_sigterm_is_resumed(tmp_path):
    _, whole = uninterrupted(tmp_path / "elsewhere", save_steps=50)
    callback = TrajectoryCallback(tmp_path / "trajectory", num_states=4)
    arguments = ARGUMENTS | {"save_strategy": "no", "enable_jit_checkpoint": True}
    trainer = make_trainer(tmp_path, MeanModel(), callback, Terminate(1), **arguments)
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is not before
    (checkpoint,) = (tmp_path / "output").glob("checkpoint-*")
    stopped = Trajectory.load(tmp_path / "trajectory")
    assert 1 < stopped.num_steps < whole.num_steps
    assert stopped.metadata["stopped_early"] is True
    trainer, resumed = resume(tmp_path, save_steps=50)
    assert_same_steps(resumed.steps, whole.steps)
    assert resumed.metadata["stopped_early"] is False


def test_a_run_that_stopped_early_goes_on_from_an_earlier_checkpoint(tmp_path):
    _, whole = uninterrupted(tmp_path / "elsewhere", save_steps=50)
    callback = TrajectoryCallback(tmp_path / "trajectory", num_states=4)
    make_trainer(tmp_path, MeanModel(), callback, StopAt(5), **ARGUMENTS, save_steps=2).train()
    assert Trajectory.load(tmp_path / "trajectory").num_steps == 5
    _, resumed = resume(tmp_path, checkpoint=2, save_steps=50)
    assert_same_steps(resumed.steps, whole.steps)
    with pytest.raises(FileExistsError, match="holds the complete trajectory"):
        resume(tmp_path, checkpoint=2, save_steps=50)


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    expected_trainer, expected = uninterrupted(tmp_path / "elsewhere", save_steps=3)
    moment = iter(range(2_000_000_000, 0, -5000))
    monkeypatch.setattr(time, "time", lambda: float(next(moment)))
    trainer, found = uninterrupted(tmp_path, save_steps=3)
    assert_same_steps(found.steps, expected.steps)
    assert found.metadata["recording"]["training_seconds"] > 0
    for name, tensor in trainable(trainer.model).items():
        assert tensor.equal(trainable(expected_trainer.model)[name])


def test_a_folder_that_another_process_records_into_is_refused(tmp_path):
    folder = tmp_path / "trajectory"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder / FOLDER_LOCK)], stdout=subprocess.PIPE)
    process.stdout.readline()
    model = MeanModel()
    trainer = make_trainer(tmp_path, model, TrajectoryCallback(folder))
    try:
        with pytest.raises(RuntimeError, match="Another process is recording into .*trajectory"):
            trainer.train()
    finally:
        process.kill()
        process.wait()
    assert model.seen == []
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    trainer.train()
    assert Trajectory.load(folder).num_steps == 18
    lock = FolderLock(folder)
    lock.acquire()
    lock.release()


def test_what_could_not_be_written_stops_training_at_a_later_step(tmp_path, monkeypatch):
    original = recording.write_state

    def write_state(path, state):
        if state.step > 0:
            raise OSError(28, "No space left on device.")
        original(path, state)

    monkeypatch.setattr(recording, "write_state", write_state)
    model = MeanModel()
    trainer = make_trainer(tmp_path, model, TrajectoryCallback(tmp_path / "trajectory", num_states=4))
    with pytest.raises(OSError, match="No space left on device. Training stops, as .* without a record of step 6"):
        trainer.train()
    assert 6 <= len(model.seen) < 18


class Move(TrainerCallback):
    """Moves the folder of the trajectory away at a step."""

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.folder.rename(self.folder.with_name("moved"))


@pytest.mark.parametrize("step", [3, 8])
def test_a_folder_that_is_moved_away_ends_training(tmp_path, step):
    folder = tmp_path / "trajectory"
    callbacks = TrajectoryCallback(folder, num_states=4), Move(folder, step)
    trainer = make_trainer(tmp_path, MeanModel(), *callbacks, **ARGUMENTS, save_steps=4)
    with pytest.raises(FileNotFoundError, match="trajectory was moved or deleted .* Training stops"):
        trainer.train()


def test_states_are_those_of_their_step_however_late_they_are_written(tmp_path, monkeypatch):
    _, whole = uninterrupted(tmp_path / "elsewhere", num_states=10)
    original = recording.write_state

    def write_late(path, state):
        time.sleep(0.1)
        original(path, state)

    monkeypatch.setattr(recording, "write_state", write_late)
    _, late = uninterrupted(tmp_path, num_states=10)
    for step in whole.state_steps:
        for name, tensor in whole.state(step).parameters.items():
            assert late.state(step).parameters[name].equal(tensor)
