"""The record is enough to train again: replaying it on the real rows gives the trained model."""

import pytest
import torch

from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import MeanModel, UpdateModel, dataset, make_trainer, replay, trainable

# float32 arithmetic in another order, over 18 updates.
TOLERANCE = 2e-6

OPTIMIZERS = {
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9,dampening=0.3", "learning_rate": 0.05},
    "nesterov": {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "learning_rate": 0.05},
    "adam": {},
    "adamw": {"optim": "adamw_torch"},
    "adamw_fused": {"optim": "adamw_torch_fused"},
}


def record(folder, model, optimizer, **arguments):
    optimizers = (None, None)
    if optimizer == "adam":
        decayed = [p for name, p in model.named_parameters() if name.endswith("weight")]
        others = [p for name, p in model.named_parameters() if not name.endswith("weight")]
        groups = [{"params": decayed, "weight_decay": 0.05, "lr": 0.01}, {"params": others}]
        optimizers = (torch.optim.Adam(groups, lr=0.02, betas=(0.8, 0.98)), None)
    callback = TrajectoryCallback(folder / "trajectory", num_states=4)
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 4} | OPTIMIZERS[optimizer] | arguments
    trainer = make_trainer(folder, model, callback, optimizers=optimizers, **settings)
    trainer.train()
    return trainer, Trajectory.load(folder / "trajectory")


def assert_replayed(trajectory, model):
    replayed = replay(trajectory, model, dataset())
    for step in trajectory.state_steps:
        recorded = trajectory.state(step)
        torch.testing.assert_close(replayed[step].parameters, recorded.parameters, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(replayed[step].moments, recorded.moments, rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("model_class", [MeanModel, UpdateModel])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_record_reproduces_training(tmp_path, optimizer, model_class, accumulation, max_grad_norm):
    trainer, trajectory = record(
        tmp_path,
        model_class(),
        optimizer,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=max_grad_norm,
    )
    assert trajectory.num_steps == (18 if accumulation == 1 else 6)
    assert trajectory.metadata["loss_reduction"] == ("update" if model_class is UpdateModel else "micro_batch")
    assert bool(trajectory.optimizer.moment_names) == (optimizer != "sgd")
    assert len({len(sizes) for sizes in trajectory.steps.micro_batch_sizes}) == (1 if accumulation == 1 else 2)
    if max_grad_norm:
        assert (trajectory.steps.clip_factor < 0.9).any()
    else:
        assert (trajectory.steps.clip_factor == 1).all()
    assert_replayed(trajectory, trainer.model)


def test_clipping_that_does_nothing_has_factor_one_exactly(tmp_path):
    _, trajectory = record(tmp_path, MeanModel(), "adamw", max_grad_norm=1e6, gradient_accumulation_steps=2)
    assert (trajectory.steps.clip_factor == 1).all()
    assert (trajectory.steps.gradient_norm > 0).all()


def test_gradient_norm_is_the_one_before_clipping_that_the_trainer_logs(tmp_path):
    trainer, trajectory = record(
        tmp_path, MeanModel(), "adamw", max_grad_norm=0.3, logging_strategy="steps", logging_steps=1
    )
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    torch.testing.assert_close(
        torch.tensor(trajectory.steps.gradient_norm),
        torch.tensor([entry["grad_norm"] for entry in logs], dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )
    assert [entry["learning_rate"] for entry in logs] == trajectory.steps.learning_rates[:, 0].tolist()
    assert [entry["epoch"] for entry in logs] == pytest.approx(trajectory.steps.epoch.tolist(), abs=1e-4)


def test_second_run_with_a_used_optimizer_is_replayed_from_its_moments(tmp_path):
    model = MeanModel()
    callback = TrajectoryCallback(tmp_path / "trajectory", num_states=3)
    trainer = make_trainer(tmp_path, model, callback, num_train_epochs=1)
    trainer.train()
    first = trainable(model)
    trainer.train()
    trajectory = Trajectory.load(tmp_path / "trajectory")
    torch.testing.assert_close(trajectory.state(0).parameters, first, rtol=0, atol=0)
    assert trajectory.state(0).moments["exp_avg"].keys() == first.keys()
    assert trajectory.update_numbers.tolist() == [7, 8, 9, 10, 11, 12]
    assert_replayed(trajectory, model)


def test_frozen_parameters_are_left_out(tmp_path):
    model = MeanModel()
    model.layers.requires_grad_(False)
    trainer, trajectory = record(tmp_path, model, "adamw", max_grad_norm=0.3)
    assert set(trajectory.parameter_shapes) == {"head.weight", "head.bias"}
    assert_replayed(trajectory, trainer.model)
