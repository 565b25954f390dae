"""Short recorded `Trainer` runs of any model."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_rgm import TrajectoryCallback


def recorded_model(model: nn.Module, dataset, folder: Path, *, num_states: int, **overrides) -> nn.Module:
    """Trains a model on a dataset, records the run in `folder / "trajectory"`, and returns what the `Trainer` left."""
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(**{**settings, **overrides})
    callback = TrajectoryCallback(folder / "trajectory", num_states=num_states)
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.eval()
