"""A training run that is being recorded."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_rgm.model.losses import LossFunction
from hf_rgm.model.sharding import is_sharded, named_parameters
from hf_rgm.recording.batches import RowSchedule
from hf_rgm.recording.capture import PendingStep, capture_state, optimizer_updates
from hf_rgm.recording.comparison import Comparison
from hf_rgm.recording.description import check_supported, describe_run, fingerprint_columns, inner_optimizer
from hf_rgm.recording.gradient_norms import GradientNorms
from hf_rgm.recording.stage import Stage
from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from hf_rgm.trajectory.optimizers import OptimizerRule
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.trained_loss import TrainedLoss

logger = logging.getLogger(__name__)

MICRO_BATCHES_PER_LOOK = 300
"""A look at the trained loss takes as long as about three of them."""


class OngoingRun:
    """A training run that is being recorded, on one of its processes; it adds gradient hooks to the parameters."""

    def __init__(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *,
        num_states: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        train_dataloader: Any,
        **_: Any,
    ) -> None:
        self.started = time.perf_counter()
        check_supported(args, model, lr_scheduler)
        named = named_parameters(model)
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self.optimizer = inner_optimizer(optimizer)
        self.rule = OptimizerRule.from_torch(self.optimizer, named.items())
        self.rule.check_alike()
        self.schedule = RowSchedule(train_dataloader, args.gradient_accumulation_steps, global_step=state.global_step)
        if self.schedule.mid_epoch and args.ignore_data_skip:
            raise NotImplementedError(
                "Training resumes in mid-epoch with `ignore_data_skip=True`, so that rows are seen twice in one "
                "epoch. Leave `ignore_data_skip` at its default."
            )
        description = describe_run(args, model, batch_size=self.schedule.batch_size, sampler_seed=self.schedule.seed)
        self.description = description | {
            "optimizer": self.rule.to_dict(),
            "parameters": {name: list(parameter.shape) for name, parameter in self.parameters.items()},
            "num_rows": self.schedule.num_rows,
            "dataset_fingerprint": dataset_fingerprint(train_dataloader.dataset, fingerprint_columns(args, model)),
            "updates_before": optimizer_updates(self.optimizer, self.parameters),
        }
        self.planned = {round(step) for step in np.linspace(0, state.max_steps, num_states)}
        self.best_step = checkpoint_step(state.best_model_checkpoint) if args.load_best_model_at_end else None
        self.is_main = state.is_world_process_zero
        self.num_processes = args.world_size
        self.is_sharded = is_sharded(model)
        self.norms = GradientNorms(
            self.parameters,
            max_norm=args.max_grad_norm or 0.0,
            num_processes=self.num_processes,
            is_sharded=self.is_sharded,
        )
        self._stage = functools.partial(Stage, model, train_dataloader, [*self.parameters])
        self._rehearsed: tuple[Stage, TrainedLoss, Comparison] | None = None
        self.is_finite = True  # gradients so far
        self._looks = looks_again(self.planned, state.max_steps * args.gradient_accumulation_steps)
        self.batches: list[np.ndarray] = []  # rows of the current update
        self.steps: list[PendingStep] = []  # not written yet, the first of them `next_step`
        self.next_step = state.global_step

    def rehearse(self, row_loss: LossFunction | None) -> None:
        """Checks that what is trained is what will be attributed, and describes it. All processes must call this."""
        stage = self._stage(row_loss)
        found = stage.rehearse()
        if found is not None:
            self._rehearsed = (stage, *found)
            self.description["trained_loss"] = asdict(found[0])

    def trained_loss(self) -> dict[str, Any] | None:
        """Description of the trained loss, with losses of some rows under the final parameters."""
        if self._rehearsed is None:
            return self.description.get("trained_loss")
        stage, trained, _ = self._rehearsed
        return asdict(stage.with_losses(trained))

    def look_again(self, step: int) -> None:
        """Warns, once, if the trained loss has become another. All processes must call this."""
        if self._rehearsed is not None and step in self._looks:
            stage, trained, before = self._rehearsed
            changed = stage.look_again(trained, before, step)
            if changed is not None:
                logger.warning("Step %d: %s Scores of rows and clusters will be wrong from here on.", step, changed)
                self._rehearsed = None

    def captured(self, step: int) -> TrajectoryState | None:
        """The current state, on the main process; where the model is split, all processes must call this."""
        if not self.is_main and not self.is_sharded:
            return None
        optimizer_updates(self.optimizer, self.parameters)
        state = capture_state(step, self.parameters, self.optimizer, self.rule, keep=self.is_main)
        return state if self.is_main else None


def looks_again(planned: Collection[int], num_micro_batches: int) -> set[int]:
    """Recorded steps at which the trained loss is looked at again: the last, and others where that is cheap."""
    later = sorted(step for step in planned if step > 0)
    count = min(len(later), max(1, num_micro_batches // MICRO_BATCHES_PER_LOOK))
    return {later[len(later) - 1 - index * len(later) // count] for index in range(count)} if later else set()


def checkpoint_step(checkpoint: str | None) -> int | None:
    """Step of a checkpoint folder, by its name."""
    name = Path(checkpoint or "").name
    number = name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number != name and number.isdigit() else None
