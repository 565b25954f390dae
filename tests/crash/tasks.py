"""What is killed: a training that is recorded, a distillation, savings and pushes. Each is run in a worker process."""

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
from hf_rgm import AttributionResult, Attributor, ClusterMap, ReverseGradientMatchingDistiller, Synset
from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.testing import TinyModel, tiny_recorded_run, tiny_synset
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import MeanModel, make_trainer

KINDS = ("clusters", "trajectory", "synset", "result", "unlearned")


@functools.cache
def artefact(kind: str, version: int) -> Any:
    """Two versions of each artefact, which differ in more than one file."""
    run = tiny_recorded_run(version)
    if kind == "clusters":
        return run.clusters if version == 0 else ClusterMap.from_ids(run.clusters.cluster_ids[::-1].copy())
    if kind == "trajectory":
        return run.trajectory
    synset = tiny_synset()
    if kind == "synset":
        samples = synset.samples.map(lambda tensor: tensor + version)
        return dataclasses.replace(synset, samples=samples, metadata={**synset.metadata, "version": version})
    attributor = Attributor(tiny_recorded_run().model, synset, disable_tqdm=True)
    if kind == "result":
        result = attributor.attribute(run.queries)
        return dataclasses.replace(result, scores=result.scores * (1 + version))
    return dataclasses.replace(attributor.unlearn([synset.clusters.names[version]]), model=run.model)


def save(kind: str, version: int, folder: str, exchange: bool = True) -> None:
    """Saves an artefact; `exchange=False` as on a system that cannot swap two folders in one step."""
    if not exchange:
        hf_rgm.files.writing.exchange = lambda first, second: False
    value = artefact(kind, version)
    if kind in ("clusters", "trajectory"):
        value.save(folder)
    else:
        value.save_pretrained(folder)


def load(kind: str, folder: Path) -> Any:
    """Reads all of an artefact."""
    if kind == "clusters":
        return ClusterMap.load(folder)
    if kind == "trajectory":
        trajectory = Trajectory.load(folder)
        return [trajectory.state(step) for step in trajectory.state_steps]
    if kind == "unlearned":
        return TinyModel.from_pretrained(folder), json.loads((folder / "unlearning.json").read_text())
    return {"synset": Synset, "result": AttributionResult}[kind].from_pretrained(folder)


def record(folder: str, best: str | None = None) -> None:
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
    trainer = make_trainer(
        root, MeanModel(dropout=0.3), callback, gradient_accumulation_steps=2, max_grad_norm=0.3, **arguments
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


def distill(folder: str) -> None:
    """Distils six clusters in three blocks, and saves the synset."""
    run = tiny_recorded_run()
    distiller = ReverseGradientMatchingDistiller(
        run.model,
        run.trajectory,
        run.train_dataset,
        run.clusters,
        config=DistillationConfig(num_iterations=10, cluster_block_size=2, samples_per_cluster=2),
        output_dir=Path(folder) / "blocks",
        disable_tqdm=True,
    )
    distiller.distill().save_pretrained(Path(folder) / "synset")


def push(repo_id: str, kind: str, version: int) -> None:
    """Pushes an artefact."""
    artefact(kind, version).push_to_hub(repo_id)


def pull(repo_id: str, cache_dir: str, folder: str) -> None:
    """Loads a synset from the Hub with an empty cache and saves it."""
    Synset.from_pretrained(repo_id, cache_dir=cache_dir).save_pretrained(folder)


def prepare() -> None:
    """Makes everything that is saved, so that workers, which are forks, have it."""
    for kind in KINDS:
        for version in (0, 1):
            artefact(kind, version)


TASKS: dict[str, Callable[..., None]] = {task.__name__: task for task in (save, record, distill, push, pull)}
