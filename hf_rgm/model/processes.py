"""The processes that `torchrun` or `accelerate launch` started, sharing one piece of work."""

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
"""How long a process that is done waits for the others. Shares are uneven, and a process that dies is noticed anyway:
its connections close, and its launcher ends the rest."""

GRACE = timedelta(seconds=60)
"""How long a process that failed waits to tell the others before it fails alone."""


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
    """
    All launched processes, each of which does a share of the work and learns what the others did.

    Joins them at the first use, if nobody has yet. Results are exchanged over the CPU, whatever is computed on.

    Raises:
        NotImplementedError: At the first use, if several processes were launched for devices that `torch.distributed`
            does not join.

    Example:

    ```python
    >>> from hf_rgm.model.processes import Processes
    >>> Processes().map(lambda number: number**2, [1, 2, 3])
    [1, 4, 9]

    ```
    """

    @property
    def _state(self) -> PartialState:
        # Asked anew, for `TrainingArguments` resets it. Without a word of the CPU it joins none there.
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self._state.device or "cpu")

    @functools.cached_property
    def _group(self) -> Any:
        if not torch.distributed.is_initialized():
            raise NotImplementedError(
                f"{self.count} processes were launched for {self._state.distributed_type}, which work cannot be split "
                "over. Launch one."
            )
        return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def index(self) -> int:
        """Position of this process among all."""
        return self._state.process_index

    @property
    def count(self) -> int:
        """Number of processes."""
        return self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what all share."""
        return self._state.is_main_process

    @property
    def shows_progress(self) -> bool:
        """Whether this is the process of its machine that shows progress."""
        return self._state.is_local_main_process

    def parts(self, length: int, *, at_most: int) -> list[range]:
        """Divides so many items into equal parts, none longer than `at_most`, and at least one for each process."""
        size = max(1, min(at_most, math.ceil(length / self.count)))
        return [range(start, min(start + size, length)) for start in range(0, length, size)]

    def share(self, items: Sequence[Item]) -> list[Item]:
        """What this process is to do of some items: every `count`-th. May be nothing."""
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
            with contextlib.suppress(RuntimeError):  # who comes too late learns it from the launcher
                self._exchange(group, _Failure(f"{type(error).__name__}: {error}"), GRACE)
            raise
        shares = self._exchange(group, work.own, PATIENCE)
        for index, other in enumerate(shares):
            if isinstance(other, _Failure):
                raise RuntimeError(f"Process {index} of {self.count} failed, so this one stops. {other.message}")
        work.results = [shares[position % self.count][position // self.count] for position in range(len(items))]

    def _exchange(self, group: Any, mine: Any, patience: timedelta) -> list[Any]:
        torch.distributed.monitored_barrier(group, timeout=patience)
        results: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(results, mine, group=group)
        return results
