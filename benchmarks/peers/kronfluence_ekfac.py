"""kronfluence's EK-FAC influence functions."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.common import (
    Logits,
    as_tensors,
    folder_bytes,
    load_peer,
    negative_objective,
    prediction,
    shared,
    summed_loss,
    trained_bytes,
)
from benchmarks.recorded import Method, Prediction, Recorded
from hf_rgm.model.losses import IGNORED_LABEL
from hf_rgm.synset.inputs import TOKENS

BATCH_SIZE = 256


@dataclass
class Factors:
    """Kronecker factors fitted to the training rows, the seconds that took, and their folder, removed with them."""

    analyzer: Any
    seconds: float
    folder: tempfile.TemporaryDirectory


def ekfac(damping_factor: float | None) -> Method:
    """
    EK-FAC with the Fisher matrix of labels drawn from the model.

    Of linear and convolutional layers: embeddings and layer norms are left out, of tied embeddings only their use as
    the head counts. For language models a label is drawn wherever a row has one.

    Args:
        damping_factor (`float` or `None`): What is added to the eigenvalues; `None` is kronfluence's own heuristic,
            a tenth of their mean in each layer.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        arguments = load_peer("kronfluence.arguments")
        factors = shared(recorded, "kronfluence", partial(fit_factors, recorded))
        train, tests = (as_tensors(part, recorded.model) for part in (recorded.task.train, queries))
        start = time.process_time()
        factors.analyzer.compute_pairwise_scores(
            scores_name="objective",
            factors_name="ekfac",
            query_dataset=tests,
            train_dataset=train,
            per_device_query_batch_size=len(tests),
            per_device_train_batch_size=BATCH_SIZE,
            score_args=arguments.ScoreArguments(damping_factor=damping_factor),
            overwrite_output_dir=True,
        )
        scores = factors.analyzer.load_pairwise_scores("objective")["all_modules"]
        folder = Path(factors.folder.name)
        return prediction(
            recorded,
            scores,
            offline_seconds=factors.seconds,
            online_seconds=time.process_time() - start,
            kept_bytes=trained_bytes(recorded.model)
            + folder_bytes(folder, "*eigen*.safetensors")
            + folder_bytes(folder, "*lambda*.safetensors"),
        )

    return run


def fit_factors(recorded: Recorded) -> Factors:
    """Kronecker factors of the recorded model on the training rows."""
    analyzer_module, arguments, task_module = (
        load_peer(f"kronfluence.{name}") for name in ("analyzer", "arguments", "task")
    )

    model = Logits(recorded.model)
    layers, mask, is_text = model.trained_layers(), model.mask, model.input_name == TOKENS
    measurement = negative_objective(recorded.task.objective)

    class ObjectiveTask(task_module.Task):
        """Summed losses of training rows, summed negative objectives of queries."""

        def compute_train_loss(self, batch: list[Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            logits = model(inputs)
            if sample:
                drawn = torch.multinomial(F.softmax(logits.detach(), dim=-1).flatten(0, -2), 1).reshape(labels.shape)
                labels = torch.where(labels == IGNORED_LABEL, labels, drawn)
            return summed_loss(logits, labels)

        def compute_measurement(self, batch: list[Tensor], model: nn.Module) -> Tensor:
            inputs, labels = batch
            return measurement(model(inputs), labels)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def get_attention_mask(self, batch: list[Tensor]) -> Tensor | None:
            return mask(batch[0]) if is_text else None

    folder = tempfile.TemporaryDirectory(prefix="hf-rgm-kronfluence-")
    train = as_tensors(recorded.task.train, recorded.model)
    task = ObjectiveTask()
    start = time.process_time()
    analyzer = analyzer_module.Analyzer(
        "peer",
        analyzer_module.prepare_model(model, task),
        task,
        cpu=True,
        disable_tqdm=True,
        output_dir=folder.name,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        analyzer.fit_all_factors(
            factors_name="ekfac",
            dataset=train,
            per_device_batch_size=BATCH_SIZE,
            factor_args=arguments.FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )
    return Factors(analyzer, time.process_time() - start, folder)
