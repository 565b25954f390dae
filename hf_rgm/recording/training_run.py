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

from hf_rgm.model.functional_model import frozen_sha256
from hf_rgm.model.losses import LossFunction
from hf_rgm.model.sharding import is_sharded, named_parameters
from hf_rgm.recording.batches import RowSchedule
from hf_rgm.recording.capture import PendingStep, capture_state, optimizer_updates
from hf_rgm.recording.checkpoint_sums import checkpoint_sums
from hf_rgm.recording.comparison import Comparison
from hf_rgm.recording.description import (
    check_supported,
    describe_run,
    inner_optimizer,
    loss_scaler,
)
from hf_rgm.recording.gradient_norms import GradientNorms
from hf_rgm.recording.stage import Stage
from hf_rgm.recording.training_watch import TrainingWatch
from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from hf_rgm.trajectory.optimizers import OptimizerRule
from hf_rgm.trajectory.row_digest import readable_rows, rows_sha256
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
        self.is_sharded = is_sharded(model)
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self._frozen = {name: p for name, p in named.items() if not p.requires_grad}
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
        self._dataset, self._columns = train_dataloader.dataset, description["fingerprint_columns"]
        self.description = description | {
            "optimizer": self.rule.to_dict(),
            "parameters": {name: list(parameter.shape) for name, parameter in self.parameters.items()},
            "num_rows": self.schedule.num_rows,
            "dataset_fingerprint": dataset_fingerprint(self._dataset, self._columns),
            "frozen_sha256": frozen_sha256(self._frozen),
            "updates_before": optimizer_updates(self.optimizer, self.parameters),
        }
        step = state.global_step
        self.description["checkpoints"] = {str(step): self.checkpoint_sums()} if step else {}
        self.planned = {round(step) for step in np.linspace(0, state.max_steps, num_states)}
        self.best_step = checkpoint_step(state.best_model_checkpoint) if args.load_best_model_at_end else None
        self.is_main = state.is_world_process_zero
        self.num_processes = args.world_size
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
        self._scaler = loss_scaler(optimizer)
        self.steps: list[PendingStep] = []  # not written yet, the first of them `next_step`
        self.next_step = state.global_step
        self.noted_step: int | None = None  # whose checksums are noted
        self.watch = TrainingWatch(
            model, self.optimizer, self.rule, first_step=state.global_step, note_update=self._note_update
        )

    def _note_update(self) -> torch.Tensor:
        """Notes the update that the optimizer is about to make; whether its gradients are not the recorded ones."""
        learning_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        # Asking for the scale waits for the device, as the scaler itself does in most updates.
        scale = self._scaler.get_scale() if self._scaler is not None else 1.0
        norm, factor, altered = self.norms.measure(scale)
        scaled = self._scaler is not None
        self.steps.append(PendingStep(learning_rates, norm, factor, batches=self.batches, scaled=scaled))
        return altered

    def digest_rows(self, num_rows: int | None = None) -> dict[str, Any]:
        """Digest of `num_rows` rows, or of as many as time allows, for the description."""
        count = readable_rows(self._dataset, self._columns) if num_rows is None else num_rows
        return {"num_digested_rows": count, "rows_sha256": rows_sha256(self._dataset, self._columns, count)}

    def checkpoint_sums(self) -> dict[str, str]:
        """Digests of what a checkpoint holds now; where the model is split, all processes must call this."""
        return checkpoint_sums(self.parameters, self.optimizer, self.rule, is_sharded=self.is_sharded)

    def check_frozen(self) -> None:
        """Checks that frozen parameters are where they were; all processes of a split model call this."""
        if frozen_sha256(self._frozen) != self.description["frozen_sha256"]:
            raise NotImplementedError(
                "Parameters that the optimizer does not train changed during training (a moving average inside of "
                "the model?), which is not recorded, so attributions would be wrong. Keep them as they are."
            )

    def remove_hooks(self) -> None:
        self.norms.remove()
        self.watch.remove()

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
