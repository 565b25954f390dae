"""The vendors' sentences, by LoRA of MiniLM: adapters of rank 8 on queries and values, and the classifier."""

from __future__ import annotations

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from benchmarks.tasks.vendors import VendorTask, mini_lm, usual_trainer, vendors_task


def build_trainer(dataset: Dataset, seed: int, callbacks=()) -> Trainer:
    """At a learning rate of 1e-3, with dropout of the adapters' inputs."""
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"])
    return usual_trainer(get_peft_model(mini_lm(seed), lora), dataset, seed, callbacks, learning_rate=1e-3)


def load() -> VendorTask:
    """The task."""
    return vendors_task("vendors_lora", build_trainer, seeds=(1, 2))
