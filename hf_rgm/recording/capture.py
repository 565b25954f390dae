"""The current state and steps of a training run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_rgm.model.sharding import whole
from hf_rgm.model.warn_once import warn_once
from hf_rgm.trajectory.optimizers import OptimizerRule
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.steps import StepTable

logger = logging.getLogger(__name__)


def optimizer_updates(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> int:
    """Number of updates that Adam has counted, 0 for other optimizers; warns if it differs between parameters."""
    counts = {
        name: int(optimizer.state[parameter]["step"])
        for name, parameter in parameters.items()
        if "step" in optimizer.state.get(parameter, {})
    }
    most = max(counts.values(), default=0)
    fewer = sorted(name for name, count in counts.items() if count < most)
    if fewer:
        warn_once(
            logger,
            "Parameters %s (%d in all) had no gradient in some updates. A replay takes the number of all updates to "
            "correct Adam's bias, so it is approximate for them.",
            str(fewer[:3]),
            len(fewer),
        )
    return most


def capture_state(
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rule: OptimizerRule,
    *,
    keep: bool = True,
) -> TrajectoryState:
    """The current state, of live tensors; gathered on the CPU if FSDP2 splits the model (all must call)."""
    moments: dict[str, dict[str, Tensor]] = {}
    for kind in rule.moment_names:
        for name, parameter in parameters.items():
            moment = optimizer.state.get(parameter, {}).get(kind)
            if moment is not None:
                moments.setdefault(kind, {})[name] = whole(moment, keep=keep)
    return TrajectoryState(step, {name: whole(p, keep=keep) for name, p in parameters.items()}, moments)


def same_parameters(state: TrajectoryState, other: TrajectoryState) -> bool:
    """Whether a captured model has exactly the parameters of a recorded state."""
    return all(
        torch.equal(state.parameters[name], parameter.detach().to(device="cpu", dtype=torch.float32))
        for name, parameter in other.parameters.items()
    )


@dataclass
class PendingStep:
    """A step that is not written yet; norm and factor `()` stay on the device until then."""

    learning_rates: list[float]
    gradient_norm: Tensor
    clip_factor: Tensor
    batches: list[np.ndarray]
    scaled: bool = False  # loss scaling skips updates whose gradient is not finite
    skipped: bool = False
    epoch: float = 0.0


def are_finite(table: StepTable, first_step: int) -> bool:
    """Whether gradients are finite where loss scaling did not skip the update; warns if not."""
    bad = np.flatnonzero(~np.isfinite(table.gradient_norm) & ~table.skipped)
    if len(bad):
        logger.warning(
            "The gradient at step %d is NaN or infinite, and so is the model from there on. Stop, and train with "
            "float32 or bf16, a lower learning rate, or without the rows of that step.",
            first_step + int(bad[0]),
        )
    return not len(bad)


def as_table(steps: list[PendingStep]) -> StepTable:
    """The steps as a table; waits for the device once."""
    device = steps[0].gradient_norm.device
    measured = torch.stack([value.to(device) for step in steps for value in (step.gradient_norm, step.clip_factor)])
    norms, factors = measured.double().cpu().view(len(steps), 2).unbind(1)
    scaled, skipped = (np.array([getattr(step, name) for step in steps]) for name in ("scaled", "skipped"))
    # Fused optimizers check themselves whether gradients are finite, and do not tell Accelerate.
    skipped |= scaled & ~np.isfinite(norms.numpy())
    return StepTable(
        epoch=np.array([step.epoch for step in steps]),
        learning_rates=np.array([step.learning_rates for step in steps]),
        gradient_norm=norms.numpy(),
        clip_factor=np.where(skipped, 1.0, factors.numpy()),
        skipped=skipped,
        rows=[np.concatenate(step.batches) for step in steps],
        micro_batch_sizes=[[len(batch) for batch in step.batches] for step in steps],
    )
