"""
What is killed: a training that is recorded, a distillation, savings and pushes. Each is run in a worker process.

The first argument of each is which model of `tests/crash/models.py` it is about.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hf_rgm.files.writing
from hf_rgm import AttributionResult, Attributor, ClusterMap, Synset
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.trajectory.trajectory import Trajectory
from tests.crash.models import distiller, load_model, recorded_run, synset_of, to_record
from tests.recording.helpers import make_trainer

KINDS = ("clusters", "trajectory", "synset", "result", "unlearned")


@functools.cache
def artefact(model: str, kind: str, version: int) -> Any:
    """Two versions of each artefact, which differ in more than one file."""
    run = recorded_run(model, version)
    if kind == "clusters":
        return run.clusters if version == 0 else ClusterMap.from_ids(run.clusters.cluster_ids[::-1].copy())
    if kind == "trajectory":
        return run.trajectory
    synset = synset_of(model)
    if kind == "synset":
        metadata = {**synset.metadata, "version": version}
        return dataclasses.replace(synset, residuals=synset.residuals + version, metadata=metadata)
    attributor = Attributor(recorded_run(model).model, synset, disable_tqdm=True)
    if kind == "result":
        result = attributor.attribute(run.queries)
        return dataclasses.replace(result, scores=result.scores * (1 + version))
    return dataclasses.replace(attributor.unlearn([synset.clusters.names[version]]), model=run.model)


def save(model: str, kind: str, version: int, folder: str, exchange: bool = True) -> None:
    """Saves an artefact; `exchange=False` as on a system that cannot swap two folders in one step."""
    if not exchange:
        hf_rgm.files.writing.exchange = lambda first, second: False
    value = artefact(model, kind, version)
    if kind in ("clusters", "trajectory"):
        value.save(folder)
    else:
        value.save_pretrained(folder)


def load(model: str, kind: str, folder: Path) -> Any:
    """Reads all of an artefact."""
    if kind == "clusters":
        return ClusterMap.load(folder)
    if kind == "trajectory":
        trajectory = Trajectory.load(folder)
        return [trajectory.state(step) for step in trajectory.state_steps]
    if kind == "unlearned":
        return load_model(model, folder), json.loads((folder / "unlearning.json").read_text())
    return {"synset": Synset, "result": AttributionResult}[kind].from_pretrained(folder)


def record(model: str, folder: str, best: str | None = None) -> None:
    """
    Trains with dropout and records, from the last whole checkpoint on if there is one.

    With `best`, training ends with its best checkpoint, which is the `"first"` or the `"last"` of three.
    """
    root = Path(folder)
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    if best:
        arguments = {
            "save_strategy": "epoch",
            "eval_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "size",
            "greater_is_better": best == "last",
            # Logits grow as training goes on.
            "compute_metrics": lambda prediction: {"size": float(np.abs(prediction.predictions).mean())},
        }
    callback = TrajectoryCallback(root / "trajectory", num_states=3, dtype=torch.bfloat16)
    untrained, data = to_record(model)
    trainer = make_trainer(
        root, untrained, callback, gradient_accumulation_steps=2, max_grad_norm=0.3, **data, **arguments
    )
    trainer.train(resume_from_checkpoint=whole_checkpoints(root) or None)


def whole_checkpoints(root: Path) -> bool:
    """Removes checkpoints that the Trainer had not finished: it writes them in place, `trainer_state.json` last."""
    whole = False
    for checkpoint in (root / "output").glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            whole = True
    return whole


def distill(model: str, folder: str) -> None:
    """Distils six clusters in three blocks, and saves the synset."""
    blocks = distiller(model, Path(folder) / "blocks", cluster_block_size=2, samples_per_cluster=2)
    blocks.distill().save_pretrained(Path(folder) / "synset")


def push(model: str, repo_id: str, kind: str, version: int) -> None:
    """Pushes an artefact."""
    artefact(model, kind, version).push_to_hub(repo_id)


def pull(model: str, repo_id: str, cache_dir: str, folder: str) -> None:
    """Loads a synset from the Hub with an empty cache and saves it."""
    Synset.from_pretrained(repo_id, cache_dir=cache_dir).save_pretrained(folder)


def prepare(model: str) -> None:
    """Makes everything that is saved, so that workers, which are forks, have it."""
    for kind in KINDS:
        for version in (0, 1):
            artefact(model, kind, version)


TASKS: dict[str, Callable[..., None]] = {task.__name__: task for task in (save, record, distill, push, pull)}
