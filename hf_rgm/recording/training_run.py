"""What is known of a training run that is being recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_rgm.model.sharding import is_sharded, named_parameters
from hf_rgm.recording.batches import RowSchedule
from hf_rgm.recording.capture import PendingStep, capture_state, optimizer_updates
from hf_rgm.recording.description import check_supported, describe_run, fingerprint_columns, inner_optimizer
from hf_rgm.recording.gradient_norms import GradientNorms
from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from hf_rgm.trajectory.optimizers import OptimizerRule
from hf_rgm.trajectory.states import TrajectoryState


@dataclass
class OngoingRun:
    """
    A training run that is being recorded, as one of its processes sees it.

    Args:
        parameters (`dict[str, nn.Parameter]`): The trainable ones, by name.
        optimizer (`torch.optim.Optimizer`): Without Accelerate's wrapper.
        rule (`OptimizerRule`): Its update rule.
        description (`dict[str, Any]`): What is written down of the run, JSON-safe.
        schedule (`RowSchedule`): Which rows are in which update.
        norms (`GradientNorms`): Measures gradients.
        planned (`set[int]`): Steps whose states are to be recorded.
        started (`float`): When, by `time.perf_counter`.
        next_step (`int`): The first step that is not written yet.
        is_main (`bool`): Whether this process writes.
        num_processes (`int`): Processes that train together.
        is_sharded (`bool`): Whether the model is split among them.
        best_step (`int`, *optional*): Step of the best checkpoint so far, where training is to end with it.
        batches (`list[np.ndarray]`): Rows of the update under way.
        steps (`list[PendingStep]`): Steps that are not written yet.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    rule: OptimizerRule
    description: dict[str, Any]
    schedule: RowSchedule
    norms: GradientNorms
    planned: set[int]
    started: float
    next_step: int
    is_main: bool
    num_processes: int
    is_sharded: bool
    best_step: int | None = None
    batches: list[np.ndarray] = field(default_factory=list)
    steps: list[PendingStep] = field(default_factory=list)

    @classmethod
    def prepare(
        cls,
        args: TrainingArguments,
        state: TrainerState,
        *,
        num_states: int,
        started: float,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> OngoingRun:
        """
        Checks that the run can be recorded, and puts the hooks of `norms` on its parameters.

        Args:
            args, state, model, optimizer, lr_scheduler, train_dataloader, kwargs: What callbacks are given.
            num_states (`int`): How many states are to be recorded.
            started (`float`): When, by `time.perf_counter`.

        Raises:
            NotImplementedError: If the optimizer, the order of rows or the parallelism cannot be recorded.
            ValueError: If the optimizer misses a trainable parameter.
        """
        del kwargs
        check_supported(args, model, lr_scheduler)
        optimizer = inner_optimizer(optimizer)
        named = named_parameters(model)
        rule = OptimizerRule.from_torch(optimizer, named.items())
        schedule = RowSchedule(train_dataloader, args.gradient_accumulation_steps, global_step=state.global_step)
        if schedule.mid_epoch and args.ignore_data_skip:
            raise NotImplementedError(
                "Training resumes in mid-epoch with `ignore_data_skip=True`, so that rows are seen twice in one "
                "epoch. Leave `ignore_data_skip` at its default."
            )
        parameters = {name: p for name, p in named.items() if p.requires_grad}
        description = describe_run(args, model, batch_size=schedule.batch_size, sampler_seed=schedule.seed) | {
            "optimizer": rule.to_dict(),
            "parameters": {name: list(parameter.shape) for name, parameter in parameters.items()},
            "num_rows": schedule.num_rows,
            "dataset_fingerprint": dataset_fingerprint(train_dataloader.dataset, fingerprint_columns(args, model)),
            "updates_before": optimizer_updates(optimizer, parameters),
        }
        return cls(
            parameters=parameters,
            optimizer=optimizer,
            rule=rule,
            description=description,
            schedule=schedule,
            norms=GradientNorms(
                parameters,
                max_norm=args.max_grad_norm or 0.0,
                num_processes=args.world_size,
                is_sharded=is_sharded(model),
            ),
            planned={round(step) for step in np.linspace(0, state.max_steps, num_states)},
            started=started,
            next_step=state.global_step,
            is_main=state.is_world_process_zero,
            num_processes=args.world_size,
            is_sharded=is_sharded(model),
            best_step=checkpoint_step(state.best_model_checkpoint) if args.load_best_model_at_end else None,
        )

    def captured(self, step: int) -> TrajectoryState | None:
        """
        The state as it is now, on the main process.

        Where the model is split, every process must ask for it.
        """
        if not self.is_main and not self.is_sharded:
            return None
        optimizer_updates(self.optimizer, self.parameters)
        state = capture_state(step, self.parameters, self.optimizer, self.rule, keep=self.is_main)
        return state if self.is_main else None


def checkpoint_step(checkpoint: str | None) -> int | None:
    """The step of a checkpoint folder, told by its name."""
    name = Path(checkpoint or "").name
    number = name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number != name and number.isdigit() else None
