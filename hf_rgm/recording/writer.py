"""A background thread that writes while training goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

MAX_PENDING = 4


class BackgroundWriter:
    """A thread that runs pieces of work in order, and whose first error the next call raises."""

    def __init__(self, max_pending: int = MAX_PENDING) -> None:
        self._max_pending = max_pending
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hf-rgm-writer")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def submit(self, work: Callable[[], object]) -> None:
        """Queues a piece of work; waits if `max_pending` are queued."""
        self.check()
        while len(self._pending) >= self._max_pending:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._do, work))

    def check(self) -> None:
        """Raises the error of failed work, without waiting."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def drain(self) -> None:
        """Waits until all is done, and raises the error of failed work."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Waits until all is done and ends the thread, without raising."""
        wait(self._pending)
        self._pending.clear()
        self._executor.shutdown()

    def _do(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        self._failed = True
        work()
        self._failed = False
