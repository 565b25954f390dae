"""dattri's data value embeddings (DVEmb), which follow the training run step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.func import functional_call
from transformers import TrainerCallback

from benchmarks.peers.common import (
    Logits,
    as_tensors,
    check_one_label_a_row,
    load_peer,
    loader,
    negative_objective,
    num_bytes,
    prediction,
    shared,
    summed_loss,
    trained_bytes,
)
from benchmarks.recorded import Method, Prediction, Recorded
from hf_rgm.trajectory.trajectory import Trajectory

LARGEST_DIMENSION = 8192
PROJECTION_DIMENSION = 4096
QUERY_BATCH_SIZE = 50


@dataclass
class Embeddings:
    """An attributor that has seen the whole run, the task of the queries' objective, and the seconds it took."""

    attributor: Any
    query_task: Any
    seconds: float


def dvemb(second_moments: str | None = None) -> Method:
    """
    `DVEmbAttributor` with gradients of every row at every step, from training the recorded run once more.

    Up to 8,192 parameters it works in full dimension, beyond that on random projections to 4,096.

    Args:
        second_moments (`str`, *optional*): DVEmb takes the optimizer for SGD. With `"final"` or `"mean"` it is given
            coordinates in which Adam with those second moments (of the end, or averaged over the recorded states) is
            SGD, which is our addition; by default it is as it comes, with Adam's learning rates.

    The method raises `NotImplementedError` for language models.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        embeddings = shared(recorded, ("dvemb", second_moments), partial(_embed, recorded, second_moments))
        attributor = embeddings.attributor
        start = time.process_time()
        # `attribute` takes the gradients of queries from the task's loss.
        attributor.task = embeddings.query_task
        scores = attributor.attribute(loader(as_tensors(queries, recorded.model), QUERY_BATCH_SIZE))
        return prediction(
            recorded,
            scores.T,
            offline_seconds=embeddings.seconds,
            online_seconds=time.process_time() - start,
            kept_bytes=trained_bytes(recorded.model) + num_bytes(attributor.embeddings.values()),
            dimension=attributor.embeddings[0].shape[1],
        )

    return run


def _embed(recorded: Recorded, second_moments: str | None) -> Embeddings:
    algorithm, task_module = load_peer("dattri.algorithm.dvemb"), load_peer("dattri.task")
    trajectory = Trajectory.load(recorded.folder)
    train = as_tensors(recorded.task.train, recorded.model)
    check_one_label_a_row(train, "dattri's DVEmb")
    inputs, labels = train.tensors
    model, negative = Logits(recorded.model), negative_objective(recorded.task.objective)
    scales = model.own(_scales(trajectory, second_moments)) if second_moments else {}

    def outputs(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
        scaled = {name: value * scales.get(name, 1.0) for name, value in parameters.items()}
        return functional_call(model, scaled, (rows[None],))

    def loss(parameters: dict[str, Tensor], row: tuple[Tensor, Tensor]) -> Tensor:
        return summed_loss(outputs(parameters, row[0]), row[1][None])

    def target(parameters: dict[str, Tensor], row: tuple[Tensor, Tensor]) -> Tensor:
        return negative(outputs(parameters, row[0]), row[1][None])

    row_task, query_task = (
        task_module.AttributionTask(loss_func=function, model=model, checkpoints=model.state_dict())
        for function in (loss, target)
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    projected = num_parameters > LARGEST_DIMENSION
    attributor = algorithm.DVEmbAttributor(row_task, proj_dim=PROJECTION_DIMENSION if projected else None)
    if projected:
        # dattri's own projector for the CPU draws its matrix anew for every batch.
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(num_parameters, PROJECTION_DIMENSION, generator=generator) / PROJECTION_DIMENSION**0.5
        attributor.projector = partial(torch.matmul, other=matrix)

    class CacheGradients(TrainerCallback):
        """Shows the attributor the rows of each step, at the parameters before it."""

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            place(kwargs["model"])
            rows = torch.tensor(trajectory.steps.rows[state.global_step])
            learning_rate = float(trajectory.steps.learning_rates[state.global_step].mean())
            attributor.cache_gradients(0, (inputs[rows], labels[rows]), rows, learning_rate)

    def place(trained: Any) -> None:
        with torch.no_grad():
            values = model.own({name: trained.get_parameter(name) for name in trajectory.parameter_shapes})
            for name, value in values.items():
                model.get_parameter(name).copy_(value / scales.get(name, 1.0))

    start = time.process_time()
    trainer = recorded.task.build_trainer(recorded.task.train, 0, callbacks=[CacheGradients()])
    trainer.train()
    place(trainer.model)
    for name in trajectory.parameter_shapes:
        if not torch.equal(recorded.model.get_parameter(name).cpu(), trainer.model.get_parameter(name).cpu()):
            raise RuntimeError(f"Training with the recorded run's seed gave another `{name}`: it is not reproducible.")
    attributor.cache()
    return Embeddings(attributor, query_task, time.process_time() - start)


def _scales(trajectory: Trajectory, second_moments: str) -> dict[str, Tensor]:
    """
    Square root of what Adam's step multiplies the momentum by, beside the learning rate, for every parameter.

    Second moments of the end can be so small that early steps, with their larger learning rates, diverge; then dattri
    raises a `ValueError`.
    """
    if trajectory.optimizer.name not in ("adam", "adamw"):
        raise NotImplementedError(f"Preconditioning is for Adam and AdamW, the run used {trajectory.optimizer.name}.")
    steps = [step for step in trajectory.state_steps if step > 0]
    states = [trajectory.state(step) for step in (steps[-1:] if second_moments == "final" else steps)]
    scales = {}
    for group in trajectory.optimizer.groups:
        for name in group.names:
            moments = [
                state.moments["exp_avg_sq"][name]
                / (1 - group.betas[1] ** int(trajectory.update_numbers[state.step - 1]))
                for state in states
            ]
            scales[name] = (torch.stack(moments).mean(0).sqrt() + group.eps).rsqrt()
    return scales
