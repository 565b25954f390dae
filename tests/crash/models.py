"""The models whose training, synsets and attributions are killed: a perceptron, a vision Transformer, and a LoRA."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from torch import nn

from hf_rgm import ClusterMap, ReverseGradientMatchingDistiller, Synset
from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.testing import RecordedRun, TinyModel, tiny_dataset, tiny_recorded_run, tiny_synset
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import NUM_ROWS, MeanModel, make_trainer
from tests.text import classifier, lora, texts
from tests.vision import vit

MODELS = ("tiny", "vit", "lora")
DROPOUT = 0.3


def untrained(name: str, seed: int = 0) -> Any:
    """A ViT or LoRA with dropout, the same for a seed."""
    dropout = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": DROPOUT}
    if name == "lora":
        return lora(classifier("bert", seed=seed, **dropout))
    model = vit(seed, **dropout)
    # Else the Trainer does not find the weights again under the names that it saves: huggingface/transformers#43701.
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


def rows(name: str, num_rows: int, seed: int = 0) -> Any:
    return tiny_dataset(num_rows, seed=seed) if name == "vit" else texts(num_rows, seed=seed)


def to_record(name: str) -> tuple[Any, dict[str, Any]]:
    """Model and datasets of a training that is recorded and killed."""
    if name == "tiny":
        return MeanModel(dropout=DROPOUT), {}
    return untrained(name), {"train_dataset": rows(name, NUM_ROWS), "eval_dataset": rows(name, 6)}


@functools.cache
def recorded_run(name: str, seed: int = 0) -> RecordedRun:
    """A finished run of 48 rows in six clusters."""
    if name == "tiny":
        return tiny_recorded_run(seed)
    folder = Path(tempfile.mkdtemp(prefix="hf-rgm-crash-"))
    callback, train_dataset = TrajectoryCallback(folder / "trajectory", num_states=4), rows(name, 48)
    trainer = make_trainer(
        folder, untrained(name, seed), callback, train_dataset=train_dataset, eval_dataset=train_dataset, seed=seed
    )
    trainer.train()
    model: Any = trainer.model
    return RecordedRun(
        model=model.eval(),
        trajectory=Trajectory.load(callback.folder),
        train_dataset=train_dataset,
        queries=rows(name, 12, seed=1),
        clusters=ClusterMap.from_ids(np.arange(48) % 6),
    )


def distiller(name: str, output_dir: Path | None = None, **settings: Any) -> ReverseGradientMatchingDistiller:
    run = recorded_run(name)
    if name == "lora":
        settings["num_tokens"] = 6
    return ReverseGradientMatchingDistiller(
        run.model,
        run.trajectory,
        run.train_dataset,
        run.clusters,
        config=DistillationConfig(num_iterations=10, **settings),
        output_dir=output_dir,
        disable_tqdm=True,
    )


@functools.cache
def synset_of(name: str) -> Synset:
    return tiny_synset() if name == "tiny" else distiller(name).distill()


def load_model(name: str, folder: Path) -> nn.Module:
    """A saved model of this kind."""
    loaders: dict[str, Callable[[Path], nn.Module]] = {
        "tiny": TinyModel.from_pretrained,
        "vit": type(vit()).from_pretrained,
        "lora": lambda saved: PeftModel.from_pretrained(classifier("bert"), saved),
    }
    return loaders[name](folder)
