"""A tiny vision Transformer recorded under a real Trainer: the unmodified model of the library's users."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.distillation.distiller import ReverseGradientMatchingDistiller
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.synset.synset import Synset
from hf_rgm.testing import tiny_dataset
from hf_rgm.trajectory.trajectory import Trajectory


def vit(seed: int = 0, **overrides) -> ViTForImageClassification:
    """About 800 parameters, `sdpa` attention, 1x4x4 pictures, three classes."""
    settings = {
        "image_size": 4,
        "patch_size": 2,
        "num_channels": 1,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "sdpa",
    }
    config = ViTConfig(**{**settings, **overrides})
    config.num_labels = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


def trainer_for(dataset, seed: int = 0, *, model=None, callbacks=(), **overrides) -> Trainer:
    """A fresh `Trainer` for two epochs, by default of a fresh [`vit`]."""
    settings = {
        "output_dir": tempfile.mkdtemp(prefix="hf-rgm-vit-"),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(**{"seed": seed, **settings, **overrides})
    model = vit(seed) if model is None else model
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(model, dataset, folder: Path | None = None, **overrides) -> Trainer:
    """Trains for two epochs, recorded if there is a folder."""
    callbacks = [] if folder is None else [TrajectoryCallback(folder, num_states=3)]
    seed = overrides.pop("seed", TrainingArguments.seed)
    trainer = trainer_for(dataset, seed, model=model, callbacks=callbacks, **overrides)
    trainer.train()
    return trainer


@dataclass
class VisionRun:
    """A recorded model, its data and its synset."""

    model: torch.nn.Module
    trajectory: Trajectory
    train_dataset: Dataset
    queries: Dataset
    synset: Synset


def distilled_run(
    model, *, dataset: Dataset | None = None, clusters: ClusterMap | None = None, **overrides
) -> VisionRun:
    """Records two epochs of training and distils them briefly; clusters are the labels unless given."""
    dataset, queries = dataset or tiny_dataset(24, seed=0), tiny_dataset(4, seed=1)
    folder = Path(tempfile.mkdtemp(prefix="hf-rgm-vit-")) / "trajectory"
    trained = train(model, dataset, folder, **overrides).model
    clusters = clusters or ClusterMap.from_column(dataset, "labels")
    distiller = ReverseGradientMatchingDistiller(
        trained, folder, dataset, clusters, config=DistillationConfig(num_iterations=10), disable_tqdm=True
    )
    return VisionRun(trained, Trajectory.load(folder), dataset, queries, distiller.distill())


@functools.cache
def vit_run() -> VisionRun:
    """The same run every time; do not change it."""
    return distilled_run(vit())
