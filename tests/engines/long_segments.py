"""Recorded runs with few states, whose second moments do not change, and their recursion step by step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_rgm.engines.curvature import CurvatureRows
from hf_rgm.model.functional_model import ParameterSpace
from hf_rgm.trajectory.optimizers import OptimizerRule, ParameterGroup
from hf_rgm.trajectory.path import RecordedPath
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.steps import StepTable
from hf_rgm.trajectory.trajectory import Trajectory

SHAPES = {"a": (4,), "b": (3,)}
NUM_PARAMETERS, NUM_CLUSTERS = 7, 3
SPACE = ParameterSpace(tuple(SHAPES), tuple(SHAPES.values()))
MOMENTS = torch.tensor([0.04, 0.25, 1.0, 0.01, 0.09, 0.5, 0.3])
"""Adam's second moments without their bias, the same at every step."""


def long_run(
    optimizer: str,
    *,
    num_steps: int = 24,
    states: tuple[int, ...] = (0, 12, 24),
    rates: tuple[float, float] = (1.0, 1.0),
    decays: tuple[float, float] = (0.0, 0.0),
    clips: bool = False,
    skipped: tuple[int, ...] = (),
    warmup: int = 0,
    rate: float = 0.05,
    still: tuple[int, ...] = (),
    **constants,
) -> Trajectory:
    """
    A run of two groups, `a` and `b`, whose learning rates keep their ratio; `still` parameters never had a gradient.
    """
    if optimizer == "sgd":
        constants = {"momentum": 0.7, **constants}
    else:
        constants = {"betas": (0.8, 0.9), "eps": 1e-3, **constants}
    groups = tuple(
        ParameterGroup(names=(name,), weight_decay=decay, **constants)
        for name, decay in zip(SHAPES, decays, strict=True)
    )
    made = np.cumsum([step not in skipped for step in range(num_steps)])
    moments = MOMENTS.clone()
    moments[list(still)] = 0.0

    def state(step: int) -> TrajectoryState:
        second = moments * (1 - 0.9 ** max(1, int(made[step - 1])))
        kept = {} if optimizer == "sgd" or step == 0 else {"exp_avg_sq": SPACE.unflatten(second)}
        return TrajectoryState(step, SPACE.unflatten(torch.full((NUM_PARAMETERS,), float(step))), kept)

    schedule = [
        rate * min(1.0, step / warmup if warmup else 1.0) * (1 - 0.5 * step / num_steps) for step in range(num_steps)
    ]
    generator = np.random.default_rng(0)
    return Trajectory(
        optimizer=OptimizerRule(optimizer, groups),
        parameter_shapes=SHAPES,
        steps=StepTable(
            epoch=[0.0] * num_steps,
            learning_rates=[[factor * own for factor in rates] for own in schedule],
            gradient_norm=[1.0] * num_steps,
            clip_factor=generator.uniform(0.3, 1.0, num_steps) if clips else [1.0] * num_steps,
            skipped=[step in skipped for step in range(num_steps)],
        ),
        states={step: state(step) for step in states},
        num_rows=6,
        dataset_fingerprint="",
    )


def path_of(run: Trajectory) -> RecordedPath:
    return RecordedPath(run, SPACE, torch.device("cpu"), rewind=0.0, stride=1)


def random_rows(rank: int = 9, *, seed: int = 0, scale: float = 0.6) -> CurvatureRows:
    """Rows of the curvature, float64, a third of them of each cluster."""
    generator = torch.Generator().manual_seed(seed)
    rows = scale * torch.randn(rank, NUM_PARAMETERS, generator=generator, dtype=torch.float64)
    return CurvatureRows(rows, torch.arange(rank) % NUM_CLUSTERS)


def stepwise(
    run: Trajectory, first: int, last: int, curvature: CurvatureRows, deviation, momentum, force, mask
) -> tuple[Tensor, Tensor]:
    """The optimizer's own steps on `f + C delta`, one after the other, with dense matrices in float64: one mask."""
    rule, constants = run.optimizer, run.optimizer.groups[0]
    weights = mask.double()[curvature.clusters]
    dense = curvature.rows.T @ (weights[:, None] * curvature.rows)

    def spread(values) -> Tensor:
        return torch.cat([torch.full((4,), float(values[0])), torch.full((3,), float(values[1]))]).double()

    decay = spread([group.weight_decay for group in rule.groups])
    inverse = torch.ones(NUM_PARAMETERS, dtype=torch.float64)
    if rule.name != "sgd":
        moments = run.final.moments["exp_avg_sq"]
        raw = SPACE.flatten(moments).double() / (1 - 0.9 ** int(run.update_numbers[-1]))
        inverse = torch.where(raw > 0, 1 / (raw.sqrt() + constants.eps), 0.0)
    for step in range(first, last):
        if run.steps.skipped[step]:
            continue
        rates = spread(run.steps.learning_rates[step])
        update = int(run.update_numbers[step])
        gradient = float(run.steps.clip_factor[step]) * (force + dense @ deviation)
        if rule.name != "adamw":
            gradient = gradient + decay * deviation
        if rule.name == "sgd":
            own = 1.0 if update == 1 else 1 - constants.dampening
            momentum = constants.momentum * momentum + own * gradient
            direction = gradient + constants.momentum * momentum if constants.nesterov else momentum
        else:
            momentum = constants.betas[0] * momentum + (1 - constants.betas[0]) * gradient
            direction = inverse * momentum / (1 - constants.betas[0] ** update)
        if rule.name == "adamw":
            deviation = (1 - rates * decay) * deviation
        deviation = deviation - rates * direction
    return deviation, momentum
