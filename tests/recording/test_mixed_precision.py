"""Mixed precision with loss scaling: a real GradScaler, but in float32, so that what it does can be computed."""

import pytest
import torch
from accelerate.utils import AutocastKwargs

from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import MeanModel, dataset, make_trainer, replay, trainable

# float32 arithmetic in another order, over 18 updates.
TOLERANCE = 2e-6


class OverflowingModel(MeanModel):
    """Its loss is infinite in some training passes, as in fp16 with too large a scale."""

    def __init__(self, *overflows: int) -> None:
        super().__init__()
        self.overflows = overflows

    def forward(self, features, labels=None, row=None):
        output = super().forward(features, labels, row)
        if self.training and len(self.seen) in self.overflows:
            output["loss"] = output["loss"] * torch.inf
        return output


def train_scaled(folder, model, **arguments):
    callback = TrajectoryCallback(folder / "trajectory", num_states=19)
    trainer = make_trainer(folder, model, callback, fp16=True, logging_strategy="steps", logging_steps=1, **arguments)
    # Accelerate makes a scaler on accelerators only; on the CPU `fp16` is float32 without one.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    trainer.accelerator.native_amp = True
    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=False)
    trainer.train()
    return trainer, Trajectory.load(callback.folder)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_a_scaled_run_with_skipped_steps_is_replayed(tmp_path, optimizer, max_grad_norm):
    model = OverflowingModel(1, 8)
    trainer, trajectory = train_scaled(tmp_path, model, optim=optimizer, max_grad_norm=max_grad_norm)
    steps = trajectory.steps
    assert trajectory.metadata["fp16"] is True
    assert steps.skipped.nonzero()[0].tolist() == [0, 7]
    assert trajectory.update_numbers.tolist() == [*range(7), 6, *range(7, 17)]
    assert trainer.accelerator.scaler.get_scale() != 2.0**10
    replayed = replay(trajectory, model, dataset())
    for step in trajectory.state_steps:
        recorded = trajectory.state(step)
        torch.testing.assert_close(replayed[step].parameters, recorded.parameters, rtol=0, atol=TOLERANCE)
    # Fused optimizers make their moments, of zeros, before they look at the gradient.
    assert trajectory.state(1).moments.keys() == ({"exp_avg", "exp_avg_sq"} if "fused" in optimizer else set())
    torch.testing.assert_close(trajectory.final.parameters, trainable(model), rtol=0, atol=0)


def test_norms_and_factors_are_of_the_gradient_without_its_scale(tmp_path):
    trainer, trajectory = train_scaled(tmp_path, OverflowingModel(3), max_grad_norm=0.3, optim="adamw_torch")
    steps = trajectory.steps
    logged = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    made = ~steps.skipped
    assert steps.gradient_norm[made].tolist() == pytest.approx(torch.tensor(logged)[made].tolist(), rel=1e-6)
    assert steps.clip_factor[made].tolist() == pytest.approx(
        [min(1.0, 0.3 / (norm + 1e-6)) for norm in steps.gradient_norm[made]], rel=1e-5
    )
    assert steps.clip_factor[steps.skipped].tolist() == [1.0]
    # The scheduler stands still when the optimizer does.
    assert steps.learning_rates[2].tolist() == steps.learning_rates[3].tolist()
