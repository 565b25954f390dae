"""dattri's influence functions by conjugate gradients."""

from __future__ import annotations

import time

import torch
from datasets import Dataset
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.peers.common import (
    Logits,
    as_tensors,
    check_one_label_a_row,
    load_peer,
    loader,
    negative_objective,
    prediction,
    trained_bytes,
)
from benchmarks.recorded import Method, Prediction, Recorded

BATCH_SIZE = 256


def conjugate_gradients(regularization: float, *, num_iterations: int = 10, num_hessian_rows: int = 2500) -> Method:
    """
    `IFAttributorCG`.

    Its `attribute` solves anew for every batch of training rows. Here its parts are called instead, so that every
    query is solved for once and training rows come in batches.

    Args:
        regularization (`float`): What is added to the diagonal of the Hessian.
        num_iterations (`int`, *optional*, defaults to `10`): Iterations of each solution, one per query.
        num_hessian_rows (`int`, *optional*, defaults to `2500`): Random rows that stand for the Hessian of all where
            there are more. It must be taken in one batch, as every batch is inverted on its own, so that its cost and
            memory grow with the rows.

    The method raises `NotImplementedError` for language models.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        algorithm, task_module = load_peer("dattri.algorithm"), load_peer("dattri.task")
        train, tests = (as_tensors(part, recorded.model) for part in (recorded.task.train, queries))
        check_one_label_a_row(train, "dattri's influence functions")
        model, negative = Logits(recorded.model), negative_objective(recorded.task.objective)

        def loss(parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(model, parameters, (batch[0],)), batch[1])

        def target(parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            return negative(functional_call(model, parameters, (batch[0],)), batch[1])

        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:num_hessian_rows]
        hessian_rows = TensorDataset(*train[order.sort().values])
        start = time.process_time()
        attributor = algorithm.IFAttributorCG(
            task_module.AttributionTask(
                loss_func=loss, model=model, checkpoints=model.state_dict(), target_func=target
            ),
            max_iter=num_iterations,
            regularization=regularization,
        )
        attributor.cache(loader(hessian_rows))
        # Without the graph that autograd would keep of every iteration; torch.func's gradients do not need it.
        # Query by query: several at once are no faster, and take as many times the memory.
        with torch.no_grad():
            solutions = torch.cat(
                [
                    attributor.transform_test_rep(0, attributor.generate_test_rep(0, with_batch_of_one(query)))
                    for query in loader(tests, 1)
                ]
            )
            scores = torch.cat(
                [
                    solutions @ attributor.generate_train_rep(0, with_batch_of_one(batch)).T
                    for batch in loader(train, BATCH_SIZE)
                ],
                dim=1,
            )
        return prediction(
            recorded,
            scores,
            offline_seconds=0.0,
            online_seconds=time.process_time() - start,
            kept_bytes=trained_bytes(recorded.model),
            num_hessian_rows=len(hessian_rows),
        )

    return run


def with_batch_of_one(batch: list[Tensor]) -> tuple[Tensor, ...]:
    """Rows as dattri maps over them: in the second dimension, behind a batch of one."""
    return tuple(part.unsqueeze(0) for part in batch)
