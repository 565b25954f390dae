"""Dataset rows of every update, without disturbing the training dataloader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

_WAYS_OUT = {
    "RandomSampler": 'Train with `TrainingArguments(accelerator_config={"use_seedable_sampler": True})`, the default.',
    "LengthGroupedSampler": 'Train with `TrainingArguments(train_sampling_strategy="random")` or `"sequential"`.',
    "BatchRebalanceSampler": 'Train with `TrainingArguments(train_sampling_strategy="random")` or `"sequential"`.',
}
_DEFAULT_WAY_OUT = (
    'Let the Trainer build the dataloader, with `train_sampling_strategy` `"random"` (and the default '
    '`accelerator_config={"use_seedable_sampler": True}`) or `"sequential"`.'
)


class RowSchedule:
    """Rows of every update of a Trainer, of all processes."""

    # Iterating a sampler changes its epoch and generator, so a fresh one with the same seed gives the order.
    # Accelerate deals batches (or parts of them, with `split_batches`) to processes in turn, and at the end of an
    # epoch repeats its first rows to give each as many.

    def __init__(self, dataloader: Any, accumulation_steps: int, *, global_step: int = 0) -> None:
        batch_sampler, self._shard = _checked_batch_sampler(dataloader)
        self.num_rows = len(dataloader.dataset)
        self.num_processes = 1 if self._shard is None else self._shard.num_processes
        self.batch_size = batch_sampler.batch_size
        if self._shard is not None and self._shard.split_batches:
            self.batch_size //= self.num_processes
        self._batch_sampler = batch_sampler
        self._sampler: Any = batch_sampler.sampler
        self._num_batches = self._checked_num_batches()
        self._accumulation_steps = accumulation_steps
        self.updates_per_epoch = max(1, math.ceil(self._num_batches / accumulation_steps))
        self._epoch = global_step // self.updates_per_epoch - 1
        self._first_update = global_step % self.updates_per_epoch
        self._update = 0
        self._batches: list[list[np.ndarray]] = []

    @property
    def mid_epoch(self) -> bool:
        """Whether the next epoch was interrupted before."""
        return self._first_update > 0

    @property
    def seed(self) -> int | None:
        """Seed of the sampler, `None` for a sequential order."""
        return self._sampler.initial_seed if isinstance(self._sampler, SeedableRandomSampler) else None

    def begin_epoch(self) -> None:
        """Moves on to the next epoch; call it when one begins."""
        self._epoch += 1
        self._update, self._first_update = self._first_update, 0
        self._batches = [
            [np.array(batch, np.int64) for batch in dealt]
            for dealt in zip(*self._shards(self._epoch_order()), strict=True)
        ]

    def next_update(self) -> list[np.ndarray]:
        """Rows of the next update, an int64 array per batch: the first batch of every process, then the second, ..."""
        # An exhausted sampler has already moved on by one; in short epochs it is when the first batch arrives.
        if self.seed is not None and self._sampler.epoch not in (self._epoch, self._epoch + 1):
            raise RuntimeError(
                f"The sampler is at epoch {self._sampler.epoch}, the Trainer at epoch {self._epoch}: something else "
                "moved it, so the rows of this update are not known. Do not call `set_epoch` during training."
            )
        first = self._update * self._accumulation_steps
        last = min(first + self._accumulation_steps, self._num_batches)
        if first >= last:
            raise RuntimeError(f"Epoch {self._epoch} has {self._num_batches} batches, all of which have been used.")
        self._update += 1
        return [batch for dealt in self._batches[first:last] for batch in dealt]

    def _shards(self, order: Sequence[int]) -> list[BatchSampler]:
        """The batches of every process, for an order of rows."""
        batches, shard = self._batch_sampler, self._shard
        whole = BatchSampler(order, batches.batch_size, batches.drop_last)  # type: ignore[arg-type]
        if shard is None:
            return [whole]
        how = {"split_batches": shard.split_batches, "even_batches": shard.even_batches}
        return [BatchSamplerShard(whole, self.num_processes, index, **how) for index in range(self.num_processes)]

    def _checked_num_batches(self) -> int:
        """Batches per epoch on every process."""
        if self._shard is None or self._shard.even_batches:
            return len(self._shard or self._batch_sampler)
        counts = [sum(1 for _ in batches) for batches in self._shards(range(len(self._sampler)))]
        if len(set(counts)) > 1:
            raise NotImplementedError(
                f"The {self.num_processes} processes get {counts} batches in an epoch, so that some updates are made "
                'by fewer of them. Train with `TrainingArguments(accelerator_config={"even_batches": True})`, the '
                "default, or with `dataloader_drop_last=True`."
            )
        return counts[0]

    def _epoch_order(self) -> list[int]:
        sampler = self._sampler
        if not isinstance(sampler, SeedableRandomSampler):
            return list(range(len(sampler)))
        device = torch.get_default_device() if sampler.generator is None else sampler.generator.device
        twin = SeedableRandomSampler(
            range(len(sampler.data_source)),
            replacement=sampler.replacement,
            num_samples=sampler.num_samples,
            generator=torch.Generator(device=device),
            data_seed=sampler.initial_seed,
        )
        twin.set_epoch(self._epoch)
        return list(twin)


def _checked_batch_sampler(dataloader: Any) -> tuple[BatchSampler, BatchSamplerShard | None]:
    """The batch sampler whose order can be known, and how processes share its batches."""
    if not isinstance(dataloader, DataLoader):
        raise _unknown_order(f"The dataloader is of type {type(dataloader).__name__}", _DEFAULT_WAY_OUT)
    if isinstance(dataloader.dataset, IterableDataset) or not hasattr(dataloader.dataset, "__len__"):
        raise _unknown_order(
            f"The training set is a stream ({type(dataloader.dataset).__name__}) without row numbers",
            "Train on a map-style dataset, for example `datasets.Dataset.from_list(list(stream))`.",
        )
    if isinstance(dataloader, DataLoaderDispatcher):
        raise NotImplementedError(
            "The dataloader dispatches batches from the main process, so the rows of each batch are not known. Train "
            'with `TrainingArguments(accelerator_config={"dispatch_batches": False})`.'
        )
    if dataloader.num_workers > 0 and not getattr(dataloader, "in_order", True):
        raise _unknown_order(
            "The dataloader's workers may deliver batches in any order (`dataloader_in_order=False`)",
            "Leave `dataloader_in_order` at its default.",
        )
    batch_sampler: Any = dataloader.batch_sampler
    shard = batch_sampler if type(batch_sampler) is BatchSamplerShard else None
    batch_sampler = batch_sampler if shard is None else shard.batch_sampler
    if type(batch_sampler) is not BatchSampler:
        kind = type(batch_sampler).__name__
        what = "The dataloader has no batch sampler (batch_size=None)" if batch_sampler is None else f"Got a {kind}"
        raise _unknown_order(what, _WAYS_OUT.get(kind, _DEFAULT_WAY_OUT))
    sampler = batch_sampler.sampler
    if type(sampler) not in (SeedableRandomSampler, SequentialSampler):
        kind = type(sampler).__name__
        raise _unknown_order(f"Got a {kind}", _WAYS_OUT.get(kind, _DEFAULT_WAY_OUT))
    if isinstance(sampler, SeedableRandomSampler) and not hasattr(dataloader, "set_epoch"):
        raise _unknown_order("The dataloader has no `set_epoch`, which reshuffles every epoch", _DEFAULT_WAY_OUT)
    return batch_sampler, shard


def _unknown_order(what: str, way_out: str) -> NotImplementedError:
    return NotImplementedError(f"{what}, so the order of training rows cannot be known. {way_out}")
