"""Tiny training runs under a real Trainer, and a replay of what was recorded of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.trajectory.optimizers import apply_update
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.trajectory import Trajectory

NUM_ROWS = 22


class MeanModel(nn.Module):
    """Has decayed and undecayed parameters; its forward gives the mean loss of a batch and notes the rows it saw."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Dropout(dropout))
            self.head = nn.Linear(6, 3)
        self.seen: list[list[int]] = []

    def logits(self, features: Tensor, row: Tensor | None) -> Tensor:
        if self.training and torch.is_grad_enabled() and row is not None:
            self.seen.append(row.tolist())
        return self.head(self.layers(features))

    def forward(self, features: Tensor, labels: Tensor | None = None, row: Tensor | None = None) -> dict:
        logits = self.logits(features, row)
        return (
            {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}
        )


class UpdateModel(MeanModel):
    """Divides the summed loss by the number of items in the whole update, as Transformers' models do."""

    def forward(
        self, features: Tensor, labels: Tensor | None = None, row: Tensor | None = None, **kwargs: Any
    ) -> dict:
        logits = self.logits(features, row)
        if labels is None:
            return {"logits": logits}
        if "num_items_in_batch" not in kwargs:
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}
        total = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": total / kwargs["num_items_in_batch"], "logits": logits}


class OutOfMemoryModel(MeanModel):
    """Runs out of memory, once, in its training pass number `fails_at`."""

    def __init__(self, fails_at: int, message: str = "CUDA out of memory.") -> None:
        super().__init__()
        self.fails_at = fails_at
        self.message = message
        self.passes = 0

    def forward(self, features: Tensor, labels: Tensor | None = None, row: Tensor | None = None) -> dict:
        trained = self.training and torch.is_grad_enabled()
        self.passes += trained
        if self.passes == self.fails_at and trained:
            raise RuntimeError(self.message)
        return super().forward(features, labels, row)


class StopAt(TrainerCallback):
    """Ends training after a step, or (`epoch=True`) at the end of the epoch that step is in."""

    def __init__(self, step: int, *, epoch: bool = False) -> None:
        self.step = step
        self.epoch = epoch

    def on_step_end(self, args, state, control, **kwargs):
        if not self.epoch and state.global_step == self.step:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.epoch and state.global_step >= self.step:
            control.should_training_stop = True


def dataset(num_rows: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Rows with features, a label, their own number and a column that the model does not take."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(num_rows, 4, generator=generator)
    labels = torch.randint(3, (num_rows,), generator=generator)
    return [
        {"features": features[row], "labels": int(labels[row]), "row": row, "source": f"s{row % 2}"}
        for row in range(num_rows)
    ]


def make_trainer(
    folder: Path,
    model: nn.Module,
    *callbacks: TrainerCallback,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    optimizers: tuple = (None, None),
    compute_metrics: Any = None,
    **arguments: Any,
) -> Trainer:
    """A quiet Trainer: 3 epochs of 6 batches of 4 rows (the last one of 2), unless arguments say otherwise."""
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder / "output"), **(defaults | arguments)),
        train_dataset=dataset() if train_dataset is None else train_dataset,
        eval_dataset=dataset(6) if eval_dataset is None else eval_dataset,
        callbacks=list(callbacks),
        optimizers=optimizers,
        compute_metrics=compute_metrics,
    )


def train(
    folder: Path,
    model: nn.Module,
    *callbacks: TrainerCallback,
    num_states: int = 4,
    callback: TrajectoryCallback | None = None,
    **arguments: Any,
) -> tuple[Trainer, Trajectory]:
    """Trains and gives back what was recorded."""
    callback = callback or TrajectoryCallback(folder / "trajectory", num_states=num_states)
    trainer = make_trainer(folder, model, callback, *callbacks, **arguments)
    trainer.train()
    return trainer, Trajectory.load(callback.folder)


def replay(trajectory: Trajectory, model: nn.Module, rows: list[dict[str, Any]]) -> dict[int, TrajectoryState]:
    """Trains again from the first recorded state with the recorded rows, rates and factors and our own update rule."""
    steps = trajectory.steps
    assert steps.rows is not None and steps.micro_batch_sizes is not None
    state = trajectory.state(0)
    replayed = {0: state}
    features = torch.stack([row["features"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    for step in range(trajectory.num_steps):
        if steps.skipped[step]:
            state = TrajectoryState(step + 1, state.parameters, state.moments)
            replayed[step + 1] = state
            continue
        leaves = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
        batches = torch.tensor(steps.rows[step]).split(steps.micro_batch_sizes[step])
        sums = [_summed_loss(model, leaves, features[batch], labels[batch]) for batch in batches]
        if trajectory.metadata["loss_reduction"] == "update":
            loss = sum(sums) / sum(len(batch) for batch in batches)
        else:
            loss = sum(total / len(batch) for total, batch in zip(sums, batches, strict=True)) / len(batches)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        parameters, moments = apply_update(
            trajectory.optimizer,
            state.parameters,
            {name: g * steps.clip_factor[step] for name, g in zip(leaves, gradients, strict=True)},
            state.moments,
            learning_rates=steps.learning_rates[step].tolist(),
            step=int(trajectory.update_numbers[step]),
        )
        state = TrajectoryState(step + 1, parameters, moments)
        replayed[step + 1] = state
    return replayed


def _summed_loss(model: nn.Module, parameters: dict[str, Tensor], features: Tensor, labels: Tensor) -> Tensor:
    logits = functional_call(model, parameters, (features,))["logits"]
    return F.cross_entropy(logits, labels, reduction="sum")


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor equal, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
