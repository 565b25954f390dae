"""A tiny recorded run and its synset, trained in a second: for examples and tests."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.distillation.distiller import ReverseGradientMatchingDistiller
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.synset.synset import Synset
from hf_rgm.trajectory.trajectory import Trajectory


class TinyConfig(PreTrainedConfig):
    """Configuration of [`TinyModel`]."""

    model_type = "hf-rgm-tiny"

    def __init__(self, hidden_size: int = 8, **kwargs) -> None:
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class TinyModel(PreTrainedModel):
    """A perceptron with one hidden layer for 1x4x4 pictures: 171 parameters for three classes."""

    config_class = TinyConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.hidden = nn.Linear(16, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits `(batch_size, num_labels)`, and the mean cross entropy if `labels` are given."""
        logits = self.classifier(torch.tanh(self.hidden(pixel_values.flatten(1))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


@dataclass
class RecordedRun:
    """A trained [`TinyModel`] with its recorded training."""

    model: TinyModel
    trajectory: Trajectory
    train_dataset: Dataset  # 48 rows of `pixel_values` and `labels`
    queries: Dataset  # 12 rows
    clusters: ClusterMap  # six, two per class


def tiny_dataset(num_rows: int, *, seed: int) -> Dataset:
    """Dataset of three noisy patterns as classes: `pixel_values` `(1, 4, 4)` float32 and `labels`."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(num_rows) % 3
    pixels = patterns[labels] + 0.8 * torch.randn(num_rows, 1, 4, 4, generator=generator)
    return Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": labels.numpy()}).with_format("torch")


def tiny_trainer(dataset: Dataset, seed: int = 0, *, callbacks=(), **overrides) -> Trainer:
    """Fresh, silent `Trainer` of a [`TinyModel`] on the CPU; `overrides` go to `TrainingArguments`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyModel(TinyConfig(num_labels=3))
    settings = {
        "output_dir": tempfile.mkdtemp(prefix="hf-rgm-tiny-"),
        "num_train_epochs": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "seed": seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(**{**settings, **overrides})
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


@functools.cache
def tiny_recorded_run(seed: int = 0) -> RecordedRun:
    """Recorded run of a [`TinyModel`], trained once for each seed on the same data."""
    train_dataset = tiny_dataset(48, seed=0)
    folder = Path(tempfile.mkdtemp(prefix="hf-rgm-tiny-")) / "trajectory"
    trainer = tiny_trainer(train_dataset, seed, callbacks=[TrajectoryCallback(folder, num_states=6)])
    trainer.train()
    labels = torch.arange(48) % 3
    names = [f"class {label}, {half} half" for label in range(3) for half in ("first", "second")]
    clusters = ClusterMap.from_ids((2 * labels + (torch.arange(48) >= 24)).numpy(), names=names)
    return RecordedRun(
        model=trainer.model.eval(),  # type: ignore[union-attr, arg-type]
        trajectory=Trajectory.load(folder),
        train_dataset=train_dataset,
        queries=tiny_dataset(12, seed=1),
        clusters=clusters,
    )


@functools.cache
def tiny_synset(num_runs: int = 1, *, responses: str = "none") -> Synset:
    """Synset of [`tiny_recorded_run`] with one or several seeds, distilled once."""
    run = tiny_recorded_run()
    distiller = ReverseGradientMatchingDistiller(
        run.model,
        [tiny_recorded_run(seed).trajectory for seed in range(num_runs)],
        run.train_dataset,
        run.clusters,
        config=DistillationConfig(num_iterations=200, tolerance=0.0, responses=responses),
        disable_tqdm=True,
    )
    return distiller.distill()
