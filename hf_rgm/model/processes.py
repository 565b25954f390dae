"""Work shared among the processes that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(days=7)
"""How long a process waits for slower ones. One that dies is noticed anyway: its connections close."""

JOINING = timedelta(minutes=30)
"""How long a process waits at first for others to join it. One that died before has no connections to close."""

GRACE = timedelta(seconds=60)
"""How long a failed process waits to tell the others."""


@dataclass(frozen=True)
class _Failure:
    message: str


class SharedWork(Generic[Item, Result]):
    """Items that are this process's to do, and in the end the results of all."""

    def __init__(self, mine: list[Item]) -> None:
        self.mine = mine
        self.own: list[Result] = []
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        """Adds the result of the next item."""
        self.own.append(result)


class Processes:
    """All launched processes, joined at first use; results are exchanged over the CPU."""

    @property
    def _state(self) -> PartialState:
        # Made anew each time, as `TrainingArguments` resets it. On the CPU, it joins processes only if `cpu` is set.
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())

    @property
    def device(self) -> torch.device:
        return torch.device(self._state.device or "cpu")

    @functools.cached_property
    def _group(self) -> Any:
        if not torch.distributed.is_initialized():
            raise NotImplementedError(
                f"{self.count} processes were launched for {self._state.distributed_type}, which work cannot be split "
                "over. Launch one."
            )
        with self._named():
            return torch.distributed.new_group(backend="gloo", timeout=JOINING)

    @property
    def index(self) -> int:
        return self._state.process_index

    @property
    def count(self) -> int:
        return self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all share."""
        return self._state.is_main_process

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows the progress bars of its machine."""
        return self._state.is_local_main_process

    def parts(self, length: int, *, at_most: int) -> list[range]:
        """Splits `range(length)` into equal parts, none longer than `at_most`, at least one per process."""
        size = max(1, min(at_most, math.ceil(length / self.count)))
        return [range(start, min(start + size, length)) for start in range(0, length, size)]

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of the items: every `count`-th, maybe none."""
        return list(items[self.index :: self.count])

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Applies a function to items, each on one of the processes; see [`Processes.sharing`]."""
        with self.sharing(items) as work:
            for item in work.mine:
                work.add(function(item))
        return work.results

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """What every process's part gave, on every process; see [`Processes.sharing`]."""
        return self.map(lambda _: work(), range(self.count))

    @contextlib.contextmanager
    def sharing(self, items: Sequence[Item]) -> Iterator[SharedWork[Item, Any]]:
        """
        Shares work on items, the same on every process. All processes must come here.

        Within the block each adds a result for every item of its `mine`, in order, that can be pickled, tensors on the
        CPU; after it all know all `results`, in the order of the items.

        Raises:
            RuntimeError: If another process failed; its own error is named. The one that failed raises that error.
        """
        work: SharedWork[Item, Any] = SharedWork(self.share(items))
        if self.count == 1:
            yield work
            work.results = work.own
            return
        group = self._group
        try:
            yield work
        except Exception as error:
            logger.error("Process %d of %d failed, which ends them all: %s", self.index, self.count, error)
            with contextlib.suppress(RuntimeError):  # processes that come too late are ended by the launcher
                self._exchange(group, _Failure(f"{type(error).__name__}: {error}"), GRACE)
            raise
        shares = self._exchange(group, work.own, PATIENCE)
        for index, other in enumerate(shares):
            if isinstance(other, _Failure):
                raise RuntimeError(f"Process {index} of {self.count} failed, so this one stops. {other.message}")
        work.results = [shares[position % self.count][position // self.count] for position in range(len(items))]

    def _exchange(self, group: Any, mine: Any, patience: timedelta) -> list[Any]:
        results: list[Any] = [None] * self.count
        with self._named():
            torch.distributed.monitored_barrier(group, timeout=patience)
            torch.distributed.all_gather_object(results, mine, group=group)
        return results

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Says of errors of connections what they mean."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.index} of {self.count} no longer waits for the others: one ended, was killed, or "
                f"did not come within {JOINING}. See what it wrote last, and start them again. ({str(error)[:200]})"
            ) from error
