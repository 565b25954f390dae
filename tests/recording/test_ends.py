"""The last recorded state is the model that training leaves, however training ends."""

import logging

import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_rgm.recording.callback import TrajectoryCallback
from tests.recording.helpers import MeanModel, StopAt, assert_identical, train, trainable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("stop", "num_steps"), [(StopAt(7), 7), (StopAt(7, epoch=True), 12), (StopAt(12, epoch=True), 12)]
)
def test_early_end_is_recorded_as_the_end(tmp_path, stop, num_steps, dtype):
    callback = TrajectoryCallback(tmp_path / "trajectory", num_states=4, dtype=dtype)
    trainer, trajectory = train(tmp_path, MeanModel(), stop, callback=callback)
    assert trajectory.num_steps == num_steps
    assert trajectory.state_steps == tuple(sorted({0, 6, num_steps} | ({12} if num_steps == 12 else set())))
    assert_identical(trajectory.final.parameters, trainable(trainer.model))


SCORES = {"best first": [9, 1, 2], "best in the middle": [1, 9, 2], "best last": [1, 2, 9]}


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["epoch", "steps", "best"])
def test_trajectory_ends_at_the_best_model(tmp_path, strategy, scores, dtype):
    remaining = iter(SCORES[scores])
    callback = TrajectoryCallback(tmp_path / "trajectory", num_states=5, dtype=dtype)
    arguments = {"eval_steps": 6, "save_steps": 6, "save_strategy": strategy}
    trainer, trajectory = train(
        tmp_path,
        MeanModel(),
        callback=callback,
        eval_strategy="steps" if strategy == "steps" else "epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        compute_metrics=lambda _: {"score": next(remaining)},
        **arguments,
    )
    best = 6 * (1 + max(range(3), key=SCORES[scores].__getitem__))
    assert trainer.state.best_global_step == best
    assert trajectory.num_steps == best
    assert trajectory.state_steps == tuple(step for step in (0, 4, 9, 14, 18) if step < best) + (best,)
    assert trajectory.final.moments["exp_avg"].keys() == trajectory.parameter_shapes.keys()
    assert_identical(trajectory.final.parameters, trainable(trainer.model))


def test_early_stopping_with_the_best_model(tmp_path):
    remaining = iter([1, 9, 2, 3, 4, 5])
    trainer, trajectory = train(
        tmp_path,
        MeanModel(),
        EarlyStoppingCallback(2),
        num_states=2,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        compute_metrics=lambda _: {"score": next(remaining)},
    )
    assert trainer.state.global_step == 12
    assert trajectory.state_steps == (0, 6)
    assert_identical(trajectory.final.parameters, trainable(trainer.model))
    assert not list((tmp_path / "trajectory" / "states").glob("step-00000003*"))


def test_best_checkpoint_that_was_lost_leaves_the_last_model(tmp_path, caplog):
    class Lose(StopAt):
        def on_save(self, args, state, control, **kwargs):
            for path in (tmp_path / "output" / "checkpoint-6").glob("*.safetensors"):
                path.unlink()

    remaining = iter([9, 1, 2])
    with caplog.at_level(logging.WARNING, logger="hf_rgm"):
        trainer, trajectory = train(
            tmp_path,
            MeanModel(),
            Lose(-1),
            num_states=2,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="score",
            compute_metrics=lambda _: {"score": next(remaining)},
        )
    assert "is not the recorded state of the best checkpoint" in caplog.text
    assert trajectory.num_steps == 18
    assert_identical(trajectory.final.parameters, trainable(trainer.model))
