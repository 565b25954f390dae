"""Where attribution is rehearsed: in the training of a Trainer that calls back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from hf_rgm.model.losses import LossFunction
from hf_rgm.model.random_state import random_state_kept
from hf_rgm.model.sharding import is_split
from hf_rgm.recording.comparison import Comparison
from hf_rgm.recording.own_loss import calling_trainer
from hf_rgm.recording.rehearsal import Rehearsal
from hf_rgm.trajectory.trained_loss import TrainedLoss

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _unless_out_of_memory(what: str) -> Iterator[None]:
    """Goes on with a warning if memory runs out: training itself may fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        logger.warning("Memory ran out %s, so that the trained loss is not compared with the attributed one.", what)


@dataclass(frozen=True)
class Stage:
    """Where a run is rehearsed: in the training of a Trainer that calls back."""

    model: nn.Module
    dataloader: Any
    names: list[str]
    row_loss: LossFunction | None

    def rehearse(self) -> tuple[TrainedLoss, Comparison] | None:
        """The loss that is trained; `None` if no Trainer is calling, the model is split, or memory runs out."""
        with self._open("before the first step") as rehearsal:
            return None if rehearsal is None else rehearsal.run()

    def look_again(self, trained: TrainedLoss, before: Comparison, step: int) -> str | None:
        """What has become of the trained loss; `None` if it is the same."""
        with self._open(f"at step {step}") as rehearsal:
            if rehearsal is None:
                return None
            rehearsal.follow(trained)
            return rehearsal.again(before)

    def with_losses(self, trained: TrainedLoss) -> TrainedLoss:
        """The trained loss with those of some rows now, at the end of training."""
        with self._open("after the last step") as rehearsal:
            if rehearsal is not None:
                rehearsal.follow(trained)
                rows, losses = rehearsal.losses()
                return replace(trained, rows=rows, losses=losses)
        return trained

    @contextlib.contextmanager
    def _open(self, when: str) -> Iterator[Rehearsal | None]:
        trainer = calling_trainer()
        if trainer is None or is_split(self.model):
            reason = "no Trainer is calling" if trainer is None else "the model is split among processes"
            logger.warning("The trained loss is not compared with the attributed one: %s.", reason)
            yield None
            return
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        with _unless_out_of_memory(when), random_state_kept(devices=devices):
            yield Rehearsal(trainer, self.model, self.dataloader, self.names, self.row_loss)
