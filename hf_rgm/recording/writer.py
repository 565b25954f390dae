"""Writing while training goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

MAX_PENDING = 4


class BackgroundWriter:
    """
    Does pieces of work one after the other in a thread of its own, in the order they are given.

    After one has failed, those that follow are left out, and its error is raised by the next call of any method. What
    is pending when Python exits is still done.

    Args:
        max_pending (`int`, *optional*, defaults to `4`): Pieces of work that may wait, and keep their memory, before
            [`~BackgroundWriter.submit`] waits for the first of them.

    Example:

    ```python
    >>> from hf_rgm.recording.writer import BackgroundWriter
    >>> writer, done = BackgroundWriter(), []
    >>> for number in range(3):
    ...     writer.submit(lambda number=number: done.append(number))
    >>> writer.drain()
    >>> done
    [0, 1, 2]

    ```
    """

    def __init__(self, max_pending: int = MAX_PENDING) -> None:
        self._max_pending = max_pending
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hf-rgm-writer")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def submit(self, work: Callable[[], object]) -> None:
        """Does a piece of work when those before it are done. Raises the error of an earlier one."""
        self.check()
        while len(self._pending) >= self._max_pending:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._do, work))

    def check(self) -> None:
        """Raises the error of what has failed so far. Does not wait."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def drain(self) -> None:
        """Waits until all is done. Raises the error of what failed."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Waits until all is done, and ends the thread. Raises nothing: who closes no longer cares."""
        wait(self._pending)
        self._pending.clear()
        self._executor.shutdown()

    def _do(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        self._failed = True
        work()
        self._failed = False
