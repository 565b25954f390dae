"""
What each of two processes does that train together; `tests/recording/test_distributed.py` launches it and looks.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.recording.distributed FOLDER
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hf_rgm.recording.recording
from hf_rgm.recording.callback import TrajectoryCallback
from tests.recording.helpers import MeanModel, OutOfMemoryModel, UpdateModel, dataset, make_trainer, trainable

# 22 rows in batches of 4: three batches for each process, of which the last has rows of the epoch's beginning.
RUNS: dict[str, tuple[type[MeanModel], dict[str, Any]]] = {
    "clipped": (MeanModel, {"max_grad_norm": 0.2}),
    "accumulated": (MeanModel, {"max_grad_norm": 0.2, "gradient_accumulation_steps": 2}),
    "unclipped": (MeanModel, {"max_grad_norm": 1e6, "optim": "sgd"}),
    "update": (UpdateModel, {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}),
    "split": (
        UpdateModel,
        {
            "max_grad_norm": 0.2,
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "accelerator_config": {"split_batches": True},
        },
    ),
}
RESUMED: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.3,
    "save_strategy": "steps",
    "save_steps": 4,
    "lr_scheduler_type": "constant",
}
CHECKPOINT = 4


def record(folder: Path, model: MeanModel, resume: bool = False, **arguments: Any) -> dict[str, Any]:
    """Trains and records, and gives back what this process saw of it."""
    callback = TrajectoryCallback(folder / "trajectory", num_states=4)
    trainer = make_trainer(folder, model, callback, **({"logging_strategy": "steps", "logging_steps": 1} | arguments))
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except (RuntimeError, OSError, NotImplementedError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    return {
        "world_size": trainer.args.world_size,
        "seen": model.seen,
        "final": {name: tensor.tolist() for name, tensor in trainable(model).items()},
        "norms": [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log],
        "hooks": sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()),
        "summary": callback.summary(),
        "error": error,
    }


def full_disk(folder: Path, rank: int) -> dict[str, Any]:
    """The main process cannot write the second state."""
    original: Callable[..., None] = hf_rgm.recording.recording.write_state

    def write_state(path: Path, state: Any) -> None:
        if state.step > 0:
            raise OSError(errno.ENOSPC, "No space left on device.")
        original(path, state)

    hf_rgm.recording.recording.write_state = write_state
    try:
        return record(folder, MeanModel())
    finally:
        hf_rgm.recording.recording.write_state = original


def main(folder: Path) -> None:
    """Trains in all ways, one after the other."""
    results: dict[str, Any] = {}
    for name, (model_class, arguments) in RUNS.items():
        results[name] = record(folder / name, model_class(), **arguments)
    rank = torch.distributed.get_rank()
    results["resumed"] = record(folder / "resumed", MeanModel(seed=5), resume=True, **RESUMED)
    results["interrupted"] = record(
        folder / "interrupted", OutOfMemoryModel(fails_at=12, message="interrupted"), **RESUMED
    )
    results["full disk"] = full_disk(folder / "full", rank)
    results["other data"] = record(folder / "other", MeanModel(), train_dataset=dataset()[: 20 + rank])
    dispatching = {"accelerator_config": {"dispatch_batches": True}}
    results["dispatched"] = record(folder / "dispatched", MeanModel(), **dispatching)
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
