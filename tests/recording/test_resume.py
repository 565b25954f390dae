"""A run that was interrupted and resumed leaves the record of one that was not."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.testing import tiny_dataset
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import (
    MeanModel,
    OutOfMemoryModel,
    assert_identical,
    dataset,
    make_trainer,
    trainable,
)
from tests.trajectory.test_storage import assert_same_state, assert_same_steps
from tests.vision import vit

ARGUMENTS = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.3,
    "save_strategy": "steps",
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
}


def uninterrupted(folder, num_states=4, **arguments):
    trainer = make_trainer(
        folder, MeanModel(), TrajectoryCallback(folder / "whole", num_states=num_states), **ARGUMENTS, **arguments
    )
    trainer.train()
    return trainer, Trajectory.load(folder / "whole")


def interrupt(folder, *, fails_at, model_class=OutOfMemoryModel, **arguments):
    """Trains until the forward pass `fails_at` breaks."""
    trainer = make_trainer(
        folder,
        model_class(fails_at=fails_at, message="interrupted"),
        TrajectoryCallback(folder / "trajectory", num_states=4),
        **ARGUMENTS,
        **arguments,
    )
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.train()


def resume(folder, checkpoint=True, num_states=4, overwrite=False, **arguments):
    checkpoint = str(folder / "output" / f"checkpoint-{checkpoint}") if checkpoint is not True else True
    callback = TrajectoryCallback(folder / "trajectory", num_states=num_states, overwrite=overwrite)
    trainer = make_trainer(folder, MeanModel(seed=5), callback, **(ARGUMENTS | arguments))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, Trajectory.load(folder / "trajectory")


# 3 epochs of 3 updates of 2 batches. A pass in update u has number 2u + 1 or 2u + 2.
@pytest.mark.parametrize(
    ("save_steps", "fails_at"), [(2, 10), (2, 12), (3, 8), (4, 17)], ids=["mid", "state", "epoch", "late"]
)
def test_resumed_record_is_that_of_an_uninterrupted_run(tmp_path, save_steps, fails_at):
    whole_trainer, whole = uninterrupted(tmp_path, save_steps=save_steps)
    shutil.rmtree(tmp_path / "output")
    interrupt(tmp_path, fails_at=fails_at, save_steps=save_steps)
    trainer, resumed = resume(tmp_path, save_steps=save_steps)
    assert_identical(trainable(trainer.model), trainable(whole_trainer.model))
    assert_same_steps(resumed.steps, whole.steps)
    assert resumed.state_steps == whole.state_steps == (0, 3, 6, 9)
    for step in whole.state_steps:
        assert_same_state(resumed.state(step), whole.state(step))
    differing = {key for key in whole.metadata if whole.metadata[key] != resumed.metadata[key]}
    assert differing <= {"recording", "model"}


def test_resuming_in_the_middle_of_a_written_part_drops_what_follows(tmp_path):
    _, whole = uninterrupted(tmp_path / "elsewhere", save_steps=1)
    # Parts end at steps 3 (a state), 5 (a checkpoint) and 6 (a state); the checkpoint resumed from is at step 4.
    interrupt(tmp_path, fails_at=15, save_steps=5)
    shutil.copytree(tmp_path / "elsewhere" / "output" / "checkpoint-4", tmp_path / "output" / "checkpoint-4")
    with pytest.raises(ValueError, match="does not know what the checkpoint holds"):
        resume(tmp_path, checkpoint=4)
    described = {name: tmp_path / name / "trajectory.json" for name in ("trajectory", "elsewhere/whole")}
    content, elsewhere = (json.loads(path.read_text()) for path in described.values())
    content["checkpoints"]["4"] = elsewhere["checkpoints"]["4"]
    described["trajectory"].write_text(json.dumps(content))
    _, resumed = resume(tmp_path, checkpoint=4, save_steps=50)
    assert_same_steps(resumed.steps, whole.steps)


class BreakAfterCheckpoint(TrainerCallback):
    """Comes before the recorder, which therefore does not hear of the checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= 6:
            raise RuntimeError("interrupted")


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_every_step_before_a_checkpoint_is_written_before_it(tmp_path, strategy):
    _, whole = uninterrupted(tmp_path / "elsewhere", num_states=2, save_steps=50)
    scores = iter([1, 2, 3, 4])
    arguments = {
        "save_strategy": strategy,
        "save_steps": 3,
        "eval_strategy": "epoch",
        "metric_for_best_model": "score",
        "compute_metrics": lambda _: {"score": next(scores)},
    }
    callbacks = BreakAfterCheckpoint(), TrajectoryCallback(tmp_path / "trajectory", num_states=2)
    trainer = make_trainer(tmp_path, MeanModel(), *callbacks, **(ARGUMENTS | arguments))
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.train()
    trainer, resumed = resume(tmp_path, checkpoint=6, num_states=2, **arguments)
    assert_same_steps(resumed.steps, whole.steps)
    assert_identical(resumed.final.parameters, trainable(trainer.model))


def test_longer_training_goes_on_where_a_complete_one_ended(tmp_path):
    trainer, first = resumable(tmp_path, num_train_epochs=1)
    trainer, longer = resume(tmp_path, num_train_epochs=2, save_steps=3)
    assert (first.num_steps, longer.num_steps) == (3, 6)
    assert_same_steps(longer.steps.select(0, 3), first.steps)
    assert set(first.state_steps) <= set(longer.state_steps)
    assert_identical(longer.final.parameters, trainable(trainer.model))


def resumable(folder, **arguments):
    trainer = make_trainer(
        folder,
        MeanModel(),
        TrajectoryCallback(folder / "trajectory", num_states=4),
        **(ARGUMENTS | {"save_steps": 1} | arguments),
    )
    trainer.train()
    return trainer, Trajectory.load(folder / "trajectory")


def test_resuming_finished_training_changes_nothing(tmp_path):
    _, first = resumable(tmp_path)
    _, again = resume(tmp_path, save_steps=1)
    assert_same_steps(again.steps, first.steps)
    for step in first.state_steps:
        assert_same_state(again.state(step), first.state(step))


def test_resuming_an_earlier_checkpoint_drops_finished_work_only_on_demand(tmp_path):
    _, first = resumable(tmp_path)
    with pytest.raises(FileExistsError, match="holds the complete trajectory"):
        resume(tmp_path, checkpoint=4, save_steps=1)
    assert_same_steps(Trajectory.load(tmp_path / "trajectory").steps, first.steps)
    trainer, again = resume(tmp_path, checkpoint=4, save_steps=1, overwrite=True)
    assert_same_steps(again.steps, first.steps)
    assert_identical(again.final.parameters, trainable(trainer.model))


def test_best_model_of_the_first_part_is_found_after_resuming(tmp_path):
    remaining = iter([9, 1, 2, 3])
    best = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "compute_metrics": lambda _: {"score": next(remaining)},
    }
    trainer = make_trainer(
        tmp_path,
        OutOfMemoryModel(fails_at=14, message="interrupted"),
        TrajectoryCallback(tmp_path / "trajectory", num_states=2),
        **(ARGUMENTS | best),
    )
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.train()
    trainer, resumed = resume(tmp_path, num_states=2, **best)
    assert trainer.state.best_global_step == 3
    assert resumed.state_steps == (0, 3)
    assert set(resumed.final.moments) == {"exp_avg", "exp_avg_sq"}
    assert_identical(resumed.final.parameters, trainable(trainer.model))


def test_gap_is_named(tmp_path):
    interrupt(tmp_path, fails_at=12, save_steps=2)
    for part in (tmp_path / "trajectory" / "steps").glob("part-*"):
        if part.name != "part-00000000.safetensors":
            part.unlink()
    before = sorted(path.name for path in (tmp_path / "trajectory" / "states").iterdir())
    with pytest.raises(ValueError, match="resumes at step 4, but .* records no steps 2 to 3. Resume"):
        resume(tmp_path, checkpoint=4)
    assert sorted(path.name for path in (tmp_path / "trajectory" / "states").iterdir()) == before
    shutil.rmtree(tmp_path / "trajectory")
    with pytest.raises(ValueError, match="records no steps 0 to 3.*train from the beginning"):
        resume(tmp_path, checkpoint=4)


def test_missing_first_state_is_noticed(tmp_path):
    interrupt(tmp_path, fails_at=12, save_steps=2)
    (tmp_path / "trajectory" / "states" / "step-00000000.safetensors").unlink()
    with pytest.raises(ValueError, match="step-00000000.safetensors is missing"):
        resume(tmp_path, checkpoint=4)


def test_damaged_part_is_named(tmp_path):
    interrupt(tmp_path, fails_at=12, save_steps=2)
    (tmp_path / "trajectory" / "steps" / "part-00000002.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="part-00000002.safetensors is damaged"):
        resume(tmp_path, checkpoint=4)


def test_resuming_on_other_data_is_refused(tmp_path):
    interrupt(tmp_path, fails_at=12, save_steps=2)
    other = [row | {"labels": 0} for row in dataset()]
    with pytest.raises(ValueError, match="`dataset_fingerprint` of the trajectory in .* is another"):
        resume(tmp_path, checkpoint=4, train_dataset=other)


def test_resuming_with_another_optimizer_is_refused(tmp_path):
    interrupt(tmp_path, fails_at=12, save_steps=2)
    path = tmp_path / "trajectory" / "trajectory.json"
    content = json.loads(path.read_text())
    content["optimizer"]["groups"][0]["weight_decay"] = 0.3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`optimizer` of the trajectory in .* is another"):
        resume(tmp_path, checkpoint=4)


def test_ignoring_the_data_that_was_seen_is_refused_in_mid_epoch(tmp_path):
    interrupt(tmp_path, fails_at=12, save_steps=2)
    with pytest.raises(NotImplementedError, match="`ignore_data_skip=True`"):
        resume(tmp_path, checkpoint=4, ignore_data_skip=True)


def test_no_step_is_lost_between_checkpoints(tmp_path):
    interrupt(tmp_path, fails_at=18, save_steps=1)
    _, resumed = resume(tmp_path, save_steps=1)
    assert len(resumed.steps) == 9
    assert np.isfinite(resumed.steps.gradient_norm).all()
    assert torch.isfinite(resumed.final.parameters["head.weight"]).all()


def test_a_checkpoint_without_its_optimizer_is_refused(tmp_path):
    interrupt(tmp_path, fails_at=12, save_steps=2, save_only_model=True)
    with pytest.raises(
        ValueError, match="with other `exp_avg` and `exp_avg_sq` than it stopped with.*save_only_model"
    ):
        resume(tmp_path, checkpoint=4)


def test_a_checkpoint_that_is_not_loaded_whole_is_refused(tmp_path):
    interrupt(tmp_path, fails_at=12, save_steps=2)
    path = tmp_path / "output" / "checkpoint-4" / "model.safetensors"
    tensors = load_file(path)
    tensors["head.bias"] = torch.randn(3)  # made anew, as transformers does for what it does not find
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="with other `parameters` than it stopped with.*not loaded whole"):
        resume(tmp_path, checkpoint=4)


class InterruptAt(TrainerCallback):
    """Breaks training at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("interrupted")


@pytest.mark.parametrize("own_names", [True, False])
def test_a_vit_is_resumed_if_it_is_saved_under_its_own_names(tmp_path, own_names):
    """As the error and docs/troubleshooting.md say; `python -m tests.crash --model vit` compares the records."""
    for checkpoint in (None, True):
        model = vit()
        if own_names:
            model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
        callbacks = [TrajectoryCallback(tmp_path / "trajectory", num_states=4)]
        callbacks += [] if checkpoint else [InterruptAt(6)]
        rows = tiny_dataset(22, seed=0)
        trainer = make_trainer(
            tmp_path, model, *callbacks, save_strategy="steps", save_steps=4, train_dataset=rows, eval_dataset=rows
        )
        if own_names and checkpoint:
            trainer.train(resume_from_checkpoint=checkpoint)
            assert Trajectory.load(tmp_path / "trajectory").num_steps == 18
        else:
            with pytest.raises((RuntimeError, ValueError), match="as transformers 5 does" if checkpoint else "interr"):
                trainer.train(resume_from_checkpoint=checkpoint)


def test_resuming_with_other_frozen_parameters_is_refused(tmp_path):
    for checkpoint in (None, True):
        model = OutOfMemoryModel(12, "interrupted") if checkpoint is None else MeanModel()
        model.layers[0].requires_grad_(False)
        if checkpoint:
            path = tmp_path / "output" / "checkpoint-4" / "model.safetensors"
            tensors = load_file(path)
            tensors["layers.0.weight"] += 1
            save_file(tensors, path, metadata={"format": "pt"})
        callback = TrajectoryCallback(tmp_path / "trajectory", num_states=4)
        trainer = make_trainer(tmp_path, model, callback, **ARGUMENTS, save_steps=2)
        with pytest.raises((RuntimeError, ValueError), match="`frozen_sha256` of" if checkpoint else "interrupted"):
            trainer.train(resume_from_checkpoint=checkpoint)


def test_a_recorded_state_that_was_changed_is_noticed(tmp_path):
    interrupt(tmp_path, fails_at=12, save_steps=2)
    path = tmp_path / "trajectory" / "states" / "step-00000000.safetensors"
    tensors = load_file(path)
    tensors["parameters.head.bias"] += 1
    save_file(tensors, path, metadata={"format": "pt", "step": "0"})
    with pytest.raises(ValueError, match=r"states of steps \['0'\] in .* are not what was recorded"):
        resume(tmp_path, checkpoint=4)


def test_resuming_on_rows_that_the_fingerprint_does_not_see_is_refused(tmp_path):
    rows = dataset(100)
    other = [row | {"labels": (row["labels"] + 1) % 3} if row["row"] == 51 else row for row in rows]
    interrupt(tmp_path, fails_at=12, save_steps=2, train_dataset=rows)
    with pytest.raises(ValueError, match="`rows_sha256` of the trajectory in .* is another"):
        resume(tmp_path, checkpoint=4, train_dataset=other)
