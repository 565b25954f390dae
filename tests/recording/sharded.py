"""
What each of two processes does that train a model together which FSDP2 splits between them;
`tests/recording/test_sharded.py` launches it and looks.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.recording.sharded FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, Trainer, TrainingArguments

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.sharding import whole
from hf_rgm.recording.callback import TrajectoryCallback
from tests.recording.helpers import MeanModel, OutOfMemoryModel, StopAt, UpdateModel, dataset

FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"}}
RUNS: dict[str, tuple[type[MeanModel], dict[str, Any]]] = {
    "clipped": (MeanModel, {"max_grad_norm": 0.2}),
    "accumulated": (UpdateModel, {"max_grad_norm": 0.2, "gradient_accumulation_steps": 2}),
    "unclipped": (MeanModel, {"max_grad_norm": 1e6, "optim": "sgd", "optim_args": "momentum=0.9"}),
}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.2}
BEST: dict[str, Any] = {
    **SAVING,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # So that an early checkpoint is the best.
}


class ShardingTrainer(Trainer):
    """A Trainer that splits the model on the CPU too, where Accelerate leaves FSDP out."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def record(
    folder: Path, model: nn.Module, *callbacks: Any, rows: Any = None, resume: bool = False, **arguments: Any
) -> dict[str, Any]:
    """Trains and records, and gives back what this process saw of it."""
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    callback = TrajectoryCallback(folder / "trajectory", num_states=4)
    trainer = ShardingTrainer(
        model,
        TrainingArguments(str(folder / "output"), **(defaults | FSDP | arguments)),
        train_dataset=dataset() if rows is None else rows,
        eval_dataset=dataset(6),
        callbacks=[callback, *callbacks],
    )
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except (RuntimeError, NotImplementedError, OSError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    parameters = dict(trainer.model.named_parameters())
    return {
        "split": {name: list(p.to_local().shape) for name, p in parameters.items() if hasattr(p, "to_local")},
        "seen": getattr(model, "seen", []),
        "final": {name: whole(p).tolist() for name, p in parameters.items() if p.requires_grad},
        "norms": [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log],
        "error": error,
    }


def lora() -> nn.Module:
    """A small language model with adapters, in blocks that FSDP2 wraps one by one."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    adapters = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["score"], task_type="SEQ_CLS"
    )
    return get_peft_model(GPT2ForSequenceClassification(config), adapters)


def texts() -> list[dict[str, Any]]:
    """Rows of token ids."""
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(1, 20, (6,), generator=generator), "labels": row["labels"]} for row in dataset()
    ]


def main(folder: Path) -> None:
    """Trains in all ways, one after the other."""
    results: dict[str, Any] = {
        name: record(folder / name, model_class(), **arguments) for name, (model_class, arguments) in RUNS.items()
    }
    rank = torch.distributed.get_rank()
    results["lora"] = record(
        folder / "lora",
        lora(),
        rows=texts(),
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"], "activation_checkpointing": True},
        gradient_checkpointing=False,
    )
    results["best"] = record(folder / "best", MeanModel(), **BEST)
    results["interrupted"] = record(folder / "resumed", OutOfMemoryModel(fails_at=5, message="interrupted"), **SAVING)
    results["resumed"] = record(folder / "resumed", MeanModel(seed=5), resume=True, **SAVING)
    results["stopped"] = record(folder / "stopped", MeanModel(), StopAt(4), **SAVING)
    results["taken"] = record(folder / "clipped", MeanModel())
    split = torch.distributed.fsdp.fully_shard(MeanModel())
    try:
        FunctionalModel(split)
    except ValueError as problem:
        results["distilled"] = str(problem)
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
