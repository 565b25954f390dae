"""Softmax regression, trained to its optimum by a Trainer, with every closed form the peers can be held against."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.func import grad, hessian, vmap
from torch.nn import functional as F
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.recorded import Recorded
from benchmarks.tasks import Task
from hf_rgm import ClusterMap
from hf_rgm.engines.objectives import log_odds_margin

NUM_ROWS, NUM_QUERIES, NUM_FEATURES, NUM_LABELS = 60, 7, 4, 3
BATCH_SIZE = 20


class LinearConfig(PreTrainedConfig):
    model_type = "hf-rgm-linear-for-tests"


class LinearModel(PreTrainedModel):
    config_class = LinearConfig
    main_input_name = "features"

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(NUM_FEATURES, NUM_LABELS)
        self.post_init()

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.classifier(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def dataset(num_rows: int, seed: int) -> Dataset:
    """Features of norm 1 or so, labels of a noisy linear rule, so that no rule separates them."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randn(NUM_FEATURES, NUM_LABELS, generator=torch.Generator().manual_seed(5))
    features = torch.randn(num_rows, NUM_FEATURES, generator=generator)
    labels = (features @ rule + 1.5 * torch.randn(num_rows, NUM_LABELS, generator=generator)).argmax(-1)
    return Dataset.from_dict({"features": features.tolist(), "labels": labels.tolist()}).with_format("torch")


def build_trainer(rows: Dataset, seed: int, callbacks=()) -> Trainer:
    """AdamW without weight decay, decayed to rest at the optimum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LinearModel(LinearConfig(num_labels=NUM_LABELS))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="hf-rgm-peers-"),
        max_steps=300,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-2,
        max_grad_norm=0.0,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


@functools.cache
def recorded_run() -> Recorded:
    """The recorded run; the same object every time."""
    task = Task(
        name="linear",
        train=dataset(NUM_ROWS, 0),
        queries=dataset(NUM_QUERIES, 1),
        tuning_queries=dataset(NUM_QUERIES, 2),
        clusters=ClusterMap.from_ids(np.arange(NUM_ROWS) % 5),
        build_trainer=build_trainer,
        num_cluster_masks=4,
        num_row_masks=4,
        seeds=(1, 2),
    )
    return Recorded(task, Path(tempfile.mkdtemp(prefix="hf-rgm-peers-")) / "trajectory", num_states=5)


@functools.cache
def path() -> list[Tensor]:
    """Parameters before every step of the recorded run, by training it once more."""
    points: list[Tensor] = []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            points.append(flat(dict(kwargs["model"].named_parameters())))

    build_trainer(recorded_run().task.train, 0, callbacks=[Keep()]).train()
    return points


def flat(parameters: dict[str, Tensor]) -> Tensor:
    """Weights, then biases: `(num_parameters,)`, float64."""
    return torch.cat([parameters[f"classifier.{name}"].detach().double().flatten() for name in ("weight", "bias")])


def logits(parameters: Tensor, features: Tensor) -> Tensor:
    """The model at flat parameters."""
    weight = parameters[: NUM_FEATURES * NUM_LABELS].reshape(NUM_LABELS, NUM_FEATURES)
    return features @ weight.T + parameters[NUM_FEATURES * NUM_LABELS :]


def arrays(rows: Dataset) -> tuple[Tensor, Tensor]:
    """Features, float64, and labels."""
    return rows["features"][:].double(), rows["labels"][:]


def losses(parameters: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Losses of rows `(num_rows,)`."""
    return F.cross_entropy(logits(parameters, features), labels, reduction="none")


def margins(parameters: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Objectives of queries `(num_queries,)`."""
    return log_odds_margin(logits(parameters, features), labels)


def per_row(function, parameters: Tensor, rows: Dataset) -> Tensor:
    """Gradient of `losses` or `margins` of each row: `(num_rows, num_parameters)`."""
    features, labels = arrays(rows)
    return vmap(grad(lambda p, x, y: function(p, x[None], y[None])[0]), (None, 0, 0))(parameters, features, labels)


def mean_hessian(parameters: Tensor, rows: Dataset) -> Tensor:
    """Hessian of the mean loss of the rows."""
    return hessian(lambda p: losses(p, *arrays(rows)).mean())(parameters)


def optimum(weights: Tensor, rows: Dataset, start: Tensor) -> Tensor:
    """Newton's method on the weighted sum of losses; the common shift of all logits is left alone."""
    features, labels = arrays(rows)

    def objective(p: Tensor) -> Tensor:
        return weights @ losses(p, features, labels)

    for _ in range(8):
        start = start - torch.linalg.pinv(hessian(objective)(start), rtol=1e-9) @ grad(objective)(start)
    return start


@functools.cache
def exact_changes() -> np.ndarray:
    """f(with row) - f(without row) by solving anew without each row: `(NUM_QUERIES, NUM_ROWS)`."""
    task = recorded_run().task
    everything = torch.ones(NUM_ROWS, dtype=torch.float64)
    full = optimum(everything, task.train, flat(dict(recorded_run().model.named_parameters())))
    queries = arrays(task.queries)
    changes = []
    for row in range(NUM_ROWS):
        weights = everything.clone()
        weights[row] = 0.0
        changes.append(margins(full, *queries) - margins(optimum(weights, task.train, full), *queries))
    return torch.stack(changes, dim=1).numpy()
