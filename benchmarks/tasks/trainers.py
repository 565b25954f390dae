"""The trainer that all tasks share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments


def quiet_trainer(
    model: PreTrainedModel, dataset: Dataset, seed: int, callbacks: Iterable[TrainerCallback] = (), **settings: Any
) -> Trainer:
    """
    A `Trainer` on the CPU that prints and saves nothing: AdamW with linear decay, no clipping.

    Args:
        model (`PreTrainedModel`): A fresh model.
        dataset (`Dataset`): Rows to train on.
        seed (`int`): Seed of their order.
        callbacks (`Iterable[TrainerCallback]`, *optional*): More callbacks.
        settings: For `TrainingArguments`: batch size, learning rate, length.
    """
    arguments = {
        "output_dir": tempfile.mkdtemp(prefix="hf-rgm-benchmark-"),
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
    }
    trainer = Trainer(
        model, TrainingArguments(**{**arguments, **settings}), train_dataset=dataset, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
