"""TRAK, by its authors' package traker."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peers.common import (
    Logits,
    as_tensors,
    ensemble,
    load_peer,
    loader,
    prediction,
    shared,
    trained_bytes,
)
from benchmarks.recorded import Method, Prediction, Recorded
from hf_rgm.engines.objectives import log_odds_margin
from hf_rgm.model.losses import IGNORED_LABEL

BATCH_SIZE = 100


def trak(num_models: int, *, regularization: float, projection_dimension: int = 1024) -> Method:
    """
    TRAK with the log-odds of the label as output function, Gaussian projections and float32.

    For language models the output function is the sum of the log-odds of a row's tokens, as in the TRAK paper (Park et
    al., "TRAK: Attributing Model Behavior at Scale", ICML 2023), and a row's weight is the mean over its tokens of one
    minus the token's probability. Queries have that output function too, whatever the task's objective.

    Args:
        num_models (`int`): Models of the ensemble, the recorded one among them.
        regularization (`float`): `lambda_reg`, added to the diagonal of the projected gradients' Gram matrix.
        projection_dimension (`int`, *optional*, defaults to `1024`): Dimensions that gradients are projected to.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        features = shared(recorded, ("trak", projection_dimension), partial(_Features, recorded, projection_dimension))
        return features.predict(queries, num_models, regularization)

    return run


class _Features:
    """
    A `TRAKer` and the projected gradients it keeps: computed once for each model, finalized anew for each setting.

    Args:
        recorded (`Recorded`): The recorded run.
        projection_dimension (`int`): Dimensions that gradients are projected to.
    """

    def __init__(self, recorded: Recorded, projection_dimension: int) -> None:
        traker, projectors, outputs = (load_peer(f"trak.{n}") for n in ("traker", "projectors", "modelout_functions"))
        self.recorded = recorded
        self.model = Logits(recorded.model)
        self.train = as_tensors(recorded.task.train, recorded.model)
        self.seconds: list[float] = []
        self._folder = tempfile.TemporaryDirectory(prefix="hf-rgm-trak-")
        # One block: BasicProjector draws the whole matrix anew for every block of every batch.
        self.projector: Any = projectors.BasicProjector(
            grad_dim=sum(parameter.numel() for parameter in self.model.parameters()),
            proj_dim=projection_dimension,
            seed=0,
            proj_type=projectors.ProjectionType.normal,
            device="cpu",
            block_size=projection_dimension,
        )
        self.peer: Any = traker.TRAKer(
            model=self.model,
            task=log_odds_output(outputs),
            train_set_size=len(self.train),
            save_dir=self._folder.name,
            device="cpu",
            projector=self.projector,
            proj_dim=projection_dimension,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )

    def predict(self, queries: Dataset, num_models: int, regularization: float) -> Prediction:
        """Scores by the first `num_models` models."""
        members = ensemble(self.recorded, num_models)
        checkpoints = [self.model.checkpoint(member.parameters) for member in members]
        for index in range(len(self.seconds), num_models):
            self._featurize(index, checkpoints[index])
        start = time.process_time()
        self._finalize(num_models, regularization)
        finalized = time.process_time()
        tests = as_tensors(queries, self.recorded.model)
        name = f"{len(tests)} queries"
        for index, checkpoint in enumerate(checkpoints):
            self.peer.start_scoring_checkpoint(name, checkpoint, model_id=index, num_targets=len(tests))
            with torch.no_grad():
                for batch in loader(tests, BATCH_SIZE):
                    self.peer.score(batch, num_samples=len(batch[0]))
        scores = torch.tensor(self.peer.finalize_scores(name, model_ids=range(num_models))).T
        # Features and weights of every row, and the models, for the gradients of queries.
        numbers_kept = len(self.train) * (self.projector.proj_dim + 1)
        return prediction(
            self.recorded,
            scores,
            offline_seconds=sum(member.seconds for member in members)
            + sum(self.seconds[:num_models])
            + finalized
            - start,
            online_seconds=time.process_time() - finalized,
            kept_bytes=num_models * (4 * numbers_kept + trained_bytes(self.recorded.model)),
        )

    def _featurize(self, index: int, checkpoint: dict[str, Tensor]) -> None:
        start = time.process_time()
        self.peer.load_checkpoint(checkpoint, model_id=index)
        with torch.no_grad():
            for batch in loader(self.train, BATCH_SIZE):
                self.peer.featurize(batch, num_samples=len(batch[0]))
        self.seconds.append(time.process_time() - start)

    def _finalize(self, num_models: int, regularization: float) -> None:
        self.peer.score_computer.lambda_reg = regularization
        for index in range(num_models):
            self.peer.saver.model_ids[index]["is_finalized"] = 0
        self.peer.finalize_features(model_ids=range(num_models))
        # `finalize_features` frees the projection matrix, and for the model projected last nothing draws it again.
        self.projector.generate_sketch_matrix(self.projector.generator_states[0])


def log_odds_output(outputs: ModuleType) -> Any:
    """What TRAK predicts, as an output function of `trak.modelout_functions`."""

    class LogOddsOutput(outputs.AbstractModelOutput):
        """
        The log-odds of one row's label, and one minus the label's probability as the row's weight.

        Of the labels of tokens that are not -100, log-odds are summed and weights averaged.
        """

        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(
            model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, label: Tensor
        ) -> Tensor:
            margins = log_odds_margin(functional_call(model, (weights, buffers), (inputs[None],)), label[None])
            return margins.masked_fill(label[None] == IGNORED_LABEL, 0.0).sum()

        def get_out_to_loss_grad(
            self, model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: Iterable[Tensor]
        ) -> Tensor:
            inputs, labels = batch
            margins = log_odds_margin(functional_call(model, (weights, buffers), (inputs,)), labels)
            missed = torch.sigmoid(-margins).detach().reshape(len(labels), -1)
            known = (labels != IGNORED_LABEL).reshape(len(labels), -1)
            return (missed * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)

    return LogOddsOutput()
